package userpath

import (
	"errors"
	"fmt"
	"net/netip"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// udpListener is where TPROXY hands in the datagrams of one family.
type udpListener struct {
	u    *UDP
	sock *udpSocket
}

// udpListenTries is how many free ports of one family are tried for the other.
const udpListenTries = 16

// udpListen opens both listeners on one port. A host without IPv6 has one.
func udpListen(u *UDP, port uint16) ([]*udpListener, error) {
	var failed error
	for range udpListenTries {
		four, err := udpOpenListener(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port))
		if err != nil {
			return nil, err
		}
		six, err := udpOpenListener(netip.AddrPortFrom(netip.IPv6Loopback(), four.local.Port()))
		switch {
		case err == nil:
			return []*udpListener{{u, four}, {u, six}}, nil
		case udpNoFamily(err):
			u.log.Warn("no IPv6 here: UDP is taken over for IPv4 only", zap.Error(err))
			return []*udpListener{{u, four}}, nil
		}
		four.close()
		failed = err
		if port != 0 || !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return nil, failed
}

func udpOpenListener(at netip.AddrPort) (*udpSocket, error) {
	return udpOpen(udpSpec{
		local: at, transparent: true, original: true, receive: udpListenerBuffer, polled: true,
	})
}

func (u *UDP) listens(is4 bool) bool {
	for _, l := range u.listeners {
		if l.sock.local.Addr().Is4() == is4 {
			return true
		}
	}
	return false
}

// run reads until the socket is closed.
func (l *udpListener) run() error {
	batch, out := newUDPBatch(), newUDPOut(l.u)
	n := 0
	ready := func(fd uintptr) bool {
		var err error
		n, err = batch.recv(int(fd))
		return !errors.Is(err, unix.EAGAIN)
	}
	for {
		if err := l.sock.raw.Read(ready); err != nil {
			return fmt.Errorf("read UDP listener: %w", err)
		}
		l.arrived(batch, n, out)
	}
}

// arrived passes a batch on. The flows of all its datagrams are looked up
// under one lock.
func (l *udpListener) arrived(b *udpBatch, n int, out *udpOut) {
	u := l.u
	var keys [udpBatchLen]udpKey
	var flows [udpBatchLen]*udpFlow
	u.mu.RLock()
	for i := range n {
		keys[i] = udpKey{b.source(i), b.original(i)}
		if i > 0 && keys[i] == keys[i-1] {
			flows[i] = flows[i-1]
			continue
		}
		flows[i] = u.flows[keys[i]]
	}
	u.mu.RUnlock()
	now := u.now()
	for i := range n {
		if flows[i] != nil {
			u.carry(flows[i], udpOutward, b.datagram(i), out, now)
			continue
		}
		l.stray(keys[i], b.datagram(i))
	}
	out.flush()
}

// stray is a datagram without a flow. One that was sent to the listener itself
// did not come through TPROXY.
func (l *udpListener) stray(key udpKey, data []byte) {
	if !key.dst.IsValid() || key.dst == l.sock.local {
		l.u.stats.noFlow.Add(1)
		return
	}
	l.u.asks.ask(key, data)
}
