package userpath

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// connPair is a connection with both ends as the runtime has them.
func connPair(tb testing.TB) (out, in *net.TCPConn) {
	tb.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// joints are the two ways in which a client's connection comes last, with and
// without a data filter: what the far side sees, and who has to carry.
func joints(t *testing.T, tcp *TCP, run func(t *testing.T, j engine.Joint, far *net.TCPConn, rec *recorder)) {
	for name, filters := range map[string][]engine.Link{"spliced": nil, "filtered": {{Filter: passer{}, Name: "passer"}}} {
		t.Run("connect, "+name, func(t *testing.T) {
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			rec := newRecorder(t)
			at := netip.MustParseAddrPort(l.Addr().String())
			j, err := tcp.connect(t.Context(), tcpJob{takeover: rec, chain: filters, dial: engine.Dial{Proto: flow.TCP, Target: at}})
			if err != nil {
				t.Fatal(err)
			}
			far, err := l.Accept()
			if err != nil || rec.peer != at || rec.name.String() != far.RemoteAddr().String() {
				t.Fatalf("connected %v to %v, %v", rec.name, rec.peer, err)
			}
			defer far.Close()
			run(t, j, far.(*net.TCPConn), rec)
		})
		t.Run("receive, "+name, func(t *testing.T) {
			far, near := connPair(t)
			rec := newRecorder(t)
			j, err := tcp.receive(tcpJob{takeover: rec, chain: filters, initiatorExternal: true}, near)
			if err != nil {
				t.Fatal(err)
			}
			run(t, j, far, rec)
		})
	}
}

// What the far side said before the client's end came is not lost, and the flow
// ends as any.
func TestJoint(t *testing.T) {
	joints(t, runTCP(t, nil), func(t *testing.T, j engine.Joint, far *net.TCPConn, rec *recorder) {
		mustWrite(t, far, "early")
		client, own := connPair(t)
		mustWrite(t, client, "the client, too")
		if err := j.Carry(own); err != nil {
			t.Fatal(err)
		}
		mustRead(t, client, "early")
		mustRead(t, far, "the client, too")
		if _, err := own.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("its former owner writes: %v", err)
		}
		_, again := connPair(t)
		if err := j.Carry(again); !errors.Is(err, filterapi.ErrInvalidArgument) {
			t.Errorf("a second connection: %v", err)
		}
		j.Close() // nothing: it is carried
		client.CloseWrite()
		mustEnd(t, far, io.EOF)
		mustWrite(t, far, "goes on")
		mustRead(t, client, "goes on")
		far.Close()
		mustEnd(t, client, io.EOF)
		if e := rec.wait(); e.result != flow.Closed || rec.established.Load() != 1 {
			t.Errorf("ended %+v, established %d times", e, rec.established.Load())
		}
	})
}

// A client that never comes, one that is no connection, and a kill.
func TestJointEnds(t *testing.T) {
	tcp := runTCP(t, func(c *TCPConfig) { c.WaitForInitiator = time.Second })
	joints(t, tcp, func(t *testing.T, j engine.Joint, far *net.TCPConn, rec *recorder) {
		a, b := net.Pipe()
		defer a.Close()
		if err := j.Carry(b); !errors.Is(err, filterapi.ErrInvalidArgument) {
			t.Errorf("a pipe: %v", err)
		}
		mustEnd(t, far, unix.ECONNRESET)
		if e := rec.wait(); e.result != flow.TimedOut {
			t.Errorf("ended %+v", e)
		}
		_, own := connPair(t)
		if err := j.Carry(own); !errors.Is(err, filterapi.ErrTerminating) {
			t.Errorf("carried when it is over: %v", err)
		}
	})
	joints(t, tcp, func(t *testing.T, j engine.Joint, far *net.TCPConn, rec *recorder) {
		j.Close()
		mustEnd(t, far, unix.ECONNRESET)
		if e := rec.wait(); e.result != flow.Failed {
			t.Errorf("ended %+v", e)
		}
	})
	joints(t, tcp, func(t *testing.T, j engine.Joint, far *net.TCPConn, rec *recorder) {
		client, own := connPair(t)
		if err := j.Carry(own); err != nil {
			t.Fatal(err)
		}
		close(rec.kill)
		mustEnd(t, far, unix.ECONNRESET)
		mustEnd(t, client, unix.ECONNRESET)
		if e := rec.wait(); e.result != flow.CutByPolicy {
			t.Errorf("ended %+v", e)
		}
	})
}

func TestJointRefused(t *testing.T) {
	tcp := runTCP(t, nil)
	_, near := connPair(t)
	free := netip.MustParseAddrPort(near.LocalAddr().String()) // whose listener is closed
	rec := newRecorder(t)
	if _, err := tcp.connect(context.Background(), tcpJob{takeover: rec, dial: engine.Dial{Proto: flow.TCP, Target: free}}); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	if e := rec.wait(); e.result != flow.Refused {
		t.Errorf("ended %+v", e)
	}
}
