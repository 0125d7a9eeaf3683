package kernelpath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// A permission is one or more elements of the lasting sets:
//
//	outbound, or with sources                  key: source . destination . protocol . port
//	  single use, one source                   once4
//	  single use, several sources              permit4 : goto listed, and token4
//	  multiple                                 permit4 : goto use
//	  to user space                            permit4 : goto ask
//	  sources wider than a host                the same in wide4, and permit_any4 : goto wide
//	from any source                            key: destination . protocol . port
//	  single use                               once_any4
//	  multiple                                 permit_any4 : goto use
//	  to user space                            permit_any4 : goto ask
//	translated                                 bind4: where the flow goes : where it is sent, without a timeout
//	redirect                                   via4: who else goes there is told no, for a while after it is over, too
//	with a source address of its own           key: what the client asks for
//	  with a port                              source4 : goto source_port4, and source_port4 : address . port
//	  without                                  source4 : goto source_addr4, and source_addr4 : address
//	the client sees the gateway                inside4 : goto seen_gateway, without a timeout
//	what the client sends leaves from there    key: the client's address . protocol . port
//	                                           out4_... of the network rule : address . port, and known4_... of the network rule
//	of an endpoint-independent mapping         the same, and if anybody may come in
//	  everybody                                permit_any4 : goto use_mapped
//	  whom the client has sent to              permit_any4 : goto use_peer
//
// and the same for IPv6 with the suffix 6. The destination is where the first
// packet goes: the target of an outbound permission, or the address of the
// gateway that stands for it, and the external address of an inbound or local
// one. Where the flow may do something else than pass (one way, local) its
// verdict says so (use_one_way, listed_local ...), and a single use needs the
// token even with one source.
//
// A packet of a single-use permission takes its element away; user space
// itself counts the uses of those it decides. token4 makes a permission with
// several sources single: its first use takes the token, and the sources alone
// let nobody in. bind4 and the sources outlive the element that was used up,
// until the permission is removed. Ranges are in a map of their own, because
// no packet can change that and looking it up costs more.

// slot is one element of one lasting set.
type slot struct {
	set  string
	elem element
	// lingers is how long it stays when its last permission has gone.
	lingers time.Duration
}

// slotKey names a slot: the set and the bytes of the key.
type slotKey struct{ set, key string }

func (s slot) at() slotKey { return slotKey{s.set, string(s.elem.key) + string(s.elem.end)} }

// isRange says whether it is in a map of ranges.
func (s slot) isRange() bool { return len(s.elem.end) > 0 }

// in is the set as far as elements need it.
func (s slot) in() *set { return &set{name: s.set} }

// bare is the element by its key alone.
func (s slot) bare() element { return element{text: s.elem.text, key: s.elem.key, end: s.elem.end} }

// same says whether both have the same value.
func (s slot) same(o slot) bool {
	if (s.elem.verdict == nil) != (o.elem.verdict == nil) || string(s.elem.val) != string(o.elem.val) {
		return false
	}
	return s.elem.verdict == nil || *s.elem.verdict == *o.elem.verdict
}

// ErrPermission is a permission that cannot be in a table.
var ErrPermission = errors.New("impossible permission")

// slotsOf gives the elements of a permission. Those that let flows in carry its
// timeout.
func slotsOf(p nat.Permission) ([]slot, error) {
	to, err := destinationOf(p)
	if err != nil {
		return nil, err
	}
	f := familyOf(to.Addr().Is6())
	s := &slots{
		p: p, f: f, socket: socketExtents(p.Proto, to),
		once: !p.Multiple && !p.ToUser, use: chainUse, listed: chainListed,
	}
	switch {
	case p.ToUser:
		s.use = chainAsk
	case p.Direction == nat.Local:
		s.use, s.listed = chainUseLocal, chainListedLocal
	case p.OneWay:
		s.use, s.listed = chainUseOneWay, chainListedOneWay
	case p.PeersOnly:
		s.use = chainUsePeer
	case p.Mapped:
		s.use = chainUseMapped
	}
	if p.Proto.HasPorts() {
		if err := s.openings(); err != nil {
			return nil, err
		}
		s.translations(to)
	}
	if p.Leaves != "" {
		inside := socketExtents(p.Proto, p.Client)
		s.value(mapOut(p.Leaves), inside, fmt.Sprintf("%s . %d", to.Addr(), to.Port()),
			pack(to.Addr().AsSlice(), portValue(to.Port()).raw))
		s.put(setKnown(p.Leaves), inside, "").elem.timeout = 0
	}
	return s.all, nil
}

