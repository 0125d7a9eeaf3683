package userpath

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
)

// What filters pass on of a burst arrives as it was sent, and is counted.
func TestUDPFiltersPassABurst(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		const n = 40 // their links hold as many
		port := 4000
		for name, length := range map[string]func(i int) int{
			"of one length":     func(int) int { return 1400 },
			"now and then less": func(i int) int { return 200 - i%9/8*150 },
			"of all lengths":    func(i int) int { return 1 + i*37%1400 },
			"now and then none": func(i int) int { return 50 * min(1, i%7) },
		} {
			for _, filters := range []int{1, 3} {
				port++
				client, server := fmt.Sprintf("10.0.0.2:%d", port), fmt.Sprintf("203.0.113.10:%d", port)
				var chain []engine.Link
				for range filters {
					chain = append(chain, udpLinkOf(passer{}))
				}
				f := l.take(client, server, "203.0.113.1:0", chain...)
				c, s := l.client.dial(client, server), l.server.listen(server)
				sum := 0
				for i := range n {
					if _, err := c.Write(bytes.Repeat([]byte{byte(i)}, length(i))); err != nil {
						l.Fatal(err)
					}
					sum += length(i)
				}
				buf := make([]byte, 2048)
				for i := range n {
					_ = s.SetReadDeadline(time.Now().Add(udpWaitLong))
					got, err := s.Read(buf)
					if err != nil || !bytes.Equal(buf[:got], bytes.Repeat([]byte{byte(i)}, length(i))) {
						l.Fatalf("%s through %d: datagram %d has %d bytes, %v; want %d", name, filters, i, got, err, length(i))
					}
				}
				close(f.kill)
				if e := f.end(); e.counts.OutPackets != n || e.counts.OutBytes != uint64(sum) {
					l.Errorf("%s through %d: counted %+v, want %d datagrams of %d bytes together", name, filters, e.counts, n, sum)
				}
			}
		}
	})
}

// udpFirstOnly passes one datagram on while others wait, and then does not come
// back for them.
type udpFirstOnly struct {
	begin chan struct{}
	then  func(context.Context) error
}

func (f *udpFirstOnly) Pump(ctx context.Context, _ filterapi.Connection, internal, external filterapi.Socket) error {
	<-f.begin
	b, err := internal.Recv()
	if err == nil {
		err = external.Send(b)
	}
	if err != nil {
		return err
	}
	return f.then(ctx)
}

// What a filter has sent leaves, whatever the filter does next.
func TestUDPSentLeavesWithoutTheNext(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		port := 4000
		for name, c := range map[string]struct {
			then func(context.Context) error
			want []string
		}{
			"it waits":       {func(ctx context.Context) error { <-ctx.Done(); return nil }, []string{"one"}},
			"it is done":     {func(context.Context) error { return nil }, []string{"one"}},
			"it fails":       {func(context.Context) error { return errUDPTest }, []string{"one"}},
			"it releases it": {func(context.Context) error { return filterapi.ErrReleased }, []string{"one", "two", "three"}},
		} {
			port++
			client, server := fmt.Sprintf("10.0.0.2:%d", port), fmt.Sprintf("203.0.113.10:%d", port)
			seen := l.server.echo(server)
			filter := &udpFirstOnly{make(chan struct{}), c.then}
			l.take(client, server, "203.0.113.1:0", udpLinkOf(filter))
			from := l.client.dial(client, server)
			for _, text := range []string{"one", "two", "three"} {
				if _, err := from.Write([]byte(text)); err != nil {
					l.Fatal(err)
				}
			}
			link := l.u.find(udpKey{netip.MustParseAddrPort(client), netip.MustParseAddrPort(server)}).filters.outward[0]
			for end, waits := time.Now().Add(udpWaitLong), 0; waits < 3; runtime.Gosched() {
				link.mu.Lock()
				waits = link.n
				link.mu.Unlock()
				if time.Now().After(end) {
					l.Fatalf("%s: %d datagrams wait", name, waits)
				}
			}
			close(filter.begin)
			for _, want := range c.want {
				if got := string(l.saw(seen).data); got != want {
					l.Errorf("%s: %q arrived, want %q", name, got, want)
				}
			}
		}
	})
}

// trailing sends two datagrams for each: the second one when the first one's
// buffer is released.
type trailing struct{}

func (trailing) Pump(_ context.Context, _ filterapi.Connection, in, out filterapi.Socket) error {
	for {
		b, err := in.Recv()
		if err != nil {
			return err
		}
		line := bytes.Clone(b.Data)
		err = out.Send(filterapi.NewBuffer(line, func(*filterapi.Buffer) {
			_ = out.Send(filterapi.NewBuffer([]byte("trailer"), nil))
		}))
		b.Release()
		if err != nil {
			return err
		}
	}
}

// A filter may send while its buffer is released.
func TestUDPReleaseMaySend(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		client, server := "10.0.0.2:4001", "203.0.113.10:4001"
		l.take(client, server, "203.0.113.1:0", udpLinkOf(trailing{}))
		c, s := l.client.dial(client, server), l.server.listen(server)
		fmt.Fprint(c, "one")
		for _, want := range []string{"one", "trailer"} {
			got := make([]byte, 100)
			if err := s.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				l.Fatal(err)
			}
			if n, err := s.Read(got); err != nil || string(got[:n]) != want {
				l.Fatalf("%q, %v; want %q", got[:n], err, want)
			}
		}
	})
}

// throwing panics when its buffer is released, which it sends while another
// datagram waits for it.
type throwing struct{ two chan struct{} }

func (f throwing) Pump(ctx context.Context, _ filterapi.Connection, in, out filterapi.Socket) error {
	<-f.two
	if _, err := in.Recv(); err != nil {
		return err
	}
	if err := out.Send(filterapi.NewBuffer([]byte("x"), func(*filterapi.Buffer) { panic("broken") })); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// A filter whose buffer's release panics ends its flow and nothing else.
func TestUDPReleasePanics(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		client, server := "10.0.0.2:4001", "203.0.113.10:4001"
		filter := throwing{make(chan struct{})}
		f := l.take(client, server, "203.0.113.1:0", udpLinkOf(filter))
		c := l.client.dial(client, server)
		fmt.Fprint(c, "one")
		fmt.Fprint(c, "two")
		close(filter.two)
		<-f.ended
	})
}
