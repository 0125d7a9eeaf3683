package userpath

import (
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
)

// BenchmarkUDPForward floods a server for a while by each way through the
// gateway, and reports how many datagrams arrive in a second.
func BenchmarkUDPForward(b *testing.B) {
	udpInLab(b, func(l *udpLab) {
		l.start(UDPConfig{})
		const lasts = 2 * time.Second
		port := 4000
		for _, size := range []int{100, 1400} {
			for _, way := range []string{"kernel", "translated", "routed", "filter"} {
				port++
				client, server := fmt.Sprintf("10.0.0.2:%d", port), fmt.Sprintf("203.0.113.10:%d", port)
				first := "ct mark set 0x06000000"
				switch way {
				case "kernel":
					first = "ct mark set 0x05000000"
				case "translated":
					l.take(client, server, "203.0.113.1:0")
				case "routed":
					l.take(client, server, client)
				case "filter":
					l.take(client, server, "203.0.113.1:0", udpLinkOf(&udpPlain{}))
				}
				udpShell(b, "nft", "delete table inet sluice")
				l.rules(first, l.u.Port())
				got := udpFlood(l, l.client.dial(client, server), l.server.listen(server), size, lasts)
				b.ReportMetric(float64(got)/lasts.Seconds(), fmt.Sprintf("%s-%d-pkt/s", way, size))
			}
		}
	})
}

// udpFlood sends as fast as it can and counts what arrives.
func udpFlood(l *udpLab, from, to *net.UDPConn, size int, lasts time.Duration) int64 {
	l.Helper()
	var got atomic.Int64
	received := make(chan struct{})
	raw, err := to.SyscallConn()
	if err != nil {
		l.Fatal(err)
	}
	go func() {
		defer close(received)
		batch := newUDPBatch()
		for {
			n := 0
			err := raw.Read(func(fd uintptr) bool {
				var err error
				n, err = batch.recv(int(fd))
				return err != unix.EAGAIN
			})
			if err != nil {
				return
			}
			got.Add(int64(n))
		}
	}()
	send, err := from.SyscallConn()
	if err != nil {
		l.Fatal(err)
	}
	var msgs [udpBatchLen]udpMmsg
	iov := unix.Iovec{Base: unsafe.SliceData(make([]byte, size))}
	iov.SetLen(size)
	for i := range msgs {
		msgs[i].hdr.Iov = &iov
		msgs[i].hdr.SetIovlen(1)
	}
	for end := time.Now().Add(lasts); time.Now().Before(end); {
		err := send.Control(func(fd uintptr) {
			_, _, _ = unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&msgs[0])), udpBatchLen, 0, 0, 0)
		})
		if err != nil {
			l.Fatal(err)
		}
	}
	n := got.Load()
	to.Close()
	<-received
	return n
}

// BenchmarkUDPRoundTrip is the latency of one question and its answer.
func BenchmarkUDPRoundTrip(b *testing.B) {
	udpInLab(b, func(l *udpLab) {
		l.start(UDPConfig{})
		const rounds = 20000
		for i, way := range []string{"kernel", "translated", "routed", "filter"} {
			client, server := fmt.Sprintf("10.0.0.2:%d", 4000+i), fmt.Sprintf("203.0.113.10:%d", 4000+i)
			first := "ct mark set 0x06000000"
			switch way {
			case "kernel":
				first = "ct mark set 0x05000000"
			case "translated":
				l.take(client, server, "203.0.113.1:0")
			case "routed":
				l.take(client, server, client)
			case "filter":
				l.take(client, server, "203.0.113.1:0", udpLinkOf(&udpPlain{}))
			}
			udpShell(b, "nft", "delete table inet sluice")
			l.rules(first, l.u.Port())
			c, s := l.client.listen(client), l.server.listen(server)
			go func() {
				buf := make([]byte, 2048)
				for {
					n, from, err := s.ReadFromUDPAddrPort(buf)
					if err != nil {
						return
					}
					_, _ = s.WriteToUDPAddrPort(buf[:n], from)
				}
			}()
			buf, to := make([]byte, 2048), netip.MustParseAddrPort(server)
			begun := time.Now()
			for range rounds {
				if _, err := c.WriteToUDPAddrPort(buf[:100], to); err != nil {
					b.Fatal(err)
				}
				if _, _, err := c.ReadFromUDPAddrPort(buf); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(time.Since(begun).Microseconds())/rounds, way+"-us/round")
			s.Close()
		}
	})
}

// BenchmarkUDPChain floods a server through each length of chain of
// pass-through filters, in turns that change their order.
func BenchmarkUDPChain(b *testing.B) {
	udpInLab(b, func(l *udpLab) {
		l.start(UDPConfig{})
		const rounds = 5
		port := 4000
		var rates, ratios [8][]float64
		for round := range rounds {
			var rate [8]float64
			for i := range benchChains {
				n := benchChains[(i+round)%len(benchChains)]
				port++
				client, server := fmt.Sprintf("10.0.0.2:%d", port), fmt.Sprintf("203.0.113.10:%d", port)
				var chain []engine.Link
				for range n {
					chain = append(chain, udpLinkOf(passer{}))
				}
				f := l.take(client, server, "203.0.113.1:0", chain...)
				got := udpFlood(l, l.client.dial(client, server), l.server.listen(server), 1400, benchTurn)
				close(f.kill)
				f.end()
				rate[n] = float64(got) / benchTurn.Seconds()
				rates[n] = append(rates[n], rate[n])
			}
			for _, n := range benchChains {
				ratios[n] = append(ratios[n], rate[n]/rate[0])
			}
		}
		for _, n := range benchChains {
			b.ReportMetric(middle(rates[n]), fmt.Sprintf("pkt/s-%d", n))
			b.ReportMetric(middle(ratios[n]), fmt.Sprintf("ratio-%d", n))
		}
	})
}
