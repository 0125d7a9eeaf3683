package kernelpath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
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
	// single-use permission), "token" (the one use of such a permission) or
	// "bind" (a translation, which lets nobody in by itself).
	Use   string
	Proto flow.Proto
	// Source is invalid: any source.
	Source netip.Addr
	To     netip.AddrPort
	// Client is where a bind sends its flows.
	Client netip.AddrPort
	// Expires is the time left; 0: never.
	Expires time.Duration
}

// permissionSetNames are the sets that hold permissions.
func permissionSetNames() []string {
	names := []string{mapBind}
	for _, f := range []family{ipv4, ipv6} {
		names = append(names, setOnce(f), setPermit(f), setOnceAny(f), setPermitAny(f), setToken(f))
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
		for _, name := range permissionSetNames() {
			if _, there := old.sets[name]; there {
				tx.flushSet(name)
			}
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
	var all []Permitted
	for _, name := range permissionSetNames() {
		msgs, err := s.list(unix.NFT_MSG_GETSETELEM,
			attr(unix.NFTA_SET_ELEM_LIST_TABLE, text(tableName)), attr(unix.NFTA_SET_ELEM_LIST_SET, text(name)))
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list set %s: %w", name, err)
		}
		for _, m := range msgs {
			if len(m.Data) < 4 {
				continue
			}
			ad, err := netlink.NewAttributeDecoder(attributes(m.Data[4:])[unix.NFTA_SET_ELEM_LIST_ELEMENTS])
			if err != nil {
				return nil, fmt.Errorf("list set %s: %w", name, err)
			}
			for ad.Next() {
				if p, ok := permitted(name, attributes(ad.Bytes())); ok {
					all = append(all, p)
				}
			}
		}
	}
	return all, nil
}

// permitted reads one element; not ok: it is none of ours.
func permitted(name string, a map[uint16][]byte) (Permitted, bool) {
	key := attributes(a[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE]
	data := attributes(a[unix.NFTA_SET_ELEM_DATA])
	f := familyOf(strings.HasSuffix(name, ipv6.suffix))
	p := Permitted{Use: "once"}
	addr := len(f.unspecified.raw)
	if name == setOnce(f) || name == setPermit(f) {
		if len(key) < addr {
			return p, false
		}
		p.Source, _ = netip.AddrFromSlice(key[:addr])
		key = key[addr:]
	}
	if len(key) != addr+8 {
		return p, false
	}
	to, _ := netip.AddrFromSlice(key[:addr])
	p.Proto = flow.Proto(key[addr])
	p.To = netip.AddrPortFrom(to, binary.BigEndian.Uint16(key[addr+4:]))
	switch name {
	case setToken(f):
		p.Use = "token"
	case mapBind:
		v := data[unix.NFTA_DATA_VALUE]
		if len(v) != 8 {
			return p, false
		}
		client, _ := netip.AddrFromSlice(v[:4])
		p.Use, p.Client = "bind", netip.AddrPortFrom(client, binary.BigEndian.Uint16(v[4:]))
	case setPermit(f), setPermitAny(f):
		chain := cString(attributes(data[unix.NFTA_DATA_VERDICT])[unix.NFTA_VERDICT_CHAIN])
		use, ok := map[string]string{chainUse: "many", chainAsk: "ask", chainListed: "listed"}[chain]
		if !ok {
			return p, false
		}
		p.Use = use
	}
	if e := a[unix.NFTA_SET_ELEM_EXPIRATION]; len(e) == 8 {
		p.Expires = time.Duration(binary.BigEndian.Uint64(e)) * time.Millisecond
	}
	return p, true
}
