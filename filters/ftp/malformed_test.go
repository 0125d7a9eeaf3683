package ftp

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
)

func TestMalformedClient(t *testing.T) {
	for _, line := range []string{
		"FOO\r\n", "NOOP\x00\r\n", "CWD \x80\r\n", "CWD \xc2\x85\r\n", "CWD a\rPORT 1\r\n", " NOOP\r\n", "NOOP\tx\r\n",
		"1NOOP\r\n", "ABCDEFGHIJK", "CWD \xff\xfb\x01\r\n", "CWD \xff\r\n", "\xff\xf4NOOP\r\n", strings.Repeat("\xff", 9),
		"CWD " + strings.Repeat("a", maxLine), "X\r\n", "@\r\n", "\x80", "\x1b[A", "CWD \x7f\r\n",
	} {
		g, fl := setup(t, "")
		ask(fl, "EPSV\r\n", "229 (|||5001|)\r\n")
		for i := range len(line) {
			if fl.Client.Offer(line[i:i+1]) != nil {
				break
			}
		}
		fl.Server.ExpectReset()
		if err := fl.Wait(); !errors.Is(err, errNotFTP) {
			t.Errorf("%.20q: %v", line, err)
		}
		if open := g.Open(); len(open) > 0 || g.Sent(filtertest.ToServer) != "EPSV\r\n" {
			t.Errorf("%.20q: open %v, sent %q", line, open, g.Sent(filtertest.ToServer))
		}
	}
}

func TestMalformedServer(t *testing.T) {
	for _, line := range []string{
		"HTTP/1.1 200 OK\r\n", "SSH-2.0-x\r\n", "\x16\x03\x01", "+OK\r\n", "600 x\r\n", "20 x\r\n", "2000 x\r\n", "\r\n", "22\r\n",
		"220 \x00\r\n", "220-a\r\n\x00", "220_a\r\n", "220 " + strings.Repeat("a", maxLine),
	} {
		_, fl := setup(t, "")
		fl.Server.Send(line)
		fl.Client.ExpectReset()
		if err := fl.Wait(); !errors.Is(err, errNotFTP) {
			t.Errorf("%.20q: %v", line, err)
		}
	}
	_, fl := setup(t, "")
	fl.Client.Send("EPSV\r\n")
	fl.Server.Expect("EPSV\r\n")
	for range 5 {
		fl.Server.Send("229-" + strings.Repeat("a", 4000) + "\r\n")
	}
	fl.Client.ExpectReset()
}

func TestMalformedPassed(t *testing.T) {
	const raw = "\xff\xf4 what\r\n" // held until it is known to be no command
	for _, side := range []string{"client", "server"} {
		g, fl := setup(t, "malformed: pass")
		ask(fl, "EPSV\r\n", "229 (|||5001|)\r\n")
		fl.Client.Send("NO") // half a command
		if side == "client" {
			fl.Client.Send("OP" + raw)
			fl.Server.Expect("NOOP" + raw)
		} else {
			fl.Server.Send("2", "2x")
			fl.Client.Expect("22x")
			fl.Server.Expect("NO")
		}
		if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
			t.Errorf("%s: Pump: %v, want ErrReleased", side, err)
		}
		fl.Client.Send("PASV\r\n")
		fl.Server.Expect("PASV\r\n")
		fl.Server.Send("227 (203,0,113,10,19,137)\r\n")
		fl.Client.Expect("227 (203,0,113,10,19,137)\r\n")
		permissions(t, g, "allowed tcp 10.0.0.2 > 203.0.113.10:5001", "cancelled tcp 10.0.0.2 > 203.0.113.10:5001")
	}
}

// A flow is given back whether or not one side has ended before.
func TestMalformedPassedAtTheEndOfAStream(t *testing.T) {
	_, fl := setup(t, "malformed: pass")
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
	fl.Client.Send("what is this\r\n", "more")
	fl.Server.Expect("what is this\r\nmore")
	if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
		t.Errorf("Pump: %v, want ErrReleased", err)
	}
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()

	_, fl = setup(t, "malformed: pass")
	fl.Client.Send("NOOP\r\n")
	fl.Client.CloseWrite()
	fl.Server.Expect("NOOP\r\n")
	fl.Server.ExpectEOF()
	fl.Server.Send("what is this\r\n", "more")
	fl.Client.Expect("what is this\r\nmore")
	if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
		t.Errorf("Pump: %v, want ErrReleased", err)
	}
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
}

