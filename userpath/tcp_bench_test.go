package userpath

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// BenchmarkConnections is connect, one request, one answer, close, through the
// rules and the listener, by eight clients. The takeover is called just before
// the client's connect: what the queue costs is not in it.
func BenchmarkConnections(b *testing.B) {
	l := newTCPLab(b, nil)
	ln := l.listen("203.0.113.10:8020")
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				buf := make([]byte, 64)
				if n, err := c.Read(buf); err == nil {
					c.Write(buf[:n])
				}
				c.Close()
			}()
		}
	}()
	const clients = 8
	todo := make(chan int, clients)
	var all sync.WaitGroup
	for range clients {
		all.Go(func() { l.clientLoop(todo) })
	}
	b.ResetTimer()
	for i := range b.N {
		todo <- i
	}
	close(todo)
	all.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conn/s")
}

func (l *tcpLab) clientLoop(todo <-chan int) {
	jobs, paths := make(chan tcpJob), make(chan flow.Path)
	go l.gateway.in(func() error {
		for j := range jobs {
			paths <- l.tcp.takeOverNow(context.Background(), j)
		}
		return nil
	})
	defer close(jobs)
	err := l.client.in(func() error {
		for i := range todo {
			from := fmt.Sprintf("10.0.0.2:%d", 10000+i%50000)
			job, rec := l.job(from, "203.0.113.10:8020", engine.Dial{Source: netip.MustParseAddrPort("203.0.113.1:0")})
			jobs <- job
			if p := <-paths; p != flow.User {
				return fmt.Errorf("path %v: %+v", p, rec.wait())
			}
			d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(job.tuple.Src), KeepAlive: -1}
			c, err := d.Dial("tcp", "203.0.113.10:8020")
			if err != nil {
				return err
			}
			c.Write([]byte("question"))
			if got, err := io.ReadAll(c); err != nil || len(got) != 8 {
				return fmt.Errorf("answer %q, %w", got, err)
			}
			c.Close()
			rec.wait()
		}
		return nil
	})
	if err != nil {
		l.Error(err)
	}
}
