package userpath

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// udpCopier is a data filter that carries datagrams in both directions and
// may change them.
type udpCopier struct {
	tag     string
	release string // the datagram after which it gives the flow back
	trouble string // the datagram that makes it panic
	fail    string // the datagram that makes it return an error
	seen    atomic.Int32
	addr    atomic.Value
	ended   chan error
}

var errUDPTest = errors.New("no more of this")

func udpLinkOf(f filterapi.DataFilter) engine.Link { return engine.Link{Filter: f, Name: "test"} }

func (f *udpCopier) Pump(_ context.Context, _ filterapi.Connection, internal, external filterapi.Socket) error {
	back := make(chan error, 1)
	go func() { back <- f.copy(external, internal, false) }()
	err := f.copy(internal, external, true)
	if !errors.Is(err, filterapi.ErrReleased) {
		<-back
	} else if f.ended != nil { // the other half ends when this has returned
		go func() { f.ended <- <-back }()
	}
	return err
}

func (f *udpCopier) copy(from, to filterapi.Socket, outward bool) error {
	for {
		b, err := from.Recv()
		if err != nil {
			return err
		}
		f.seen.Add(1)
		f.addr.Store(b.Addr)
		text := string(b.Data)
		if outward {
			b.Data = append([]byte(f.tag), b.Data...)
		} else {
			b.Data = append(b.Data, f.tag...)
		}
		switch text {
		case "":
		case f.trouble:
			panic("test")
		case f.fail:
			b.Release()
			return errUDPTest
		}
		if err := to.Send(b); err != nil {
			return err
		}
		if f.release != "" && text == f.release && outward {
			return filterapi.ErrReleased
		}
	}
}

func TestUDPChainBuffer(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		seen := l.server.echo(udpServer)
		for i, x := range []struct {
			buffer int
			passes bool
		}{{0, false}, {4096, false}, {8192, true}} {
			src := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), uint16(4000+i))
			c := l.client.listen(src.String())
			q := udpRequest{tuple: flow.Tuple{Proto: flow.UDP, Src: src, Dst: netip.MustParseAddrPort(udpServer)}, chain: []engine.Link{udpLinkOf(&udpCopier{})}, buffer: x.buffer}
			q.dial = engine.Dial{Proto: flow.UDP, Target: q.tuple.Dst}
			f := l.request(q)
			before := l.u.Stats().Oversize
			if x.passes {
				l.ask(c, udpServer, udpPattern(5000))
				l.saw(seen)
			} else if _, err := c.WriteToUDPAddrPort(udpPattern(5000), q.tuple.Dst); err != nil {
				t.Fatal(err)
			}
			l.ask(c, udpServer, udpPattern(4096)) // comes after it
			if s := l.saw(seen); len(s.data) != 4096 {
				t.Errorf("buffer %d: the server saw %d bytes", x.buffer, len(s.data))
			}
			if lost := l.u.Stats().Oversize - before; (lost == 0) != x.passes {
				t.Errorf("buffer %d: %d datagrams lost", x.buffer, lost)
			}
			close(f.kill)
			f.end()
		}
	})
}