// slots collects the elements of one permission.
type slots struct {
	p           nat.Permission
	f           family
	socket      []extent // destination, protocol and port
	once        bool
	use, listed string // the verdicts
	all         []slot
}

// put adds an element with the timeout of the permission. chain: its verdict.
func (s *slots) put(set string, key []extent, chain string) *slot {
	e := keyElement(key)
	if chain != "" {
		e = makeElement(key, goTo(chain))
	}
	e.timeout = s.p.Timeout
	if string(e.key) == string(e.end) {
		e.end = nil
	}
	s.all = append(s.all, slot{set: set, elem: e})
	return &s.all[len(s.all)-1]
}

// openings are what lets flows in.
func (s *slots) openings() error {
	sources := s.p.Sources
	switch {
	case s.p.Direction == nat.Outbound && !s.p.Client.Addr().IsValid():
		return nil // a translation alone
	case s.p.Direction == nat.Outbound:
		sources = []netip.Prefix{netip.PrefixFrom(s.p.Client.Addr(), s.p.Client.Addr().BitLen())}
	case s.p.AnySource && s.once && s.use == chainUse:
		s.put(setOnceAny(s.f), s.socket, "")
		return nil
	case s.p.AnySource && s.once:
		s.put(setPermitAny(s.f), s.socket, s.listed)
		s.put(setToken(s.f), s.socket, "")
		return nil
	case s.p.AnySource:
		s.put(setPermitAny(s.f), s.socket, s.use)
		return nil
	}
	sources = outermost(sources)
	for _, src := range sources {
		if src.Addr().Is6() != (s.f.number == ipv6.number) {
			return fmt.Errorf("%w: source %s is not of the family of %s", ErrPermission, src, s.socket[0].text)
		}
	}
	s.from(sources)
	return nil
}

// from lets in who is in the list.
func (s *slots) from(sources []netip.Prefix) {
	if s.once && s.use == chainUse && len(sources) == 1 && sources[0].IsSingleIP() {
		s.put(setOnce(s.f), s.key(sources[0]), "")
		return
	}
	verdict := s.use
	if s.once && len(sources) > 0 {
		verdict = s.listed
		s.put(setToken(s.f), s.socket, "")
	}
	wide := false
	for _, src := range sources {
		set := setPermit(s.f)
		if !src.IsSingleIP() {
			set, wide = setWide(s.f), true
		}
		s.put(set, s.key(src), verdict)
	}
	if wide {
		s.put(setPermitAny(s.f), s.socket, chainWide)
	}
}

func (s *slots) key(src netip.Prefix) []extent {
	return append([]extent{hostOrPrefix(src)}, s.socket...)
}

// translations are where flows are sent, and where they seem to come from.
func (s *slots) translations(to netip.AddrPort) {
	target := s.p.Target
	if s.p.Direction == nat.Inbound {
		target = s.p.Client
	}
	if s.p.Direction != nat.Local && target != to {
		s.value(mapBind(s.f), s.socket, fmt.Sprintf("%s . %d", target.Addr(), target.Port()),
			pack(target.Addr().AsSlice(), portValue(target.Port()).raw))
	}
	if s.p.FromGateway {
		s.put(mapInside(s.f), s.socket, chainSeenGateway).elem.timeout = 0
	}
	if s.p.Direction != nat.Outbound {
		return
	}
	if s.p.Via.IsValid() {
		via := s.put(setVia(s.f), s.socket, "")
		via.lingers = nat.Quarantine
		if s.p.Timeout > 0 {
			via.elem.timeout += nat.Quarantine
		}
	}
	if from := s.p.Source; from.IsValid() && s.p.Client.Addr().IsValid() {
		host := s.p.Client.Addr()
		key := s.key(netip.PrefixFrom(host, host.BitLen()))
		way, text, val := mapSourceAddr(s.f), from.Addr().String(), from.Addr().AsSlice()
		if from.Port() != 0 {
			way, text, val = mapSourcePort(s.f), fmt.Sprintf("%s . %d", from.Addr(), from.Port()), pack(val, portValue(from.Port()).raw)
		}
		s.put(mapSource(s.f), key, way).elem.timeout = 0
		s.value(way, key, text, val)
	}
}

