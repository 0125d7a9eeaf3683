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
	m  map[flow.Tuple]chan error
}

// enter gives where such an error will be heard; nil for a dial under the
// gateway's own address, whose socket hears it.
func (d *dialTable) enter(dial engine.Dial) <-chan error {
	if !dial.Transparent {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.m == nil {
		d.m = make(map[flow.Tuple]chan error)
	}
	c := make(chan error, 1)
	d.m[dialTuple(dial)] = c
	return c
}

func (d *dialTable) leave(dial engine.Dial, c <-chan error) {
	if c == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := dialTuple(dial); d.m[t] == c {
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
	if c := t.asIfs.m[quoted]; c != nil {
		select {
		case c <- pathErrors[told]:
		default: // one is enough
		}
	}
}
