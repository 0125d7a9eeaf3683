package userpath

import (
	"context"
	"net/netip"
	"sync"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// udpDuct is the data filters of a flow whose datagrams others receive and send:
// that of a client which asked the gateway for a socket. It implements
// engine.Duct.
type udpDuct struct {
	chain  *udpChain
	cancel context.CancelFunc
	over   chan struct{}

	once   sync.Once
	result flow.Result
	reason string
}

// udpOutlet is an end of a duct.
type udpOutlet func([]byte)

func (o udpOutlet) push(b *filterapi.Buffer) {
	o(b.Data)
	b.Release()
}

// shut does nothing: UDP has no way to say it.
func (udpOutlet) shut() {}

// Filter implements engine.User.
func (u *User) Filter(t *engine.Takeover, far netip.AddrPort, toClient, toPeer func([]byte)) engine.Duct {
	d := &udpDuct{over: make(chan struct{})}
	c := &udpChain{
		u: u.udp, links: t.Chain, conn: t.Conn, tuple: t.Tuple, far: far, buffer: t.Buffer, kill: t.Killed(),
		client: udpOutlet(toClient), end: d.end, empty: func() {},
	}
	if !t.Emulated {
		c.network = udpOutlet(toPeer)
	}
	c.ctx, d.cancel = context.WithCancel(context.Background())
	c.connect(t.Burst)
	d.chain = c
	c.start()
	return d
}

// end is the end that filters, or a kill, make.
func (d *udpDuct) end(r flow.Result, reason string) {
	d.once.Do(func() {
		d.result, d.reason = r, reason
		d.cancel()
		close(d.over)
	})
}

// FromClient implements engine.Duct.
func (d *udpDuct) FromClient(b []byte) { d.chain.enter(true, b) }

// FromPeer implements engine.Duct.
func (d *udpDuct) FromPeer(b []byte) { d.chain.enter(false, b) }

// Over implements engine.Duct.
func (d *udpDuct) Over() <-chan struct{} { return d.over }

// Close implements engine.Duct.
func (d *udpDuct) Close() (flow.Result, string) {
	d.end(flow.Closed, "")
	d.chain.wait()
	return d.result, d.reason
}
