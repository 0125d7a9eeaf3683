package engine

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// TestSessionsEndWhileEverythingBegins: flows, factories, sessions that filters
// hold and sockets begin and end while an administrator disconnects whatever
// there is. At the end nothing is left, every filter was detached as often as
// attached, and no flow of a disconnected session was left alone.
func TestSessionsEndWhileEverythingBegins(t *testing.T) {
	p := attaching(&probe{})
	b, _ := talkBench(t, p)
	var work sync.WaitGroup
	var stop atomic.Bool
	var refused atomic.Int32
	var port atomic.Uint32
	for range 3 {
		work.Go(func() { // a client
			for range 300 {
				first := syn(client, control)
				first.Src = netipPort(first.Src, uint16(1024+port.Add(1)))
				d := b.Decide(t.Context(), first)
				if d.Path == flow.Reject {
					refused.Add(1) // its session was disconnected while it was judged
					continue
				}
				if d.Takeover.flow.session.isCut() {
					select {
					case <-d.Takeover.Killed():
					case <-time.After(20 * time.Second):
						t.Error("a flow outlived its session")
					}
				}
				d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
			}
		})
	}
	work.Go(func() { // a filter
		for i := range 300 {
			open := p.fw.ClientSession
			if i%2 == 0 {
				open = func(a netip.Addr) (filterapi.Session, error) { return p.fw.PrivateSession(a, "") }
			}
			s, err := open(netip.MustParseAddr("10.0.0.2"))
			if err != nil {
				t.Error(err)
				return
			}
			act, err := s.SetDataFilterFactory(making(filterapi.ConnectTCP, webServer, "web"))
			if err != nil && !errors.Is(err, filterapi.ErrTerminating) && !errors.Is(err, filterapi.ErrQuota) {
				t.Error(err)
			}
			if err == nil && i%3 == 0 {
				_ = act.Cancel() // the session may have ended
			}
			conn, err := s.Network().Dial(t.Context(), flow.TCP, netip.AddrPort{}, netip.MustParseAddrPort(webServer))
			if err != nil && !errors.Is(err, filterapi.ErrTerminating) {
				t.Error(err)
			}
			if err == nil && i%5 == 0 {
				_ = conn.Close() // the session may have closed it
			}
			s.Close()
		}
	})
	admin := make(chan struct{})
	go func() {
		defer close(admin)
		for !stop.Load() {
			for _, s := range b.Sessions() {
				if err := b.Disconnect(t.Context(), s.ID, nil); err != nil && !errors.Is(err, filterapi.ErrNotFound) {
					t.Error(err)
				}
			}
		}
	}()
	work.Wait()
	stop.Store(true)
	<-admin
	b.calm()
	if refused.Load() == 900 {
		t.Error("every flow was refused")
	}
	if p.attached != p.detached || len(b.Sessions())+len(b.Flows())+len(b.factories.byClient) != 0 || !b.kernel.empty() {
		t.Errorf("left: attached %d, detached %d, sessions %+v, flows %v, factories %v, kernel %v",
			p.attached, p.detached, b.Sessions(), b.Flows(), b.factories.byClient, b.kernel.held)
	}
}
