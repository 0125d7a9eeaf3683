package pcp

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"

	"github.com/sluicegw/sluice/flow"
)

// TestQuota: who has too much is told so, and nothing of anybody is taken away.
func TestQuota(t *testing.T) {
	play(t, usual(), func(s *scene) {
		one, two := s.client("10.0.0.2"), s.client("10.0.0.3")
		first := two.must(success, wants{flow.UDP, 5000, 600, 1, nil}, "another host")
		for i := range uint16(4) {
			one.must(success, wants{flow.TCP, 5000 + i, 600, 1, nil}, "within the quota")
		}
		one.must(userExQuota, wants{flow.TCP, 5004, 600, 1, nil}, "one more")
		one.must(success, wants{flow.TCP, 5003, 600, 1, nil}, "one again")
		if again := two.must(success, wants{flow.UDP, 5000, 600, 1, nil}, "another host"); again != first || len(s.g.Open()) != 5 {
			t.Errorf("%v, was %v; open: %v", again, first, s.g.Open())
		}
		s.g.Quota = 5 // of the gateway, for all that a client has
		two.must(success, wants{flow.TCP, 5001, 600, 1, nil}, "within it")
		if c := s.s.Counters(); c.Quota != 1 || c.Mappings != 6 || c.Granted != 8 {
			t.Errorf("counters %+v", c)
		}
		s.g.Quota = 2
		two.must(userExQuota, wants{flow.TCP, 5002, 600, 1, nil}, "beyond it")
	})
}

// TestExhaustion: no port is free for anybody.
func TestExhaustion(t *testing.T) {
	play(t, usual(), func(s *scene) {
		s.g.Ports = 2
		one, two := s.client("10.0.0.2"), s.client("10.0.0.3")
		one.must(success, wants{flow.TCP, 5000, 600, 1, nil}, "the first port")
		one.must(success, wants{flow.TCP, 5001, 600, 1, nil}, "the last port")
		two.must(noResources, wants{flow.TCP, 5000, 600, 1, nil}, "none is left")
		if len(s.g.Open()) != 2 {
			t.Errorf("open: %v", s.g.Open())
		}
		one.must(success, wants{flow.TCP, 5001, 0, 1, nil}, "one is given back")
		two.must(success, wants{flow.TCP, 5000, 600, 1, nil}, "it is free")
		s.g.Refuse = errors.New("no")
		two.must(networkFailure, wants{flow.UDP, 5000, 600, 1, nil}, "the kernel refuses")
	})
}

// TestFlood: a host that asks without end does not keep the requests of others
// from being answered, nor does one with ever new addresses take all memory.
func TestFlood(t *testing.T) {
	play(t, usual(), func(s *scene) {
		one := s.client("10.0.0.2")
		near := netip.MustParseAddr("10.0.0.3")
		for s.s.workerOf(near) != s.s.workerOf(one.addr) {
			near = near.Next()
		}
		two := s.client(near.String())
		release := s.g.HoldKernel()
		ask := make([]byte, headerSize+mapSize)
		ask[0], ask[1] = version, opMap
		putAddress(ask[clientAt:], one.addr)
		ask[7], ask[headerSize+12], ask[headerSize+17], ask[headerSize+16] = 200, byte(flow.UDP), 1, 0x20
		for range 2 * backlog {
			if _, err := one.conn.WriteTo(ask, net.UDPAddrFromAddrPort(one.at)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		answer := make(chan []byte)
		go func() { answer <- two.ask([]byte{0, pmpAddress}) }()
		synctest.Wait()
		release()
		if a := <-answer; len(a) != 12 || a[3] != pmpSuccess {
			t.Errorf("answered %x", a)
		}
		if c := s.s.Counters(); c.Lost < backlog || c.Requests != 2*backlog+1 {
			t.Errorf("counters %+v", c)
		}
		if w := s.s.workerOf(one.addr); len(w.waiting) != 0 {
			t.Errorf("waiting: %v", w.waiting)
		}
		s.s.most = 3
		six, ten := s.client("fd00:a::6"), s.client("fd00:a::10")
		six.must(success, wants{flow.TCP, 5000, 600, 1, nil}, "one")
		six.must(success, wants{flow.TCP, 5001, 600, 1, nil}, "two")
		ten.must(noResources, wants{flow.TCP, 5000, 600, 1, nil}, "there are as many as may be")
		six.must(success, wants{flow.TCP, 5001, 600, 1, nil}, "one again")
	})
}
