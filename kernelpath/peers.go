package kernelpath

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// peersAtOnce bounds the elements of one transaction.
const peersAtOnce = 1024

// Peers adds to the addresses that inside endpoints have sent to, and takes
// some away; it returns when the kernel has acknowledged. One that is there, or
// is not, is no error. (engine.Kernel)
func (t *Table) Peers(ctx context.Context, come, gone []nat.Peer) error {
	return t.do(ctx, func() error {
		for len(come)+len(gone) > 0 {
			c, g := come[:min(peersAtOnce, len(come))], gone[:min(peersAtOnce, len(gone))]
			come, gone = come[len(c):], gone[len(g):]
			tx := &transaction{}
			// What may not be there cannot be deleted: so it is added before.
			s := &set{name: setPeer}
			if old := peerElements(g); len(old) > 0 {
				tx.addElements(s, 0, old)
				tx.deleteElements(s, old)
			}
			if fresh := peerElements(c); len(fresh) > 0 {
				tx.addElements(s, 0, fresh)
			}
			if err := t.commit(tx); err != nil {
				return fmt.Errorf("change the peers of mappings: %w", err)
			}
		}
		return nil
	})
}

func peerElements(peers []nat.Peer) []element {
	var list []element
	for _, p := range peers {
		if !p.Inside.Addr().Is4() || !p.Addr.Is4() {
			continue // the set is of IPv4
		}
		e := keyElement(append(socketExtents(p.Proto, p.Inside), extent{p.Addr.String(), p.Addr.AsSlice(), p.Addr.AsSlice()}))
		e.end = nil
		list = append(list, e)
	}
	return list
}

// ListPeers lists the addresses that inside endpoints have sent to. A table
// without the set has none.
func (t *Table) ListPeers() ([]nat.Peer, error) {
	s, err := dialTable(t.netns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.close() }()
	var all []nat.Peer
	err = s.eachElement(setPeer, func(a map[uint16][]byte) {
		if p, ok := peerOf(attributes(a[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE]); ok {
			all = append(all, p)
		}
	})
	return all, err
}

// peerOf reads a key of setPeer: each part has a multiple of 32 bits.
func peerOf(key []byte) (p nat.Peer, ok bool) {
	if len(key) != 16 {
		return nat.Peer{}, false
	}
	p.Proto = flow.Proto(key[4])
	p.Inside = netip.AddrPortFrom(netip.AddrFrom4([4]byte(key)), binary.BigEndian.Uint16(key[8:]))
	p.Addr = netip.AddrFrom4([4]byte(key[12:]))
	return p, true
}

// Leaving lists, for one network rule, from where inside endpoints leave: To is
// the inside one, Becomes the external one. A rule without a map has none.
func (t *Table) Leaving(networkRule string) ([]Permitted, error) {
	s, err := dialTable(t.netns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.close() }()
	return s.permissionsIn(mapOut(networkRule))
}
