package userpath

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// dialTable has the dials under way under an address that is not the
// gateway's. When the gateway itself cannot reach the next hop, the kernel
// sends the ICMP error to that address, past the socket that it is meant for.
type dialTable struct {
	mu sync.Mutex
	m  map[flow.Tuple]*tcpFlow
}

// enter has a dial hear such an error. One under the gateway's own address
// hears it by its socket.
func (d *dialTable) enter(f *tcpFlow) {
	if !f.job.dial.Transparent {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.m == nil {
		d.m = make(map[flow.Tuple]*tcpFlow)
	}
	d.m[dialTuple(f.job.dial)] = f
}

func (d *dialTable) leave(f *tcpFlow) {
	if !f.job.dial.Transparent {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := dialTuple(f.job.dial); d.m[t] == f {
		delete(d.m, t)
	}
}

func dialTuple(d engine.Dial) flow.Tuple {
	return flow.Tuple{Proto: d.Proto, Src: d.Source, Dst: d.Target}
}

// pathErrors is what connect would have said.
var pathErrors = map[flow.Path]error{
	flow.HostUnreachable: unix.EHOSTUNREACH,
	flow.NetUnreachable:  unix.ENETUNREACH,
	flow.PortUnreachable: unix.ECONNREFUSED,
	flow.Reject:          unix.EACCES,
}

// Unreachable takes the word of an ICMP error that the gateway has sent
// itself, about a packet with this tuple. Safe for concurrent use; it does not
// block.
func (t *TCP) Unreachable(quoted flow.Tuple, told flow.Path) {
	t.asIfs.mu.Lock()
	defer t.asIfs.mu.Unlock()
	if f := t.asIfs.m[quoted]; f != nil {
		f.loop.post(func() { f.dialEnds(pathErrors[told]) })
	}
}