// value adds an element of a map, without a timeout.
func (s *slots) value(set string, key []extent, text string, val []byte) {
	e := &s.put(set, key, "").elem
	e.text, e.val, e.timeout = e.text+" : "+text, val, 0
}

// outermost leaves out the sources that another one covers: a map of ranges
// refuses what overlaps.
func outermost(sources []netip.Prefix) []netip.Prefix {
	if len(sources) < 2 {
		return sources
	}
	// There may be thousands. In this order the one that covers comes right
	// before what it covers.
	sorted := slices.SortedFunc(slices.Values(sources), func(p, q netip.Prefix) int {
		return cmp.Or(p.Masked().Addr().Compare(q.Masked().Addr()), cmp.Compare(p.Bits(), q.Bits()))
	})
	kept := sorted[:1]
	for _, p := range sorted[1:] {
		if !kept[len(kept)-1].Overlaps(p) {
			kept = append(kept, p)
		}
	}
	return kept
}

func socketExtents(p flow.Proto, a netip.AddrPort) []extent {
	host, port := a.Addr().AsSlice(), portValue(a.Port())
	return []extent{{a.Addr().String(), host, host}, protoExtent([2]flow.Proto{p, p}), {port.text, port.raw, port.raw}}
}

// hostOrPrefix is a prefix in nft's words, or an address if it is that.
func hostOrPrefix(p netip.Prefix) extent {
	e := prefixExtent(p)
	if p.IsSingleIP() {
		e.text = p.Addr().String()
	}
	return e
}

// destinationOf checks a permission and says where the first packets of its
// flows go.
func destinationOf(p nat.Permission) (netip.AddrPort, error) {
	bad := func(format string, args ...any) (netip.AddrPort, error) {
		return netip.AddrPort{}, fmt.Errorf("%w: "+format, append([]any{ErrPermission}, args...)...)
	}
	if p.ID == 0 {
		return bad("it has no ID")
	}
	if !p.Proto.HasPorts() && (p.Proto != flow.ICMP || p.Leaves == "" || p.AnySource || len(p.Sources) > 0) {
		return bad("protocol %s has no ports", p.Proto)
	}
	if p.Leaves != "" && (p.Direction != nat.Inbound || p.External == p.Client || !p.External.Addr().Is4()) {
		return bad("what %s sends cannot leave from %s", p.Client, p.External)
	}
	if p.Timeout < 0 {
		return bad("timeout %s", p.Timeout)
	}
	if p.FromGateway && p.Direction != nat.Inbound {
		return bad("only who lets flows in can see the gateway")
	}
	if p.OneWay && (p.Direction != nat.Inbound || p.Proto != flow.UDP || p.ToUser) {
		return bad("only inbound UDP that the kernel carries can pass one way")
	}
	if (p.Mapped || p.PeersOnly || p.Shared) && (p.Leaves == "" || !p.Mapped || !p.Multiple || p.OneWay || len(p.Sources) > 0) {
		return bad("%s is no mapping", p.External)
	}
	to := p.Target
	switch p.Direction {
	case nat.Outbound:
		if p.Via.IsValid() {
			to = p.Via
			if !sameFamily(to, p.Target) || p.Target.Port() == 0 {
				return bad("%s cannot lead to %s", to, p.Target)
			}
		}
		if p.Source.IsValid() && !sameFamily(p.Source, to) {
			return bad("%s cannot leave from %s", to, p.Source)
		}
		if client := p.Client.Addr(); !client.IsValid() && !p.Via.IsValid() {
			return bad("it has neither a client nor an address of its own")
		} else if client.IsValid() && client.BitLen() != to.Addr().BitLen() {
			return bad("%s is not of the family of %s", client, to)
		}
	case nat.Inbound:
		to = p.External
		if p.External != p.Client && (!sameFamily(to, p.Client) || p.Client.Port() == 0) {
			return bad("%s cannot be translated to %s", p.External, p.Client)
		}
	case nat.Local:
		to = p.External
	default:
		return bad("direction %d is unknown", p.Direction)
	}
	if !to.IsValid() || to.Port() == 0 || to.Addr().Is4In6() {
		return bad("%s is not an address and port", to)
	}
	return to, nil
}

func sameFamily(a, b netip.AddrPort) bool {
	return a.IsValid() && b.IsValid() && a.Addr().BitLen() == b.Addr().BitLen() && !a.Addr().Is4In6() && !b.Addr().Is4In6()
}