// Both sides talk all the time and one of them ends the filtering somewhere:
// each gets what the other has sent, as it was.
func TestMalformedPassedUnderLoad(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 3))
		text := func(line, end string) string {
			var b strings.Builder
			at, n := r.IntN(40), 40+r.IntN(40)
			for i := range n {
				if fmt.Fprintf(&b, line, i); i == at {
					b.WriteString(end)
				}
			}
			return b.String()
		}
		toServer, toClient := text("NOOP %d\r\n", "what\r\n"), text("200 %d\r\n", "")
		if seed%2 == 0 {
			toServer, toClient = text("NOOP %d\r\n", ""), text("200 %d\r\n", "what\r\n")
		}
		g := filtertest.New(t, New(), "malformed: pass")
		g.Window = 200
		fl := g.Connect(client4, server4)
		var wg sync.WaitGroup
		play := func(from, to *filtertest.End, text string) {
			segments := split(r, text)
			wg.Go(func() {
				for _, s := range segments {
					if err := from.Offer(s); err != nil {
						t.Errorf("seed %d: send: %v", seed, err)
					}
				}
				from.CloseWrite()
			})
			wg.Go(func() {
				if got, err := to.ReadAll(); got != text || err != nil {
					t.Errorf("seed %d: got %q, %v\nwant %q", seed, got, err, text)
				}
			})
		}
		play(fl.Client, fl.Server, toServer)
		play(fl.Server, fl.Client, toClient)
		wg.Wait()
		if err := fl.Wait(); err != nil && !errors.Is(err, filterapi.ErrReleased) {
			t.Errorf("seed %d: Pump: %v", seed, err)
		}
		for _, e := range g.Journal() {
			if e.What == filtertest.Lost {
				t.Errorf("seed %d: %v", seed, e)
			}
		}
	}
}

// A server that has ended leaves commands without replies: they pass, and
// neither they nor the gateway's own answers pile up.
func TestCommandsAfterTheServerHasEnded(t *testing.T) {
	g, fl := setup(t, "read_only: true")
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
	for range 2 * maxOutstanding {
		fl.Client.Send(strings.Repeat("\r\nSTOR x\r\nNOOP\r\n", 10))
		fl.Server.Expect(strings.Repeat("NOOP\r\n", 10))
	}
	fl.Client.Send(strings.Repeat("\r\n", maxPending) + portIn)
	fl.Server.Expect(portOut)
	if open := g.Open(); len(open) > 0 {
		t.Errorf("open for a server that answers no more: %v", open)
	}
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()
	if err := fl.Wait(); err != nil {
		t.Error(err)
	}
}

// Filtering ends while the kernel is being asked: what it grants afterwards is
// void at once.
func TestReleasedWhileTheKernelIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, fl := setup(t, "malformed: pass")
		release := g.HoldKernel()
		fl.Client.Send("PASV\r\n")
		fl.Server.Expect("PASV\r\n")
		fl.Server.Send("227 (192,168,1,1,19,137)\r\n")
		synctest.Wait()
		fl.Client.Send("what\r\n")
		fl.Server.Expect("what\r\n")
		fl.Client.Expect("227 (192,168,1,1,19,137)\r\n")
		release()
		synctest.Wait()
		permissions(t, g, "allowed tcp 10.0.0.2 > 203.0.113.10:5001", "cancelled tcp 10.0.0.2 > 203.0.113.10:5001")

		g, fl = setup(t, "malformed: pass")
		release = g.HoldKernel()
		fl.Client.Send(portIn)
		synctest.Wait()
		fl.Server.Send("what\r\n")
		fl.Client.Expect("what\r\n")
		release()
		fl.Server.Expect(portIn) // as it came, and nothing behind it
		synctest.Wait()
		if got := fl.Server.Waiting(); got != "" || len(g.Open()) > 0 {
			t.Errorf("the server has %q, open %v", got, g.Open())
		}
	})
}

// Answers of the gateway's that waited for their turn are not lost when
// filtering ends.
func TestReleasedWithAnswersWaiting(t *testing.T) {
	_, fl := setup(t, "malformed: pass")
	fl.Client.Send("NOOP\r\nLPSV\r\nwhat\r\n")
	fl.Client.Expect("502 LPSV refused by the gateway: use PORT, EPRT, PASV or EPSV.\r\n")
	fl.Server.Expect("NOOP\r\nwhat\r\n")
}