func TestUDPChainOrder(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		seen := l.server.echo(udpServer)
		near, far := &udpCopier{tag: "N"}, &udpCopier{tag: "F"}
		c := l.client.listen("10.0.0.2:4000")
		l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0", udpLinkOf(near), udpLinkOf(far))
		if _, err := c.WriteToUDPAddrPort([]byte("x"), netip.MustParseAddrPort(udpServer)); err != nil {
			t.Fatal(err)
		}
		// The client's side is next to the client in both directions.
		if s := l.saw(seen); string(s.data) != "FNx" {
			t.Errorf("the server saw %q, want FNx", s.data)
		}
		if data, _ := l.read(c); string(data) != "FNxFN" {
			t.Errorf("the client saw %q, want FNxFN", data)
		}
		for _, f := range []*udpCopier{near, far} {
			if a := f.addr.Load(); a != netip.MustParseAddrPort(udpServer) {
				t.Errorf("the filter saw the peer %v", a)
			}
		}

		// An inbound flow: the initiator is on the external side.
		in := l.client.echo("10.0.0.2:6000")
		x := l.server.listen("203.0.113.10:5000")
		q := udpRequest{tuple: flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort("203.0.113.10:5000"), Dst: netip.MustParseAddrPort("10.0.0.2:6000")},
			chain: []engine.Link{udpLinkOf(near), udpLinkOf(far)}, external: true}
		q.dial = engine.Dial{Proto: flow.UDP, Target: q.tuple.Dst, Source: q.tuple.Src, Transparent: true}
		l.request(q)
		if _, err := x.WriteToUDPAddrPort([]byte("x"), q.tuple.Dst); err != nil {
			t.Fatal(err)
		}
		if s := l.saw(in); string(s.data) != "xFN" {
			t.Errorf("the client saw %q, want xFN", s.data)
		}
		if data, _ := l.read(x); string(data) != "FNxFN" {
			t.Errorf("the initiator saw %q, want FNxFN", data)
		}
		if a := near.addr.Load(); a != q.tuple.Src {
			t.Errorf("the filter saw the peer %v", a)
		}
	})
}

func TestUDPChainReleased(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		seen := l.server.echo(udpServer)
		early := &udpCopier{release: "go", ended: make(chan error, 1)}
		late := &udpCopier{release: "gone", ended: make(chan error, 1)}
		c := l.client.listen("10.0.0.2:4000")
		f := l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0", udpLinkOf(early), udpLinkOf(late))
		released := func(x *udpCopier, word string) {
			t.Helper()
			if _, err := c.WriteToUDPAddrPort([]byte(word), netip.MustParseAddrPort(udpServer)); err != nil {
				t.Fatal(err)
			}
			l.saw(seen)
			if data, _ := l.read(c); string(data) != word {
				t.Errorf("got %q, want %q", data, word)
			}
			if err := <-x.ended; !errors.Is(err, filterapi.ErrReleased) {
				t.Errorf("the filter's other half ended with %v", err)
			}
		}
		released(early, "go")
		for range 3 {
			l.ask(c, udpServer, []byte("through one"))
			l.saw(seen)
		}
		released(late, "gone")
		before := early.seen.Load() + late.seen.Load()
		flowOf := l.u.find(udpKey{netip.MustParseAddrPort("10.0.0.2:4000"), netip.MustParseAddrPort(udpServer)})
		flowOf.filters.done.Wait()
		l.ask(c, udpServer, udpPattern(20000))
		if flowOf.chain.Load() != nil || early.seen.Load()+late.seen.Load() != before {
			t.Error("the released chain still holds the flow")
		}
		close(f.kill)
		if e := f.end(); e.counts.OutPackets != 6 || e.counts.InPackets != 6 {
			t.Errorf("ended %+v", e)
		}
	})
}

// udpKeeper passes the client's first datagram and releases the flow with the
// answer in its hands, which it sends when it is told to.
type udpKeeper struct {
	now  chan struct{}
	sent chan error
}

func (f *udpKeeper) Pump(_ context.Context, _ filterapi.Connection, internal, external filterapi.Socket) error {
	b, err := internal.Recv()
	if err == nil {
		err = external.Send(b)
	}
	if err == nil {
		b, err = external.Recv()
	}
	if err != nil {
		return err
	}
	go func() {
		<-f.now
		f.sent <- errors.Join(internal.Send(b), internal.Shutdown(false))
	}()
	return filterapi.ErrReleased
}

