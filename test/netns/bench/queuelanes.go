package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// firstRules queue the first packet of each flow to the ports of the judged
// path, and let the others pass by conntrack: what the baselines of the queue
// do, and no policy at all.
const firstRules = `
table ip queued {
	chain ask {
	}
	chain arrive {
		type filter hook prerouting priority -155
		ct state new meta l4proto { tcp, udp } th dport 5100-5199 goto ask
	}
	chain next {
		type filter hook prerouting priority -150
		meta mark MARK ct mark set meta mark
	}
}
`

// everyRules queue every packet, and take back those that have the mark.
const everyRules = `
table ip queued {
	chain ask {
	}
	chain arrive {
		type filter hook prerouting priority -155
		meta mark MARK accept
		meta l4proto { tcp, udp } th dport 5100-5199 goto ask
		meta l4proto { tcp, udp } th sport 5100-5199 goto ask
	}
}
`

// queueLane declares a lane with a masquerading router whose rules queue.
func (s *stand) queueLane(name, rules string, start func(*lane) error) *lane {
	return s.lane(name, func(l *lane) error {
		if err := s.startBare(l); err != nil {
			return err
		}
		if err := commandInput(strings.ReplaceAll(rules, "MARK", laneMarkText()), "ip", "netns", "exec", l.gw, "nft", "-f", "-"); err != nil {
			return err
		}
		if err := start(l); err != nil {
			return err
		}
		return enqueue(l.gw)
	})
}

// enqueue adds the rule that queues, in the form that every kernel has: nft's
// language has no word for it.
func enqueue(ns string) error {
	return inside(ns, func() error {
		c, err := nftables.New()
		if err != nil {
			return fmt.Errorf("open nf_tables: %w", err)
		}
		var info xt.Unknown // struct xt_NFQ_info_v3: first queue, number of queues, flags
		for _, v := range []uint16{laneQueue, laneQueues, 0, 0} {
			info = binary.NativeEndian.AppendUint16(info, v)
		}
		table := &nftables.Table{Name: "queued", Family: nftables.TableFamilyIPv4}
		c.AddRule(&nftables.Rule{
			Table: table, Chain: &nftables.Chain{Name: "ask", Table: table},
			Exprs: []expr.Any{&expr.Target{Name: "NFQUEUE", Rev: 3, Info: &info}},
		})
		if err := c.Flush(); err != nil {
			return fmt.Errorf("add the rule that queues: %w", err)
		}
		return nil
	})
}

// startC runs the program on libnetfilter_queue.
func (s *stand) startC(ctx context.Context, program string, more ...string) func(*lane) error {
	return func(l *lane) (err error) {
		args := append([]string{program, strconv.Itoa(laneQueue), strconv.Itoa(laneQueues), laneMarkText()}, more...)
		if l.daemon, err = start(l.gw, s.dir, nil, args...); err != nil {
			return err
		}
		return l.daemon.await(ctx, func([]byte) bool { return queuesTaken(l.gw) })
	}
}

// startRole runs this program itself.
func (s *stand) startRole(ctx context.Context, role string) func(*lane) error {
	return func(l *lane) error {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find this program: %w", err)
		}
		if l.daemon, err = start(l.gw, s.dir, nil, self, "-role", role); err != nil {
			return err
		}
		return l.daemon.await(ctx, func(log []byte) bool { return bytes.Contains(log, []byte("ready")) && queuesTaken(l.gw) })
	}
}

// queuesTaken says whether the queues of a lane have somebody who reads them.
func queuesTaken(ns string) bool {
	var text []byte
	err := inside(ns, func() (err error) {
		text, err = os.ReadFile(filepath.Join("/proc/thread-self/net/netfilter", "nfnetlink_queue"))
		return err
	})
	return err == nil && bytes.Count(text, []byte("\n")) == laneQueues
}
