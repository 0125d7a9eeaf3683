package userpath

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// echoServer is a filter that plays a server: it sends back what comes, and
// closes when the client has.
type echoServer struct{}

func (echoServer) Pump(_ context.Context, _ filterapi.Connection, in, out filterapi.Socket) error {
	if out != nil {
		return errors.New("there is an external socket")
	}
	for {
		b, err := in.Recv()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = in.Send(b)
		}
		if err != nil {
			return err
		}
	}
}

// emulatedJob is a takeover of which the last filter plays the server.
func (l *tcpLab) emulatedJob(from, to string, filters ...filterapi.DataFilter) (tcpJob, *recorder) {
	job, rec := l.job(from, to, engine.Dial{}, filters...)
	job.dial, job.emulated = engine.Dial{}, true
	return job, rec
}

func TestEmulatedServer(t *testing.T) {
	l := newTCPLab(t, nil)
	for _, c := range []struct {
		name, from, to string
		front          []filterapi.DataFilter
	}{
		{"IPv4", "10.0.0.2:40001", "203.0.113.10:8001", nil},
		{"IPv6", "[fd00:a::2]:40002", "[2001:db8:b::10]:8002", nil},
		{"behind others", "10.0.0.2:40003", "203.0.113.10:8003", []filterapi.DataFilter{passer{}, releaser{}, passer{}}},
		{"behind others IPv6", "[fd00:a::2]:40004", "[2001:db8:b::10]:8004", []filterapi.DataFilter{releaser{}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := l.listen(c.to)
			job, rec := l.emulatedJob(c.from, c.to, append(c.front, echoServer{})...)
			if p := l.takeOver(context.Background(), job); p != flow.User {
				t.Fatalf("path %v, %+v", p, rec.wait())
			}
			if n := rec.established.Load(); n != 0 {
				t.Errorf("established %d times before the client was there", n)
			}
			client, err := l.connect(job.tuple.Src, job.tuple.Dst)
			if err != nil {
				t.Fatal(err)
			}
			mustWrite(t, client, "question")
			mustRead(t, client, "question")
			if err := client.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			mustEnd(t, client, io.EOF)
			if e := rec.wait(); e.result != flow.Closed || e.counts != (flow.Counts{OutBytes: 8, InBytes: 8}) {
				t.Errorf("ended %+v", e)
			}
			if n := rec.established.Load(); n != 1 {
				t.Errorf("established %d times, want once", n)
			}
			if rec.name.IsValid() || rec.peer.IsValid() {
				t.Errorf("the external side is %v to %v, want none", rec.name, rec.peer)
			}
			server.SetDeadline(time.Now())
			if _, err := server.Accept(); !errors.Is(err, unix.ETIMEDOUT) && !isTimeout(err) {
				t.Errorf("the server was dialled: %v", err)
			}
		})
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// hears waits for what a filter says.
func hears(t *testing.T, said <-chan error, want error) {
	t.Helper()
	select {
	case err := <-said:
		if !errors.Is(err, want) {
			t.Fatalf("the filter heard %v, want %v", err, want)
		}
	case <-time.After(patience):
		t.Fatalf("the filter heard nothing, want %v", want)
	}
}

func TestEmulatedEnds(t *testing.T) {
	l := newTCPLab(t, nil)
	until := func(after func(in filterapi.Socket) error) filterapi.DataFilter {
		return pumpFunc(func(_ context.Context, in, _ filterapi.Socket) error {
			b, err := in.Recv()
			if err != nil {
				return err
			}
			b.Release()
			return after(in)
		})
	}
	heard := make(chan error, 1)
	for i, c := range []struct {
		name   string
		filter filterapi.DataFilter
		client func(*testing.T, *net.TCPConn, *recorder)
		result flow.Result
		reason string
	}{
		{"the filter resets", until(func(in filterapi.Socket) error { return in.Close(true) }), func(t *testing.T, c *net.TCPConn, _ *recorder) {
			mustEnd(t, c, unix.ECONNRESET)
		}, flow.Reset, ""},
		{"the filter closes", until(func(in filterapi.Socket) error { return in.Close(false) }), func(t *testing.T, c *net.TCPConn, _ *recorder) {
			mustEnd(t, c, io.EOF)
			c.Close()
		}, flow.Closed, ""},
		{"the filter fails", until(func(filterapi.Socket) error { return errors.New("no more") }), func(t *testing.T, c *net.TCPConn, _ *recorder) {
			mustEnd(t, c, unix.ECONNRESET)
		}, flow.Failed, "no more"},
		{"the filter releases", until(func(filterapi.Socket) error { return filterapi.ErrReleased }), func(t *testing.T, c *net.TCPConn, _ *recorder) {
			mustEnd(t, c, unix.ECONNRESET)
		}, flow.Failed, errNothingToRelease.Error()},
		{"the client resets", until(func(in filterapi.Socket) error {
			heard <- nil
			_, err := in.Recv()
			heard <- err
			return err
		}), func(t *testing.T, c *net.TCPConn, _ *recorder) {
			hears(t, heard, nil) // a reset takes away what nobody has received yet
			c.SetLinger(0)
			c.Close()
			hears(t, heard, unix.ECONNRESET)
		}, flow.Reset, ""},
		{"killed", until(func(in filterapi.Socket) error {
			_, err := in.Recv()
			return err
		}), func(t *testing.T, c *net.TCPConn, r *recorder) {
			close(r.kill)
			mustEnd(t, c, unix.ECONNRESET)
		}, flow.CutByPolicy, "killed"},
	} {
		for j, from := range []string{"10.0.0.2", "fd00:a::2"} {
			t.Run(c.name+" "+from, func(t *testing.T) {
				to := []string{"203.0.113.10:8005", "[2001:db8:b::10]:8005"}[j]
				src := netip.AddrPortFrom(netip.MustParseAddr(from), uint16(41000+i))
				job, rec := l.emulatedJob(src.String(), to, passer{}, c.filter)
				if p := l.takeOver(context.Background(), job); p != flow.User {
					t.Fatalf("path %v, %+v", p, rec.wait())
				}
				client, err := l.connect(job.tuple.Src, job.tuple.Dst)
				if err != nil {
					t.Fatal(err)
				}
				mustWrite(t, client, "x")
				c.client(t, client, rec)
				if e := rec.wait(); e.result != c.result || !strings.Contains(e.reason, c.reason) {
					t.Errorf("ended %+v, want %v %q", e, c.result, c.reason)
				}
			})
		}
	}
	t.Run("nobody emulates", func(t *testing.T) {
		job, rec := l.emulatedJob("10.0.0.2:42000", "203.0.113.10:8005")
		if p := l.takeOver(context.Background(), job); p != flow.Drop || rec.wait().result != flow.Failed {
			t.Errorf("path %v", p)
		}
	})
}

// originate dials a client from an address that is not the gateway's.
func (l *tcpLab) originate(ctx context.Context, from, to string, filters ...filterapi.DataFilter) (rec *recorder, err error) {
	job, rec := l.job(from, to, engine.Dial{}, filters...)
	job.dial.Source, job.dial.Transparent = job.tuple.Src, true
	l.gateway.must(l, func() error { err = l.tcp.originate(ctx, job); return nil })
	return rec, err
}

func TestOriginate(t *testing.T) {
	l := newTCPLab(t, nil)
	for _, c := range []struct{ name, from, to string }{
		{"IPv4", "198.51.100.7:5060", "10.0.0.2:6000"},
		{"IPv6", "[2001:db8:c::7]:5060", "[fd00:a::2]:6000"},
		{"from an address of the server's network", "203.0.113.10:20", "10.0.0.2:6001"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var ln net.Listener
			l.client.must(t, func() (err error) { ln, err = net.Listen("tcp", c.to); return err })
			defer ln.Close()
			rec, err := l.originate(context.Background(), c.from, c.to, passer{}, echoServer{})
			if err != nil {
				t.Fatal(err)
			}
			conn, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			client := conn.(*net.TCPConn)
			defer client.Close()
			if client.RemoteAddr().String() != c.from {
				t.Errorf("the client sees %v, want %s", client.RemoteAddr(), c.from)
			}
			mustWrite(t, client, "question")
			mustRead(t, client, "question")
			mustWrite(t, client, "more")
			mustRead(t, client, "more")
			client.CloseWrite()
			mustEnd(t, client, io.EOF)
			// The emulated peer is the initiator.
			if e := rec.wait(); e.result != flow.Closed || e.counts != (flow.Counts{OutBytes: 12, InBytes: 12}) {
				t.Errorf("ended %+v", e)
			}
			if n := rec.established.Load(); n != 1 || rec.peer.String() != c.to {
				t.Errorf("established %d times, to %v", n, rec.peer)
			}
		})
	}
	if n := l.tcp.Stats().Flows; n != 0 {
		t.Errorf("%d flows left", n)
	}
}

func TestOriginateFails(t *testing.T) {
	l := newTCPLab(t, nil)
	l.client.must(t, func() error {
		return runCommand("table inet t {\nchain c {\ntype filter hook input priority 0\ntcp dport 6666 drop\n}\n}\n", "nft", "-f", "-")
	})
	for _, c := range []struct {
		name, from, to string
		within         time.Duration
		want           error
		result         flow.Result
	}{
		{"refused", "198.51.100.7:5060", "10.0.0.2:6100", patience, unix.ECONNREFUSED, flow.Refused},
		{"refused IPv6", "[2001:db8:c::7]:5060", "[fd00:a::2]:6100", patience, unix.ECONNREFUSED, flow.Refused},
		{"silent", "198.51.100.7:5060", "10.0.0.2:6666", time.Second, unix.ETIMEDOUT, flow.TimedOut},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), c.within)
			defer cancel()
			rec, err := l.originate(ctx, c.from, c.to, echoServer{})
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if e := rec.wait(); e.result != c.result || rec.established.Load() != 0 {
				t.Errorf("ended %+v, established %d times", e, rec.established.Load())
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if rec, err := l.originate(ctx, "198.51.100.7:5061", "10.0.0.2:6666", echoServer{}); !errors.Is(err, context.Canceled) || rec.wait().result != flow.Failed {
			t.Errorf("%v, want cancelled", err)
		}
	})
	t.Run("no filter", func(t *testing.T) {
		if rec, err := l.originate(context.Background(), "198.51.100.7:5060", "10.0.0.2:6100"); err == nil || rec.wait().result != flow.Failed {
			t.Errorf("%v, want an error", err)
		}
	})
}

