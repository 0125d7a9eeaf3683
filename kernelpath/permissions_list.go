package kernelpath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	mathbits "math/bits"
	"net/netip"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// Permitted is one element of the permission sets as the kernel holds it.
type Permitted struct {
	// Use is "once", "many", "ask" (to user space), "listed" (one source of a
	// single-use permission), "token" (the one use of such a permission),
	// "ranges" (some sources are ranges), "bind" (a translation, which lets
	// nobody in by itself), "refuse" (who else goes there is told no),
	// "source" (where a flow leaves from), "seen" (the client sees the gateway
	// as the source), "leaves" (where the flows of an inside endpoint leave
	// from), or "mapped" or "mapped peers" (who may come in to an
	// endpoint-independent mapping). "one way" or "local" follows where the flow
	// may do no more than that.
	Use   string
	Proto flow.Proto
	// Source is invalid: any source.
	Source netip.Prefix
	// To is the inside endpoint for "leaves".
	To netip.AddrPort
	// Becomes is where a bind sends its flows, and what the source of a flow
	// becomes.
	Becomes netip.AddrPort
	// Expires is the time left; 0: never.
	Expires time.Duration
}

// permissionSetNames are the sets that hold permissions.
func permissionSetNames() []string {
	var names []string
	for _, f := range []family{ipv4, ipv6} {
		names = append(names, setOnce(f), setPermit(f), setOnceAny(f), setPermitAny(f), setWide(f), setToken(f),
			setGate(f), mapBind(f), setVia(f), mapSource(f), mapSourceAddr(f), mapSourcePort(f), mapInside(f))
	}
	return names
}

// FlushPermissions empties the permission sets, for a start whose permissions
// of an earlier run mean nothing. It returns when the kernel has acknowledged;
// a table that is not there is no error.
func (t *Table) FlushPermissions() error {
	return t.do(context.Background(), func() error {
		old, err := t.sock.existing()
		if err != nil {
			return fmt.Errorf("flush permissions: list the table: %w", err)
		}
		tx := &transaction{}
		for _, name := range old.lastingNames() {
			tx.flushSet(name)
		}
		if err := t.commit(tx); err != nil {
			return fmt.Errorf("flush permissions: %w", err)
		}
		t.forget()
		return nil
	})
}

// Permissions lists what the kernel holds. An element that expired a moment
// ago may be among them. A table that is not there holds nothing.
func (t *Table) Permissions() ([]Permitted, error) {
	s, err := dialTable(t.netns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.close() }()
	old, err := s.existing()
	if err != nil {
		return nil, fmt.Errorf("list the table: %w", err)
	}
	var all []Permitted
	for _, name := range old.lastingNames() {
		some, err := s.permissionsIn(name)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// permissionsIn lists one set. One that is not there holds nothing.
func (s *socket) permissionsIn(name string) (all []Permitted, err error) {
	err = s.eachElement(name, func(a map[uint16][]byte) {
		if p, ok := permitted(name, a); ok {
			all = append(all, p)
		}
	})
	return all, err
}

// eachElement lists the elements of a set by their attributes. A set that is not
// there has none.
func (s *socket) eachElement(name string, do func(map[uint16][]byte)) error {
	msgs, err := s.list(unix.NFT_MSG_GETSETELEM,
		attr(unix.NFTA_SET_ELEM_LIST_TABLE, text(tableName)), attr(unix.NFTA_SET_ELEM_LIST_SET, text(name)))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list set %s: %w", name, err)
	}
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		ad, err := netlink.NewAttributeDecoder(attributes(m.Data[4:])[unix.NFTA_SET_ELEM_LIST_ELEMENTS])
		if err != nil {
			return fmt.Errorf("list set %s: %w", name, err)
		}
		for ad.Next() {
			do(attributes(ad.Bytes()))
		}
	}
	return nil
}

// permitted reads one element; not ok: it is none of ours, or says nothing that
// another one does not.
func permitted(name string, a map[uint16][]byte) (Permitted, bool) {
	key := attributes(a[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE]
	f := familyOf(strings.HasSuffix(name, ipv6.suffix) && !ofNetworkRule(name))
	p := Permitted{Use: "once"}
	size := len(f.unspecified.raw)
	switch name {
	case setOnce(f), setPermit(f), setWide(f), mapSourceAddr(f), mapSourcePort(f):
		if len(key) < size {
			return p, false
		}
		last := key
		if end := attributes(a[attrElemKeyEnd])[unix.NFTA_DATA_VALUE]; len(end) == len(key) {
			last = end
		}
		p.Source = prefixOf(key[:size], last[:size])
		key = key[size:]
	}
	if len(key) != size+8 {
		return p, false
	}
	p.Proto = flow.Proto(key[size])
	p.To = addrPortOf(append(key[:size:size], key[size+4:]...))
	if !p.meaning(name, f, attributes(a[unix.NFTA_SET_ELEM_DATA])) {
		return p, false
	}
	if e := a[unix.NFTA_SET_ELEM_EXPIRATION]; len(e) == 8 {
		p.Expires = time.Duration(binary.BigEndian.Uint64(e)) * time.Millisecond
	}
	return p, true
}

// verdictUses are the words for the chains that a verdict map leads to.
var verdictUses = map[string]string{
	chainUse: "many", chainAsk: "ask", chainListed: "listed", chainWide: "ranges",
	chainUseOneWay: "many one way", chainListedOneWay: "listed one way",
	chainUseLocal: "many local", chainListedLocal: "listed local",
	chainUseMapped: "mapped", chainUsePeer: "mapped peers",
}

// meaning fills in what the set and its value say.
func (p *Permitted) meaning(name string, f family, data map[uint16][]byte) bool {
	if strings.HasPrefix(name, knownPrefix) {
		return false // out4_ has more
	}
	if strings.HasPrefix(name, outPrefix) {
		p.Use, p.Becomes = "leaves", addrPortOf(data[unix.NFTA_DATA_VALUE])
		return p.Becomes.IsValid()
	}
	switch name {
	case setToken(f):
		p.Use = "token"
	case setVia(f):
		p.Use = "refuse"
	case mapInside(f):
		p.Use = "seen"
	case mapBind(f), mapSourceAddr(f), mapSourcePort(f):
		p.Use, p.Becomes = "source", addrPortOf(data[unix.NFTA_DATA_VALUE])
		if name == mapBind(f) {
			p.Use = "bind"
		}
		return p.Becomes.IsValid()
	case setPermit(f), setPermitAny(f), setWide(f):
		chain := cString(attributes(data[unix.NFTA_DATA_VERDICT])[unix.NFTA_VERDICT_CHAIN])
		p.Use = verdictUses[chain]
		return p.Use != ""
	case mapSource(f):
		return false // leads to the address, which is listed
	}
	return true
}

// addrPortOf reads an address, or an address and a port padded to 32 bits.
func addrPortOf(b []byte) netip.AddrPort {
	port := uint16(0)
	if len(b) == 8 || len(b) == 20 {
		port = binary.BigEndian.Uint16(b[len(b)-4:])
		b = b[:len(b)-4]
	}
	addr, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr, port)
}

// prefixOf gives the prefix whose first and last address these are.
func prefixOf(first, last []byte) netip.Prefix {
	addr, _ := netip.AddrFromSlice(first)
	n := 0
	for i := range first {
		same := mathbits.LeadingZeros8(first[i] ^ last[i])
		n += same
		if same < 8 {
			break
		}
	}
	return netip.PrefixFrom(addr, n)
}
