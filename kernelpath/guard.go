package kernelpath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Guard looks after the table until ctx ends. When somebody else has taken out
// of it (nft flush ruleset) or put into it a chain, a rule, a set or a counter, or
// has changed a policy or the table's flags, it calls mend within a second, which
// is to Load again: that puts back what this Table has installed, too. Where mend
// fails it is called again a second later. Elements that somebody else takes out
// of a set are not noticed.
//
// It looks and does not listen: with a listener on NFNLGRP_NFTABLES the kernel
// would write a message about each element that the gateway itself adds.
func (t *Table) Guard(ctx context.Context, mend func() error) error {
	const often, afterFailure = 200 * time.Millisecond, time.Second
	wait := time.NewTimer(often)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-wait.C:
		}
		var changed bool
		err := t.do(ctx, func() (err error) {
			changed, err = t.changed()
			return err
		})
		if errors.Is(err, ErrClosed) || ctx.Err() != nil {
			return nil
		}
		next := often
		if changed {
			err = mend()
		}
		if err != nil {
			t.log.Error("look after the table", zap.Error(err))
			next = afterFailure
		}
		wait.Reset(next)
	}
}

// changed compares the table with what was loaded, if any table of the
// namespace has changed since they were last the same.
func (t *Table) changed() (bool, error) {
	if t.shape == 0 {
		return false, nil // nothing is loaded
	}
	at, err := t.sock.generation()
	if err != nil || at == t.looked {
		return false, err
	}
	now, err := t.sock.shape()
	if err != nil || now != t.shape {
		return err == nil, err
	}
	t.looked = at
	return false, nil
}

// seen keeps what the table looks like after a change of ours.
func (t *Table) seen() {
	var err error
	if t.shape, err = t.sock.shape(); err != nil {
		t.shape = unseen
		t.log.Warn("look at the table after a change; it is loaded again", zap.Error(err))
	}
}

// ours makes a change of ours that is not a whole Load. What somebody else has
// changed before, and Guard has not seen yet, stays to be seen.
func (t *Table) ours(change func() error) error {
	foreign, err := t.changed()
	if err != nil {
		return err
	}
	if err = change(); err == nil && !foreign && t.shape != 0 {
		t.seen()
	}
	return err
}

// unseen is the shape of a table that could not be looked at: what is there
// passes for somebody else's change.
const unseen = 1

// generation changes with each transaction on a table of the namespace.
func (s *socket) generation() (uint32, error) {
	msgs, err := s.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{byte(nftables.TableFamilyUnspecified), unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil {
		return 0, fmt.Errorf("ask for the generation of the ruleset: %w", err)
	}
	for _, m := range msgs {
		if len(m.Data) > 4 {
			return number(attributes(m.Data[4:])[unix.NFTA_GEN_ID]), nil
		}
	}
	return 0, errors.New("ask for the generation of the ruleset: no answer")
}

var shapeSeed = maphash.MakeSeed()

// shape is a hash of everything in the table but the elements: the table has a
// handle, which none made later gets again, and within it each object has one.
func (s *socket) shape() (uint64, error) {
	var h maphash.Hash
	h.SetSeed(shapeSeed)
	for _, kind := range []struct{ get, table, handle uint16 }{
		{unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, attrTableHandle},
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_HANDLE},
		{unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_HANDLE},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, attrSetHandle},
		{unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE, attrObjectHandle},
		{msgGetFlowtable, attrFlowTable, attrFlowHandle},
	} {
		_ = binary.Write(&h, binary.NativeEndian, kind.get) // a Hash takes everything
		err := s.eachObject(kind.get, kind.table, func(a map[uint16][]byte) {
			_, _ = h.Write(a[kind.handle])
			switch kind.get {
			case unix.NFT_MSG_GETTABLE:
				_, _ = h.Write(a[unix.NFTA_TABLE_FLAGS]) // a dormant one does nothing
			case unix.NFT_MSG_GETCHAIN:
				_, _ = h.Write(a[unix.NFTA_CHAIN_POLICY])
			}
		})
		if err != nil {
			return 0, err
		}
	}
	return h.Sum64(), nil
}