func TestUDPReleaseWaitsForBuffers(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		seen := l.server.echo(udpServer)
		keeper := &udpKeeper{make(chan struct{}), make(chan error, 1)}
		c := l.client.listen("10.0.0.2:4000")
		l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0", udpLinkOf(keeper))
		for _, text := range []string{"one", "two"} {
			if _, err := c.WriteToUDPAddrPort([]byte(text), netip.MustParseAddrPort(udpServer)); err != nil {
				t.Fatal(err)
			}
			l.saw(seen)
		}
		inward := l.u.find(udpKey{netip.MustParseAddrPort("10.0.0.2:4000"), netip.MustParseAddrPort(udpServer)}).filters.inward[0]
		for end, waits := time.Now().Add(udpWaitLong), 0; waits == 0; runtime.Gosched() {
			inward.mu.Lock()
			waits = inward.n
			inward.mu.Unlock()
			if time.Now().After(end) {
				t.Fatal("the second answer does not wait behind the first")
			}
		}
		close(keeper.now)
		for _, want := range []string{"one", "two"} {
			if data, from := l.read(c); string(data) != want || from != netip.MustParseAddrPort(udpServer) {
				t.Errorf("got %q from %s, want %q", data, from, want)
			}
		}
		if err := <-keeper.sent; !errors.Is(err, filterapi.ErrReleased) {
			t.Errorf("Shutdown after the release: %v", err)
		}
		l.ask(c, udpServer, []byte("three"))
	})
}

func TestUDPChainPanicAndError(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		l.server.echo(udpServer)
		c := l.client.listen("10.0.0.2:4000")
		bystander := l.client.listen("10.0.0.2:4001")
		l.take("10.0.0.2:4001", udpServer, "203.0.113.1:0")
		for _, word := range []string{"panic", "error"} {
			f := l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0", udpLinkOf(&udpPlain{}), udpLinkOf(&udpFailing{word}))
			l.ask(c, udpServer, []byte("fine"))
			if _, err := c.WriteToUDPAddrPort([]byte(word), netip.MustParseAddrPort(udpServer)); err != nil {
				t.Fatal(err)
			}
			if e := f.end(); e.result != flow.Failed || !bytes.Contains([]byte(e.reason), []byte("filter test: ")) {
				t.Errorf("%s: ended %+v", word, e)
			}
			l.ask(bystander, udpServer, []byte("I live"))
		}
	})
}

// udpPlain passes datagrams on, with one goroutine for each direction.
type udpPlain struct{ udpCopier }

// udpFailing fails in its own goroutine at one datagram.
type udpFailing struct{ word string }

func (f *udpFailing) Pump(_ context.Context, _ filterapi.Connection, internal, external filterapi.Socket) error {
	go func() { _ = (&udpCopier{}).copy(external, internal, false) }()
	return (&udpCopier{trouble: udpOnly(f.word, "panic"), fail: udpOnly(f.word, "error")}).copy(internal, external, true)
}

func udpOnly(word, want string) string {
	if word == want {
		return word
	}
	return ""
}

// A filter that pauses keeps a burst of 64 KiB and no more than its bounds.
func TestUDPChainBurst(t *testing.T) {
	u := &UDP{}
	for _, size := range []int{16, 160, 1400, 4096} {
		link := newUDPLink(u, filterapi.DefaultDatagramBuffer, false)
		for range udpBurstBytes / size {
			link.push(filterapi.NewBuffer(make([]byte, size), nil))
		}
		if n := u.stats.linkFull.Load(); n != 0 {
			t.Fatalf("size %d: %d datagrams lost of a burst of 64 KiB", size, n)
		}
		link.push(filterapi.NewBuffer(make([]byte, 4096), nil))
		if n := u.stats.linkFull.Swap(0); n != 1 {
			t.Errorf("size %d: the link is not bounded", size)
		}
		for range udpBurstBytes / size {
			if b, err := link.recv(t.Context(), nil); err != nil || len(b.Data) != size {
				t.Fatalf("size %d: %v, %v", size, b, err)
			}
		}
		if link.bytes != 0 {
			t.Errorf("size %d: %d bytes in an empty link", size, link.bytes)
		}
	}
}
