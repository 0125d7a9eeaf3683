package kernelpath

import (
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Of linux/netfilter/nf_tables_compat.h.
const (
	msgCompatGet     = 0 // NFNL_MSG_COMPAT_GET
	attrCompatName   = 1
	attrCompatRev    = 2
	attrCompatType   = 3
	compatTypeTarget = 1
)

// xtQueue is the target that the xt form of the queue uses.
const (
	xtQueue         = "NFQUEUE"
	xtQueueRevision = 3
)

// wakeXTQueue makes the kernel load the module of xt NFQUEUE. A rule in the
// inet family would not: x_tables makes the module's name from the family and
// has no word for that one (xt_prefix in net/netfilter/x_tables.c). So it is
// asked about the target for IPv4, which changes nothing. Whether there is one
// shows when a rule is made, so the answer does not matter.
func (s *socket) wakeXTQueue() error {
	data, err := netlink.MarshalAttributes([]netlink.Attribute{
		attr(attrCompatName, text(xtQueue)), attr(attrCompatRev, be32(xtQueueRevision)), attr(attrCompatType, be32(compatTypeTarget)),
	})
	if err != nil {
		return err
	}
	s.seq++
	question := appendMessage(nil, unix.NFNL_SUBSYS_NFT_COMPAT<<8|msgCompatGet, unix.NLM_F_REQUEST|unix.NLM_F_ACK, s.seq, unix.NFPROTO_IPV4, 0, data)
	if err := s.send(question); err != nil {
		return fmt.Errorf("ask for xt %s: %w", xtQueue, err)
	}
	for {
		answers, err := s.receive()
		if err != nil {
			return fmt.Errorf("ask for xt %s: %w", xtQueue, err)
		}
		if slices.ContainsFunc(answers, func(a answer) bool { return a.seq == s.seq }) {
			return nil
		}
	}
}
