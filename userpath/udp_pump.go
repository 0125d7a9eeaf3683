package userpath

import (
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// udpPumpKey says which flows share an upstream socket.
type udpPumpKey struct {
	src         netip.AddrPort // the initiator's socket
	source      netip.AddrPort // where the upstream socket is bound
	transparent bool
	// alone and only are set when one flow has the socket for itself: the
	// address that its initiator sends to, and where that leads. The socket
	// is then connected.
	alone, only netip.AddrPort
}

// udpPump is the upstream socket of one initiator socket, with its peers.
type udpPump struct {
	u   *UDP
	key udpPumpKey
	id  int32

	refs  int   // flows; guarded by UDP.mu
	until int64 // UDP.now at which it closes if it has none; UDP.mu

	once   sync.Once
	sock   *udpSocket
	err    error
	poller *udpPoller

	mu    sync.RWMutex
	peers map[netip.AddrPort]*udpFlow // by the address upstream
}

func newUDPPump(u *UDP, key udpPumpKey) *udpPump {
	n := u.nextID.Add(1)
	return &udpPump{
		u: u, key: key, id: int32(n & 0x7fffffff),
		poller: u.pollers[n%uint64(len(u.pollers))],
		peers:  make(map[netip.AddrPort]*udpFlow),
	}
}

// lingers says whether the socket outlives its last peer. The next flow of a
// translated client then keeps its external port; where the socket has the
// client's own port there is nothing to keep.
func (p *udpPump) lingers() bool {
	return p.err == nil && !p.key.alone.IsValid()
}

// open opens the upstream socket, once.
//
// Its mark makes the table carry its flow on as the gateway's own: it gets the
// same mark in conntrack, on the routed path in a zone of its own, where it
// cannot clash with the client's datagrams that it repeats.
func (p *udpPump) open() error {
	p.once.Do(func() {
		p.sock, p.err = udpOpen(udpSpec{
			local: p.key.source, transparent: p.key.transparent,
			reuse: p.key.source.Port() != 0, lend: p.key.source.Port() == 0,
			mark: p.u.marks.Value(flow.Own), errors: true, remote: p.key.only,
			receive: udpSocketBuffer, send: udpSocketBuffer,
		})
		if p.err == nil {
			if p.err = p.poller.watch(p); p.err != nil {
				p.sock.close()
			}
		}
	})
	return p.err
}

func (p *udpPump) close() {
	p.once.Do(func() { p.err = os.ErrClosed })
	if p.err == nil {
		p.poller.forget(p)
		p.sock.close()
	}
}

func (p *udpPump) add(f *udpFlow) {
	p.mu.Lock()
	p.peers[f.dial.Target] = f
	p.mu.Unlock()
}

func (p *udpPump) remove(f *udpFlow) {
	p.mu.Lock()
	if p.peers[f.dial.Target] == f {
		delete(p.peers, f.dial.Target)
	}
	p.mu.Unlock()
}

func (p *udpPump) peer(from netip.AddrPort) *udpFlow {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.peers[from]
}

// arrived passes what came from upstream to the initiator, in the name of the
// peer that it came from.
func (p *udpPump) arrived(b *udpBatch, n int, out *udpOut) {
	now := p.u.now()
	var from netip.AddrPort
	var f *udpFlow
	for i := range n {
		if s := b.source(i); s != from {
			from, f = s, p.peer(s)
		}
		if f == nil {
			p.u.stats.unknownPeer.Add(1)
			continue
		}
		p.u.carry(f, udpInward, b.datagram(i), out, now)
	}
	out.flush()
}

// udpPoller waits for many upstream sockets at once with one goroutine and one
// set of buffers. It has an epoll of its own, level-triggered, because an
// error queue shows as EPOLLERR alone, which the runtime's poller takes for a
// descriptor that cannot be polled. The runtime's poller waits for the epoll.
type udpPoller struct {
	u    *UDP
	file *os.File
	raw  syscall.RawConn

	mu    sync.Mutex
	pumps map[int32]*udpPump
}

func newUDPPoller(u *UDP) (*udpPoller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make epoll pollable: %w", err)
	}
	p := &udpPoller{u: u, file: os.NewFile(uintptr(fd), "epoll"), pumps: make(map[int32]*udpPump)}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		p.file.Close()
		return nil, fmt.Errorf("wrap epoll: %w", err)
	}
	return p, nil
}

func (p *udpPoller) close() { _ = p.file.Close() }

func (p *udpPoller) watch(pump *udpPump) error {
	p.mu.Lock()
	p.pumps[pump.id] = pump
	p.mu.Unlock()
	var err error
	add := func(epoll, sock uintptr) {
		e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: pump.id}
		err = unix.EpollCtl(int(epoll), unix.EPOLL_CTL_ADD, int(sock), &e)
	}
	use := p.raw.Control(func(epoll uintptr) {
		if use := pump.sock.raw.Control(func(sock uintptr) { add(epoll, sock) }); use != nil {
			err = use
		}
	})
	if use != nil {
		err = use
	}
	if err != nil {
		p.forget(pump)
		return fmt.Errorf("watch upstream socket: %w", err)
	}
	return nil
}

// forget takes a pump out; closing its socket takes it out of the epoll.
func (p *udpPoller) forget(pump *udpPump) {
	p.mu.Lock()
	delete(p.pumps, pump.id)
	p.mu.Unlock()
}

// run reads until close.
func (p *udpPoller) run() error {
	batch, out := newUDPBatch(), newUDPOut(p.u)
	events := make([]unix.EpollEvent, 128)
	var n int
	var failed error
	ready := func(fd uintptr) bool {
		for {
			n, failed = unix.EpollWait(int(fd), events, 0)
			if failed != unix.EINTR {
				return n != 0
			}
		}
	}
	for {
		if err := p.raw.Read(ready); err != nil {
			return fmt.Errorf("wait for upstream sockets: %w", err)
		}
		if failed != nil {
			return fmt.Errorf("wait for upstream sockets: %w", failed)
		}
		for _, e := range events[:max(n, 0)] {
			p.mu.Lock()
			pump := p.pumps[e.Fd]
			p.mu.Unlock()
			if pump != nil {
				pump.readable(e.Events, batch, out)
			}
		}
	}
}

// readable takes one batch off the socket, and its errors. What is left shows
// up again, after the other sockets had their turn.
func (p *udpPump) readable(events uint32, batch *udpBatch, out *udpOut) {
	n := 0
	err := p.sock.raw.Control(func(fd uintptr) {
		if events&unix.EPOLLERR != 0 {
			p.errors(int(fd))
		}
		// An error here was an ICMP error, and the queue has told it.
		n, _ = batch.recv(int(fd))
	})
	if err == nil {
		p.arrived(batch, n, out)
	}
}
