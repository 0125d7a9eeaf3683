package kernelpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables/expr"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// A permission is one or more elements of the lasting sets:
//
//	outbound, or inbound with sources          key: source . destination . protocol . port
//	  single use, kernel, one source           once4
//	  single use, kernel, several sources      permit4 : goto listed, and token4
//	  multiple, kernel                         permit4 : goto use
//	  to user space                            permit4 : goto ask
//	inbound from any source                    key: destination . protocol . port
//	  single use, kernel                       once_any4
//	  multiple, kernel                         permit_any4 : goto use
//	  to user space                            permit_any4 : goto ask
//	inbound, translated (IPv4)                 bind4: external : client, without a timeout
//
// and the same for IPv6 with the suffix 6. The destination is the target of an
// outbound permission and the external address of an inbound one. A packet of
// a single-use permission takes its element away; user space itself counts the
// uses of those it decides. token4 makes a permission with several sources
// single: its first use takes the token, and the sources alone let nobody in.
// bind4 outlives the element that was used up, until the permission is removed.

// slot is one element of one lasting set.
type slot struct {
	set  string
	elem element
}

// slotKey names a slot: the set and the bytes of the key.
type slotKey struct{ set, key string }

func (s slot) at() slotKey { return slotKey{s.set, string(s.elem.key)} }

// in is the set as far as elements need it.
func (s slot) in() *set { return &set{name: s.set} }

// bare is the element by its key alone.
func (s slot) bare() element { return element{text: s.elem.text, key: s.elem.key} }

// same says whether both have the same value.
func (s slot) same(o slot) bool {
	if (s.elem.verdict == nil) != (o.elem.verdict == nil) || string(s.elem.val) != string(o.elem.val) {
		return false
	}
	return s.elem.verdict == nil || *s.elem.verdict == *o.elem.verdict
}

// ErrPermission is a permission that cannot be in a table.
var ErrPermission = errors.New("impossible permission")

// slotsOf gives the elements of a permission; the first ones carry its
// timeout, that of bind4 has none.
func slotsOf(p nat.Permission) ([]slot, error) {
	to, err := destinationOf(p)
	if err != nil {
		return nil, err
	}
	f := familyOf(to.Addr().Is6())
	socket := socketKey(p.Proto, to)
	var slots []slot
	add := func(set string, key [][]byte, text, chain string) {
		e := element{text: text, key: pack(key...), timeout: p.Timeout}
		if chain != "" {
			e.verdict = &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}
		}
		slots = append(slots, slot{set, e})
	}
	socketText := fmt.Sprintf("%s . %s . %d", to.Addr(), p.Proto, to.Port())
	chain := chainUse
	if p.ToUser {
		chain = chainAsk
	}
	once := !p.Multiple && !p.ToUser
	sources := p.Sources
	if p.Direction == nat.Outbound {
		sources = []netip.Prefix{netip.PrefixFrom(p.Client.Addr(), p.Client.Addr().BitLen())}
	}
	switch {
	case p.Direction == nat.Inbound && p.AnySource && once:
		add(setOnceAny(f), socket, socketText, "")
	case p.Direction == nat.Inbound && p.AnySource:
		add(setPermitAny(f), socket, socketText, chain)
	default:
		several := once && len(sources) > 1
		if several {
			chain = chainListed
			add(setToken(f), socket, socketText, "")
		}
		for _, prefix := range sources {
			src := prefix.Addr()
			if !prefix.IsSingleIP() {
				return nil, fmt.Errorf("%w: source %s is not one host", ErrPermission, prefix)
			}
			if src.Is6() != to.Addr().Is6() {
				return nil, fmt.Errorf("%w: source %s is not of the family of %s", ErrPermission, src, to)
			}
			key, text := append([][]byte{src.AsSlice()}, socket...), src.String()+" . "+socketText
			if once && !several {
				add(setOnce(f), key, text, "")
			} else {
				add(setPermit(f), key, text, chain)
			}
		}
	}
	if p.Direction == nat.Inbound && p.External != p.Client {
		slots = append(slots, slot{mapBind, element{
			text: fmt.Sprintf("%s : %s . %d", socketText, p.Client.Addr(), p.Client.Port()),
			key:  pack(socket...), val: pack(p.Client.Addr().AsSlice(), portValue(p.Client.Port()).raw),
		}})
	}
	return slots, nil
}

func socketKey(p flow.Proto, a netip.AddrPort) [][]byte {
	return [][]byte{a.Addr().AsSlice(), {byte(p)}, binary.BigEndian.AppendUint16(nil, a.Port())}
}

// destinationOf checks a permission and says where its flows are sent to.
func destinationOf(p nat.Permission) (netip.AddrPort, error) {
	bad := func(format string, args ...any) (netip.AddrPort, error) {
		return netip.AddrPort{}, fmt.Errorf("%w: "+format, append([]any{ErrPermission}, args...)...)
	}
	if p.ID == 0 {
		return bad("it has no ID")
	}
	if !p.Proto.HasPorts() {
		return bad("protocol %s has no ports", p.Proto)
	}
	to := p.Target
	switch p.Direction {
	case nat.Outbound:
	case nat.Inbound:
		to = p.External
		if p.External != p.Client && (!p.External.Addr().Is4() || !p.Client.Addr().Is4() || p.Client.Port() == 0) {
			return bad("%s cannot be translated to %s", p.External, p.Client)
		}
	default:
		return bad("direction %d is unknown", p.Direction)
	}
	if !to.IsValid() || to.Port() == 0 || !p.Client.Addr().IsValid() || to.Addr().Is4In6() {
		return bad("%s from or to %s is not an address and port", to, p.Client)
	}
	if p.Timeout < 0 {
		return bad("timeout %s", p.Timeout)
	}
	return to, nil
}