// An epoll instance that fails ends Run and every flow of its loop.
func TestBrokenLoopEndsItsFlows(t *testing.T) {
	tcp := newTestTCP(t)
	c := &carried{recorder: newRecorder(t)}
	c.client, c.initFD = tcpPair(t)
	c.server, c.farFD = tcpPair(t)
	f, err := tcp.begin(tcpJob{takeover: c.recorder, dialled: make(chan error, 1)}, -1, c.farFD)
	if err != nil {
		t.Fatal(err)
	}
	f.shaken = true
	f.dialEnds(nil) // the loop does not run yet
	if err := f.watchFar(); err != nil || !f.arrived(c.initFD) {
		t.Fatal(err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	if err := unix.Dup3(null, f.loop.epfd, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- tcp.Run(context.Background()) }()
	select {
	case err := <-ran:
		if !errors.Is(err, unix.EINVAL) {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(patience):
		t.Fatal("Run did not return")
	}
	if e := c.wait(); e.result != flow.CutByPolicy {
		t.Errorf("ended %+v", e)
	}
	mustEnd(t, c.client, unix.ECONNRESET)
	mustEnd(t, c.server, unix.ECONNRESET)
}

func newTestTCP(t *testing.T) *TCP {
	t.Helper()
	tcp, err := newTCP(TCPConfig{Log: zap.NewNop(), Loops: 2})
	if err != nil {
		t.Fatal(err)
	}
	return tcp
}
