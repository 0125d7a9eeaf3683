package main

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// flows are the flows of a load of datagrams.
type flows struct {
	// ends gives the k-th flow its ends; first is the load's first.
	ends func(first, k uint32) (client, server [4]byte, sport uint16)
	// warm: the first flow stands before the others begin.
	warm bool
	// window bounds the datagrams under way; 0: burstWindow.
	window int
}

var (
	// newFlows begins a flow with each datagram, and a client's socket with every
	// sixteenth.
	newFlows = flows{ends: func(_, k uint32) ([4]byte, [4]byte, uint16) { return ends(k) }}
	// oneFlow is the same for all.
	oneFlow = flows{ends: func(first, _ uint32) ([4]byte, [4]byte, uint16) { return ends(first) }}
	// oneKnownFlow is one that stands; the socket that carries it in user space
	// has room for as many datagrams.
	oneKnownFlow = flows{ends: oneFlow.ends, warm: true, window: 1024}
	// oneEndpoint is one socket of a client that sends to a new server each time.
	oneEndpoint = flows{warm: true, ends: func(first, k uint32) (client, server [4]byte, sport uint16) {
		client, server, sport = ends(first)
		server[2], server[3] = byte(k>>8), byte(k)
		return client, server, sport
	}}
	// newEndpoints begins each flow from a socket of its own.
	newEndpoints = flows{ends: func(_, k uint32) (client, server [4]byte, sport uint16) {
		client, server, sport = ends(k)
		client[3] = byte(k)
		return client, server, sport
	}}
)

// Bounds of the loads. The conntrack table holds a multiple of a burst.
const (
	burstFlows  = 25000 // UDP flows of one turn
	burstWindow = 2048  // datagrams under way: what a gateway's queues hold, not more
	// burstEndpoints is less, because every one has an external port until some
	// seconds after the turn.
	burstEndpoints = 1500
	connections    = 20000 // TCP connections of one turn
	inFlight       = 64    // TCP connections that are being made
	givenUp        = 2 * time.Second
	warmUp         = 100 * time.Millisecond
	sendmmsgMany   = 64
)

// amount is what a measurement has counted.
type amount struct {
	units float64 // bytes, connections, flows or packets
	time  time.Duration
}

func (a amount) rate() float64 { return a.units / a.time.Seconds() }

// throughput reads from a server that sends what it can, and counts the bytes
// after a warm-up. They are discarded in the kernel, tcp(7) MSG_TRUNC.
func throughput(l *lane, p path, length time.Duration) (amount, error) {
	return throughputUntil(l, p, length, func(float64) error { return nil })
}

// throughputUntil is throughput that has check look at the flow before it ends;
// total is all that has come of it, in bytes.
func throughputUntil(l *lane, p path, length time.Duration, check func(total float64) error) (a amount, err error) {
	err = inside(l.client, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		defer unix.Close(fd)
		src, dst := tcpFlow(l.next(1), p.port(bulk))
		if err := errors.Join(
			impatient(fd),
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
			unix.Bind(fd, src),
		); err != nil {
			return fmt.Errorf("prepare the socket: %w", err)
		}
		if err := unix.Connect(fd, dst); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		var total float64
		if a, total, err = receive(fd, length); err != nil {
			return err
		}
		return check(total)
	})
	return a, err
}

// receive counts what comes after a warm-up, and discards it in the kernel.
// total has the warm-up as well.
func receive(fd int, length time.Duration) (a amount, total float64, err error) {
	begun := time.Now()
	b := make([]byte, 1<<20)
	var from time.Time
	for {
		n, _, err := unix.Recvfrom(fd, b, unix.MSG_TRUNC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return a, total, fmt.Errorf("receive: %w", err)
		}
		if n == 0 {
			return a, total, errors.New("the flow ended early")
		}
		total += float64(n)
		now := time.Now()
		if from.IsZero() {
			if now.Sub(begun) >= warmUp {
				from = now
			}
			continue
		}
		a.units += float64(n)
		if a.time = now.Sub(from); a.time >= length {
			return a, total, nil
		}
	}
}

// tcpFlow gives the k-th flow its ends: no (destination, source port) comes
// twice among millions, as a NAT likes it.
func tcpFlow(k uint32, port uint16) (src, dst *unix.SockaddrInet4) {
	client, server, sport := ends(k)
	return &unix.SockaddrInet4{Addr: client, Port: int(sport)}, &unix.SockaddrInet4{Addr: server, Port: int(port)}
}

// ends spreads flows over 256 servers, 16 clients and the source ports that
// Linux clients choose from, ip(7) ip_local_port_range.
func ends(k uint32) (client, server [4]byte, sport uint16) {
	client, server = clientPrefix, serverPrefix
	server[3] = byte(k)
	client[3] = 1 + byte(k>>4)&15
	return client, server, 32768 + uint16(k>>8%28000)
}
