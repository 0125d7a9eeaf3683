package kernelpath

import (
	"github.com/google/nftables"

	"github.com/sluicegw/sluice/flow"
)

// Names of the permission sets of a family; see permissions.go for what goes
// where. Their keys are source . destination . protocol . port, with "any",
// "token", "bind" and "via" without the source.
func setOnce(f family) string      { return "once" + f.suffix }
func setPermit(f family) string    { return "permit" + f.suffix }
func setOnceAny(f family) string   { return "once_any" + f.suffix }
func setPermitAny(f family) string { return "permit_any" + f.suffix }
func setWide(f family) string      { return "wide" + f.suffix }
func setToken(f family) string     { return "token" + f.suffix }
func mapBind(f family) string      { return "bind" + f.suffix }
func setVia(f family) string       { return "via" + f.suffix }

// setGate has the destinations of all permissions, and of some that have gone,
// and the clients that permissions give a source. Nearly everybody goes elsewhere,
// is nobody of these, and is spared the look-ups.
func setGate(f family) string { return "gate" + f.suffix }

// The maps of source addresses, whose key is the first packet's; and the two
// chains that the first of them leads to, by the name of the map that these
// look up.
func mapSource(f family) string     { return "source" + f.suffix }
func mapSourceAddr(f family) string { return "source_addr" + f.suffix }
func mapSourcePort(f family) string { return "source_port" + f.suffix }

// permissionSets are the sets that move while traffic flows.
func (b *builder) permissionSets() {
	verdicts := []nftables.SetDatatype{nftables.TypeVerdict}
	for _, f := range []family{ipv4, ipv6} {
		socket := []nftables.SetDatatype{f.addr, nftables.TypeInetService}
		for _, s := range []*set{
			{name: setOnce(f), key: fieldTypes(f.tuple()), dynamic: true, size: anySize},
			{name: setPermit(f), key: fieldTypes(f.tuple()), data: verdicts},
			{name: setOnceAny(f), key: fieldTypes(f.socket()), dynamic: true, size: anySize},
			{name: setPermitAny(f), key: fieldTypes(f.socket()), data: verdicts},
			{name: setWide(f), key: fieldTypes(f.tuple()), data: verdicts, interval: true},
			{name: setToken(f), key: fieldTypes(f.socket()), dynamic: true, size: anySize},
			{name: setGate(f), key: []nftables.SetDatatype{f.addr}},
			{name: mapBind(f), key: fieldTypes(f.socket()), data: socket},
			{name: setVia(f), key: fieldTypes(f.socket())},
			{name: mapSource(f), key: fieldTypes(f.request()), data: verdicts},
			{name: mapSourceAddr(f), key: fieldTypes(f.request()), data: socket[:1]},
			{name: mapSourcePort(f), key: fieldTypes(f.request()), data: socket},
			{name: mapInside(f), key: fieldTypes(f.askedSocket()), data: verdicts},
		} {
			s.lasting, s.timeout = true, true
			b.set(s)
		}
	}
}

// permit looks for a permission.
//
//	chain permit4 {
//		meta nfproto ipv4 ip saddr . ip daddr . meta l4proto . th dport @once4 goto use_once4
//		meta nfproto ipv4 ip saddr . ip daddr . meta l4proto . th dport vmap @permit4
//		meta nfproto ipv4 ip daddr . meta l4proto . th dport @once_any4 goto use_once_any4
//		meta nfproto ipv4 ip daddr . meta l4proto . th dport vmap @permit_any4
//	}
//
// A single-use element goes with the packet that matched it; packets that
// follow pass by the mark of the flow.
func (b *builder) permit() {
	for _, f := range []family{ipv4, ipv6} {
		lookPermissionsUp(b.chain(chainPermit+f.suffix), f)
	}
	for _, f := range []family{ipv4, ipv6} {
		only := is(fieldNFProto, f.nfproto)
		for _, once := range []struct {
			set string
			key []field
		}{{setOnce(f), f.tuple()}, {setOnceAny(f), f.socket()}} {
			u := b.chain("use_" + once.set)
			u.add(only, remove(once.set, once.key...))
			u.add(goTo(chainUse))
		}
	}
	b.wide()
	b.uses()
}

func lookPermissionsUp(c *chain, f family) {
	only := is(fieldNFProto, f.nfproto)
	c.add(only, in(setOnce(f), f.tuple()...), goTo("use_"+setOnce(f)))
	c.add(only, vmap(setPermit(f), f.tuple()...))
	c.add(only, in(setOnceAny(f), f.socket()...), goTo("use_"+setOnceAny(f)))
	c.add(only, vmap(setPermitAny(f), f.socket()...))
}

// wide looks for a source among ranges. That costs more than a hash and is
// done only for packets to an address that some permission opens to a range.
//
//	meta nfproto ipv4 ip saddr . ip daddr . meta l4proto . th dport vmap @wide4
func (b *builder) wide() {
	c := b.chain(chainWide)
	for _, f := range []family{ipv4, ipv6} {
		c.add(is(fieldNFProto, f.nfproto), vmap(setWide(f), f.tuple()...))
	}
}

// uses are what a permission lets a flow do, and for each of them the chain
// where one of several sources takes the only use.
//
//	chain listed {
//		meta nfproto ipv4 ip daddr . meta l4proto . th dport @token4 delete @token4 { ip daddr . meta l4proto . th dport } goto use
//	}
func (b *builder) uses() {
	for _, use := range []struct{ listed, to string }{
		{chainListed, chainUse}, {chainListedOneWay, chainUseOneWay}, {chainListedLocal, chainUseLocal},
	} {
		c := b.chain(use.listed)
		for _, f := range []family{ipv4, ipv6} {
			c.add(is(fieldNFProto, f.nfproto), in(setToken(f), f.socket()...), remove(setToken(f), f.socket()...), goTo(use.to))
		}
	}
	u := b.chain(chainUse)
	u.add(count(counterPermitted), report(b.LogGroup, reportUsed))
	u.add(goTo(chainCarryFirst))

	w := b.chain(chainUseOneWay)
	w.add(count(counterPermitted), report(b.LogGroup, reportUsed))
	w.add(setMark(fieldCtMark, b.Marks.Mask(), b.Marks.OneWay()), accept())

	// A socket of the gateway itself listens there: nothing is carried.
	l := b.chain(chainUseLocal)
	l.add(count(counterPermitted))
	l.add(b.putPath(fieldCtMark, flow.Own), accept())
}
