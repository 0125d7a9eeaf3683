package userpath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filters/ftp"
	"github.com/sluicegw/sluice/flow"
)

// decider passes bytes on and releases the flow when the client says "enough",
// while its other goroutine waits for the server.
type decider struct{ waited chan error }

func (d decider) Pump(_ context.Context, _ filterapi.Connection, in, out filterapi.Socket) error {
	pass := func(to, from filterapi.Socket) error {
		for {
			b, err := from.Recv()
			if err != nil {
				return err
			}
			enough := string(b.Data) == "enough"
			if err := to.Send(b); err != nil {
				return err
			}
			if enough {
				return filterapi.ErrReleased
			}
		}
	}
	go func() { d.waited <- errors.Join(pass(in, out), out.Shutdown(false), in.Close(true)) }()
	return pass(out, in)
}

// The Recv that waits for a silent server is called off before the server says
// anything more, and takes nothing of it.
func TestReleaseCallsAWaitingRecvOff(t *testing.T) {
	for _, others := range [][]filterapi.DataFilter{{}, {releaser{}}, {passer{}}} {
		for _, outside := range []bool{false, true} {
			d := decider{make(chan error, 1)}
			c := carry(t, runTCP(t, nil), outside, append(others, d)...)
			client, server := c.client, c.server
			if outside {
				client, server = server, client
			}
			mustWrite(t, server, "220")
			mustRead(t, client, "220")
			mustWrite(t, client, "enough")
			mustRead(t, server, "enough")
			select {
			case err := <-d.waited:
				if !errors.Is(err, filterapi.ErrReleased) {
					t.Fatalf("the Recv that waited: %v", err)
				}
			case <-time.After(patience):
				t.Fatal("the Recv still waits")
			}
			for i := range 3 {
				text := fmt.Sprint("after ", i)
				mustWrite(t, server, text)
				mustRead(t, client, text)
				mustWrite(t, client, text)
				mustRead(t, server, text)
			}
			server.CloseWrite()
			mustEnd(t, client, io.EOF)
			client.CloseWrite()
			mustEnd(t, server, io.EOF)
			if e := c.wait(); e.result != flow.Closed || e.counts.InBytes+e.counts.OutBytes != 3+6+2*3*7 {
				t.Errorf("ended %+v", e)
			}
		}
	}
}

// What a filter had in its hands comes before what the gateway carries. After
// its time the filter cannot send any more, so that its bytes never stand
// inside others'.
func TestReleaseWaitsForBuffers(t *testing.T) {
	for _, late := range []bool{false, true} {
		core, logs := observer.New(zap.WarnLevel)
		tcp := runTCP(t, func(c *TCPConfig) { c.Log = zap.New(core) })
		has, sendNow, sent := make(chan struct{}), make(chan struct{}), make(chan error, 1)
		c := carry(t, tcp, false, pumpFunc(func(_ context.Context, in, out filterapi.Socket) error {
			b, err := out.Recv()
			if err != nil {
				return err
			}
			close(has)
			go func() {
				<-sendNow
				sent <- in.Send(b)
			}()
			return filterapi.ErrReleased
		}))
		mustWrite(t, c.server, "first")
		<-has
		mustWrite(t, c.server, "second")
		var want error
		if late {
			want = filterapi.ErrReleased
			mustRead(t, c.client, "second")
			close(sendNow)
		} else {
			close(sendNow)
			mustRead(t, c.client, "firstsecond")
		}
		if err := <-sent; !errors.Is(err, want) {
			t.Errorf("late %v: Send: %v", late, err)
		}
		if n := logs.FilterMessageSnippet("kept buffers").Len(); (n == 1) != late {
			t.Errorf("late %v: %d lines in the log", late, n)
		}
		mustWrite(t, c.server, "third")
		mustRead(t, c.client, "third")
		mustWrite(t, c.client, "other direction")
		mustRead(t, c.server, "other direction")
	}
}

// ftpConnection is as much of a connection as the FTP filter wants to see of
// one that is not FTP.
type ftpConnection struct {
	filterapi.Connection
	filter filterapi.DataFilter
}

func (c *ftpConnection) Tuple() flow.Tuple {
	return flow.Tuple{Proto: flow.TCP, Src: netip.MustParseAddrPort("10.0.0.2:5000"), Dst: netip.MustParseAddrPort("203.0.113.10:21")}
}

func (c *ftpConnection) AttachDataFilter(f filterapi.DataFilter, _ filterapi.Priority) error {
	c.filter = f
	return nil
}

type ftpFirewall struct{ filterapi.Firewall }

func (ftpFirewall) Logger() *zap.Logger { return zap.NewNop() }

// passMalformed is the FTP filter with `malformed: pass`.
func passMalformed(t *testing.T) filterapi.DataFilter {
	t.Helper()
	f, c := ftp.New(), &ftpConnection{}
	t.Cleanup(f.Shutdown)
	options, err := f.(filterapi.OptionsParser).ParseOptions(func(into any) error {
		return yaml.Unmarshal([]byte("malformed: pass"), into)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Init(ftpFirewall{}); err != nil {
		t.Fatal(err)
	}
	s, _, err := f.AttachToSession(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.HandleEvent(t.Context(), &filterapi.ConnectEvent{About: filterapi.About{Connection: c, Options: options}}); err != nil {
		t.Fatal(err)
	}
	return pumpFunc(func(ctx context.Context, in, out filterapi.Socket) error {
		err := c.filter.Pump(ctx, c, in, out)
		if !errors.Is(err, filterapi.ErrReleased) {
			t.Errorf("the FTP filter did not release what is not FTP: %v", err)
		}
		return err
	})
}

// A filter that copies what it receives and has a goroutine at each end gives
// the flow back while both ends send as fast as they can, and while one end is
// silent.
func TestReleaseByTheFTPFilter(t *testing.T) {
	tcp := runTCP(t, nil)
	for range 20 {
		transfer(t, carry(t, tcp, false, passMalformed(t)), 2<<20)
	}
	c := carry(t, tcp, false, passer{}, passMalformed(t))
	mustWrite(t, c.server, "220 ready\r\n")
	mustRead(t, c.client, "220 ready\r\n")
	mustWrite(t, c.client, "GET / HTTP/1.1\r\n")
	mustRead(t, c.server, "GET / HTTP/1.1\r\n")
	mustWrite(t, c.server, "HTTP/1.1 200 OK\r\n")
	mustRead(t, c.client, "HTTP/1.1 200 OK\r\n")
	mustWrite(t, c.client, "and on\x00")
	mustRead(t, c.server, "and on\x00")
	close(c.kill)
	c.wait()
}
