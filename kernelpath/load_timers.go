package kernelpath

import (
	"encoding/binary"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// Constants of linux/netfilter/nf_tables.h and nfnetlink_cttimeout.h that no
// package has.
const (
	objectCtTimeout    = 7 // NFT_OBJECT_CT_TIMEOUT
	attrTimeoutL3Proto = 1 // NFTA_CT_TIMEOUT_L3PROTO
	attrTimeoutL4Proto = 2
	attrTimeoutData    = 3
	attrUDPUnreplied   = 1 // CTA_TIMEOUT_UDP_UNREPLIED
	attrUDPReplied     = 2
)

// addTimer makes the timeout object of so many seconds. One that is there is
// never changed, nor deleted but with the table.
func (t *transaction) addTimer(table string, seconds uint32) {
	data := t.inner(unix.NFTA_OBJ_DATA,
		attr(attrTimeoutL3Proto, binary.BigEndian.AppendUint16(nil, unix.NFPROTO_INET)), attr(attrTimeoutL4Proto, []byte{byte(flow.UDP)}),
		t.inner(attrTimeoutData, attr(attrUDPUnreplied, be32(seconds)), attr(attrUDPReplied, be32(seconds))))
	t.put("ct timeout "+timerName(seconds), unix.NFT_MSG_NEWOBJ, create,
		attr(unix.NFTA_OBJ_TABLE, text(table)), attr(unix.NFTA_OBJ_NAME, text(timerName(seconds))),
		attr(unix.NFTA_OBJ_TYPE, be32(objectCtTimeout)), data)
}

// takeObject notes a counter or a timer.
func (old *existing) takeObject(a map[uint16][]byte) {
	name := cString(a[unix.NFTA_OBJ_NAME])
	switch number(a[unix.NFTA_OBJ_TYPE]) {
	case unix.NFT_OBJECT_COUNTER:
		old.counters[name] = true
	case objectCtTimeout:
		if s, err := strconv.ParseUint(strings.TrimPrefix(name, "udp_"), 10, 32); err == nil {
			old.timers[uint32(s)] = true
		}
	}
}

// tryTimer makes a timeout object in a table of its own.
func tryTimer() error {
	s, err := dialTable(0)
	if err != nil {
		return err
	}
	defer func() { _ = s.close() }()
	tx := &transaction{}
	tx.addTableNamed(probeTable)
	tx.addTimer(probeTable, 1)
	if err := s.commit(tx); err != nil {
		return err
	}
	tx = &transaction{}
	tx.deleteTableNamed(probeTable)
	return s.commit(tx)
}
