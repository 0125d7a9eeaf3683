package userpath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// benchWindow is how many first packets may be on their way at a time: less
// than the queue's length, or the kernel would drop what is to be counted.
const benchWindow = 512

// benchPorts is how many flows go to one server port: masquerade has no more
// source ports than that for one.
const benchPorts = 50000

// BenchmarkQueueUDP measures new UDP flows through the queue with a decision
// that costs nothing: what remains is the price of the queue. cpu-us/op is
// user and system time of everything but the sender; the kernel's work on an
// accepted packet is in it, because it is done inside the verdict.
//
//	go test ./userpath -run '^$' -bench QueueUDP -benchtime 150000x   (as root)
func BenchmarkQueueUDP(b *testing.B) {
	benchmarkQueue(b, QueueConfig{Decide: always(flow.Kernel)}, benchWindow, fillUDP, 20+8+4)
}

// BenchmarkQueueUDPNow is the same with a decision where the packet is read,
// which is how flows that no filter hears of are decided. The target is no
// allocation: what B/op remains is the sender's and the harness's.
func BenchmarkQueueUDPNow(b *testing.B) {
	now := func(flow.Packet) (flow.Path, bool) { return flow.Kernel, true }
	benchmarkQueue(b, QueueConfig{Decide: always(flow.Kernel), DecideNow: now}, benchWindow, fillUDP, 20+8+4)
}

// BenchmarkQueueAlone is one UDP flow at a time: nothing is coalesced, every
// goroutine is woken. ns/op is how long a first packet takes.
func BenchmarkQueueAlone(b *testing.B) {
	benchmarkQueue(b, QueueConfig{Decide: always(flow.Kernel)}, 0, fillUDP, 20+8+4)
}

func fillUDP(p []byte, n int) {
	p[9] = byte(flow.UDP)
	binary.BigEndian.PutUint16(p[22:], uint16(7000+n/benchPorts))
	binary.BigEndian.PutUint16(p[24:], 8+4)
}

// BenchmarkQueueTCP is the same for SYNs, which nobody answers.
func BenchmarkQueueTCP(b *testing.B) {
	benchmarkQueue(b, QueueConfig{Decide: always(flow.Kernel)}, benchWindow, func(p []byte, n int) {
		p[9] = byte(flow.TCP)
		binary.BigEndian.PutUint16(p[22:], uint16(8000+n/benchPorts))
		binary.BigEndian.PutUint32(p[24:], uint32(n))
		p[32], p[33] = 5<<4, flow.FlagSYN
		binary.BigEndian.PutUint16(p[34:], 65535)
		binary.BigEndian.PutUint16(p[36:], 0)
		binary.BigEndian.PutUint16(p[36:], tcpChecksum(p))
	}, 20+20)
}

// tcpChecksum is RFC 9293, 3.1; conntrack does not follow a SYN without it.
func tcpChecksum(p []byte) uint16 {
	sum := uint32(flow.TCP) + uint32(len(p)-20)
	for i := 12; i < len(p); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	sum = sum>>16 + sum&0xffff
	return ^uint16(sum>>16 + sum)
}

func benchmarkQueue(b *testing.B, c QueueConfig, window int, fill func(packet []byte, n int), size int) {
	l := newQueueLab(b, false)
	l.gw.must(b, func() error {
		// Flows are forwarded and translated into a bridge without ports.
		return runCommand("", "sh", "-c", `set -e
			ip link add sink type bridge; ip link set sink up; ip addr add 10.9.0.1/24 dev sink
			ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev sink
			sysctl -qw net.ipv4.ip_forward=1
			nft 'add table ip masq; add chain ip masq out { type nat hook postrouting priority 100; }; add rule ip masq out oif sink masquerade'`)
	})
	l.client.must(b, func() error { return runCommand("", "ip", "route", "add", "10.9.0.0/24", "via", "10.0.0.1") })
	c.FirstHolding, c.NumberHolding = labHolding, 1
	l.start(c)
	var before, after, sender unix.Rusage
	b.ReportAllocs()
	b.ResetTimer()
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		b.Fatal(err)
	}
	l.client.must(b, func() error {
		if err := l.flood(b.N, window, fill, size); err != nil {
			return err
		}
		return unix.Getrusage(unix.RUSAGE_THREAD, &sender)
	})
	l.eventually("every flow was released", func() bool { return l.q.Stats().Decisions == uint64(b.N) && l.q.Stats().Flows == 0 })
	if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	us := func(u unix.Timeval) float64 { return float64(u.Nano()) / 1e3 / float64(b.N) }
	user := us(after.Utime) - us(before.Utime) - us(sender.Utime)
	system := us(after.Stime) - us(before.Stime) - us(sender.Stime)
	b.ReportMetric(user, "user-us/op")
	b.ReportMetric(user+system, "cpu-us/op")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "flows/s")
	l.gw.must(b, func() error { // each flow is in conntrack, or the figure would lie
		return runCommand("", "sh", "-c", fmt.Sprintf("test $(conntrack -C) -ge %d", b.N))
	})
	if s := l.q.Stats(); s.Packets-s.Requeued != uint64(b.N) || s.Dropped != 0 || s.Gone+s.Unsent+s.Late != 0 {
		b.Errorf("%d flows sent: %+v", b.N, s)
	}
}

// flood sends first packets of n flows, as fast as they are judged.
func (l *queueLab) flood(n, window int, fill func([]byte, int), size int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrInet4{Addr: netip.MustParseAddr("10.9.0.2").As4()}
	p := make([]byte, size)
	p[0], p[8] = 0x45, 64
	copy(p[16:], to.Addr[:])
	for i := range n {
		copy(p[12:], []byte{10, 0, 0, byte(2 + i/benchPorts%250)})
		binary.BigEndian.PutUint16(p[20:], uint16(1024+i%benchPorts))
		fill(p, i)
		if err := unix.Sendto(fd, p, 0, to); err != nil {
			return os.NewSyscallError("sendto", err)
		}
		for i-int(l.q.count.decisions.Load()) >= window {
			if window > 0 {
				time.Sleep(50 * time.Microsecond)
			} else {
				runtime.Gosched()
			}
		}
	}
	return nil
}
