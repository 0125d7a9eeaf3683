package ftp

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

var (
	client4 = netip.MustParseAddrPort("10.0.0.2:50000")
	server4 = netip.MustParseAddrPort("203.0.113.10:21")
	client6 = netip.MustParseAddrPort("[fd00:a::2]:50000")
	server6 = netip.MustParseAddrPort("[2001:db8:b::10]:21")
)

const banner = "220 ready\r\n"

// talk opens a control connection and takes the greeting.
func talk(t *testing.T, g *filtertest.Gateway) *filtertest.Flow {
	t.Helper()
	fl := g.Connect(client4, server4)
	fl.Server.Send(banner)
	fl.Client.Expect(banner)
	return fl
}

func setup(t *testing.T, options string) (*filtertest.Gateway, *filtertest.Flow) {
	t.Helper()
	g := filtertest.New(t, New(), options)
	return g, talk(t, g)
}

// ask sends a command that reaches the server as it is, and its answer.
func ask(fl *filtertest.Flow, command, answer string) {
	fl.Client.Send(command)
	fl.Server.Expect(command)
	fl.Server.Send(answer)
	fl.Client.Expect(answer)
}

func permissions(t *testing.T, g *filtertest.Gateway, want ...string) {
	t.Helper()
	if got := strings.Join(g.Permissions(), "\n"); got != strings.Join(want, "\n") {
		t.Errorf("permissions:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
}

const (
	reserved = "reserved tcp 203.0.113.1:40000 > 10.0.0.2:5001 from []"
	armed    = "armed tcp 203.0.113.1:40000 > 10.0.0.2:5001 from [203.0.113.10]"
	portIn   = "PORT 10,0,0,2,19,137\r\n"
	portOut  = "PORT 203,0,113,1,156,64\r\n"
)

// The lines of the list of attacks that name FTP.

func TestAttackPortOverTwoSegments(t *testing.T) {
	for i := 1; i < len(portIn); i++ {
		g, fl := setup(t, "")
		fl.Client.Send(portIn[:i], portIn[i:])
		fl.Server.Expect(portOut)
		fl.Server.Send("200 ok\r\n")
		fl.Client.Expect("200 ok\r\n")
		permissions(t, g, reserved, armed)
	}
}

func TestAttack227OverTwoSegments(t *testing.T) {
	const reply = "227 Entering Passive Mode (203,0,113,10,19,137).\r\n"
	for i := 1; i < len(reply); i++ {
		g, fl := setup(t, "")
		fl.Client.Send("PASV\r\n")
		fl.Server.Expect("PASV\r\n")
		fl.Server.Send(reply[:i], reply[i:])
		fl.Client.Expect(reply)
		permissions(t, g, "allowed tcp 10.0.0.2 > 203.0.113.10:5001")
	}
}

func TestAttackPipelinedPort(t *testing.T) {
	g, fl := setup(t, "")
	fl.Client.Send("TYPE I\r\n" + portIn + "RETR a\r\n")
	fl.Server.Expect("TYPE I\r\n" + portOut + "RETR a\r\n")
	fl.Server.Send("200 type\r\n200 port\r\n150 here\r\n226 done\r\n")
	fl.Client.Expect("200 type\r\n200 port\r\n150 here\r\n226 done\r\n")
	permissions(t, g, reserved, armed)
	g.Before(filtertest.Armed, "40000", filtertest.ToClient, "200 port")
}

func TestAttackPortWithBareLF(t *testing.T) {
	g, fl := setup(t, "")
	fl.Client.Send("PORT 10,0,0,2,19,137\n")
	fl.Client.Expect("501 PORT refused by the gateway: the line does not end with CR LF.\r\n")
	nothingPassed(t, g)
	ask(fl, "NOOP\r\n", "200 ok\r\n")
}

func TestAttackPortBelow1024(t *testing.T) {
	for _, port := range []string{"PORT 10,0,0,2,0,22", "PORT 10,0,0,2,3,255", "PORT 10,0,0,2,0,0", "EPRT |1|10.0.0.2|22|", "EPRT |1|10.0.0.2|1023|"} {
		g, fl := setup(t, "")
		fl.Client.Send(port + "\r\n")
		fl.Client.Expect("504 " + port[:4] + " refused by the gateway: ports below 1024 are not allowed.\r\n")
		nothingPassed(t, g)
	}
}

func TestAttackPortOctetAbove255(t *testing.T) {
	for _, port := range []string{
		"PORT 266,0,0,2,19,137", "PORT 10,0,0,258,19,137", "PORT 10,0,0,2,275,137", "PORT 10,0,0,2,19,65673",
		"PORT 10,0,0,2,19,99999999999999999999", "PORT 10,0,0,2,19", "PORT 10,0,0,2,19,137,1", "PORT 10,0,0,2,19,137 ",
		"PORT  10,0,0,2,19,137", "PORT 10,0,0,2,19,+137", "PORT 10,0,0,2,19,-1", "PORT 10,0,0,2,19,", "PORT 10,0,0,2,023,137",
		"PORT", "PORT ", "PORT 10.0.0.2,19,137", "EPRT |1|10.0.0.2|70000|", "EPRT |1|10.0.0.2|5001", "EPRT 1|10.0.0.2|5001|",
		"EPRT |1|10.0.0.2|5001|x", "EPRT |1|10.0.0.2|05001|", "EPRT |1|010.0.0.2|5001|", "EPRT |1||5001|", "EPRT |1|fd00:a::2|5001|",
		"EPRT 111", "EPRT",
	} {
		g, fl := setup(t, "")
		fl.Client.Send(port + "\r\n")
		fl.Client.Expect("501 " + port[:4] + " refused by the gateway: syntax error in the address.\r\n")
		nothingPassed(t, g)
	}
}

func TestAttackBounce(t *testing.T) {
	for _, port := range []string{"PORT 10,0,0,3,19,137", "PORT 203,0,113,11,19,137", "PORT 203,0,113,10,19,137", "PORT 203,0,113,1,19,137", "PORT 127,0,0,1,19,137", "EPRT |1|10.0.0.3|5001|"} {
		g, fl := setup(t, "")
		fl.Client.Send(port + "\r\n")
		fl.Client.Expect("504 " + port[:4] + " refused by the gateway: the address is not the client's own.\r\n")
		nothingPassed(t, g)
	}
}

func TestAttackSlipstream(t *testing.T) {
	post := "POST / HTTP/1.1\r\nHost: 203.0.113.10:21\r\nContent-Length: 24\r\n\r\n"
	for _, first := range []string{post, "GET / HTTP/1.0\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00", "SSH-2.0-x\r\n", "EHLO x\r\n", "\x00", "INVITE sip:a SIP/2.0\r\n"} {
		g, fl := setup(t, "")
		// The body is a segment of its own that begins with a real command.
		_ = fl.Client.Offer(first)
		_ = fl.Client.Offer(portIn)
		fl.Client.ExpectReset()
		fl.Server.ExpectReset()
		if err := fl.Wait(); !errors.Is(err, errNotFTP) {
			t.Errorf("%q: %v", first, err)
		}
		nothingPassed(t, g)
	}
}

func TestAttackSlipstreamPassed(t *testing.T) {
	post := "POST / HTTP/1.1\r\nHost: 203.0.113.10:21\r\n\r\n"
	g, fl := setup(t, "malformed: pass")
	fl.Client.Send(post, portIn, "PASV\r\n")
	fl.Server.Expect(post + portIn + "PASV\r\n")
	fl.Server.Send("227 (203,0,113,10,19,137)\r\n")
	fl.Client.Expect("227 (203,0,113,10,19,137)\r\n")
	if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
		t.Errorf("Pump: %v, want ErrReleased", err)
	}
	permissions(t, g)
}

func TestAttackThirdHostInPassiveReply(t *testing.T) {
	for _, said := range []string{"203,0,113,11", "10,0,0,3", "192,168,1,1", "127,0,0,1", "0,0,0,0"} {
		g, fl := setup(t, "")
		fl.Client.Send("PASV\r\n")
		fl.Server.Expect("PASV\r\n")
		fl.Server.Send("227 Entering Passive Mode (" + said + ",19,137).\r\n")
		fl.Client.Expect("227 Entering Passive Mode (203,0,113,10,19,137).\r\n")
		permissions(t, g, "allowed tcp 10.0.0.2 > 203.0.113.10:5001")
		if n := g.Log.FilterMessage("passive reply names another host").Len(); n != 1 {
			t.Errorf("%s: %d records in the log, want 1", said, n)
		}
	}
}

func TestAttackWidePermission(t *testing.T) {
	g, fl := setup(t, "")
	ext := netip.MustParseAddrPort("203.0.113.1:40000")
	fl.Client.Send(portIn)
	fl.Server.Expect(portOut)
	if _, in := g.Arrive(flow.TCP, server4.Addr(), ext); in {
		t.Error("the bind lets somebody in before the server's reply")
	}
	fl.Server.Send("200 ok\r\n")
	fl.Client.Expect("200 ok\r\n")
	if _, in := g.Arrive(flow.TCP, netip.MustParseAddr("203.0.113.11"), ext); in {
		t.Error("the bind lets another host in")
	}
	if to, in := g.Arrive(flow.TCP, server4.Addr(), ext); !in || to != netip.MustParseAddrPort("10.0.0.2:5001") {
		t.Errorf("the server is sent to %v, %v", to, in)
	}
	if _, in := g.Arrive(flow.TCP, server4.Addr(), ext); in {
		t.Error("the bind is used twice")
	}
	ask(fl, "PASV\r\n", "227 (203,0,113,10,19,137)\r\n")
	target := netip.MustParseAddrPort("203.0.113.10:5001")
	if g.Dial(flow.TCP, netip.MustParseAddr("10.0.0.3"), target) || g.Dial(flow.UDP, client4.Addr(), target) ||
		g.Dial(flow.TCP, client4.Addr(), netip.MustParseAddrPort("203.0.113.10:5002")) {
		t.Error("the permission is wider than the reply")
	}
	if !g.Dial(flow.TCP, client4.Addr(), target) || g.Dial(flow.TCP, client4.Addr(), target) {
		t.Error("the permission is good for exactly one connection")
	}
}

func TestAttackPermissionsAreShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, fl := setup(t, "")
		ask(fl, "PASV\r\n", "227 (203,0,113,10,19,137)\r\n")
		<-time.After(filterapi.DefaultTimeout + 1)
		if open := g.Open(); len(open) > 0 {
			t.Errorf("open after a minute: %v", open)
		}
		fl.Client.Send(portIn)
		fl.Server.Expect(portOut)
		<-time.After(filterapi.DefaultTimeout + 1)
		fl.Server.Send("200 ok\r\n")
		fl.Client.Expect("425 Can't open data connection: the gateway's port has expired.\r\n")
	})
}

func TestAttackFloodOfPermissions(t *testing.T) {
	g := filtertest.New(t, New(), "")
	g.Quota = 1
	other := g.Connect(netip.MustParseAddrPort("10.0.0.3:50000"), server4)
	other.Server.Send(banner)
	other.Client.Expect(banner)
	ask(other, "PASV\r\n", "227 (203,0,113,10,19,137)\r\n")
	// Negotiations on one connection supersede each other; a second
	// connection of the same client meets the quota.
	a, b := talk(t, g), g.Connect(netip.MustParseAddrPort("10.0.0.2:50001"), server4)
	for range 100 {
		ask(a, "EPSV\r\n", "229 (|||5002|)\r\n")
	}
	b.Server.Send(banner)
	b.Client.Expect(banner)
	b.Client.Exchange(portIn, "425 Can't open data connection: too many are pending at the gateway.\r\n")
	b.Client.Send("PASV\r\n")
	b.Server.Expect("PASV\r\n")
	b.Server.Send("227 (203,0,113,10,19,140)\r\n")
	b.Client.Expect("425 Can't open data connection: too many are pending at the gateway.\r\n")
	if !g.Dial(flow.TCP, netip.MustParseAddr("10.0.0.3"), netip.MustParseAddrPort("203.0.113.10:5001")) {
		t.Error("another client's permission is gone")
	}
}

// The rules of hand.

func TestRuleReserveEarlyArmLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, fl := setup(t, "")
		release := g.HoldKernel()
		fl.Client.Send(portIn)
		synctest.Wait()
		if got := fl.Server.Waiting(); got != "" {
			t.Errorf("the server has %q before the kernel's acknowledgement", got)
		}
		release()
		fl.Server.Expect(portOut)
		release = g.HoldKernel()
		fl.Server.Send("200 ok\r\n")
		synctest.Wait()
		if got := fl.Client.Waiting(); got != "" {
			t.Errorf("the client has %q before the kernel's acknowledgement", got)
		}
		release()
		fl.Client.Expect("200 ok\r\n")

		release = g.HoldKernel()
		fl.Client.Send("PASV\r\n")
		fl.Server.Expect("PASV\r\n")
		fl.Server.Send("227 (203,0,113,10,19,137)\r\n")
		synctest.Wait()
		if got := fl.Client.Waiting(); got != "" {
			t.Errorf("the client has %q before the kernel's acknowledgement", got)
		}
		release()
		fl.Client.Expect("227 (203,0,113,10,19,137)\r\n")
		g.Before(filtertest.Allowed, ":5001", filtertest.ToClient, "227")
	})
}

func TestRuleCancelledOnNegativeAnswer(t *testing.T) {
	for _, reply := range []string{"500 no\r\n", "425 no\r\n", "331 what\r\n", "421 bye\r\n", "500-no\r\n500 no\r\n"} {
		g, fl := setup(t, "")
		fl.Client.Send(portIn)
		fl.Server.Expect(portOut)
		fl.Server.Send(reply)
		fl.Client.Expect(reply)
		permissions(t, g, reserved, "killed"+strings.TrimPrefix(reserved, "reserved"))
	}
}

func TestRuleCancelledOnNewNegotiation(t *testing.T) {
	g, fl := setup(t, "")
	ask(fl, "PASV\r\n", "227 (203,0,113,10,19,137)\r\n")
	fl.Client.Send(portIn)
	fl.Server.Expect(portOut)
	permissions(t, g, "allowed tcp 10.0.0.2 > 203.0.113.10:5001", "cancelled tcp 10.0.0.2 > 203.0.113.10:5001", reserved)
	fl.Server.Send("200 ok\r\n")
	fl.Client.Expect("200 ok\r\n")
	ask(fl, "EPSV\r\n", "229 (|||6000|)\r\n")
	if open := g.Open(); len(open) != 1 || open[0] != "tcp 10.0.0.2 > 203.0.113.10:6000" {
		t.Errorf("open: %v", open)
	}
}

func TestRuleCancelledWithControlConnection(t *testing.T) {
	ends := map[string]func(fl *filtertest.Flow){
		"quit":         func(fl *filtertest.Flow) { fl.Client.CloseWrite(); fl.Server.CloseWrite() },
		"client reset": func(fl *filtertest.Flow) { fl.Client.Reset() },
		"server reset": func(fl *filtertest.Flow) { fl.Server.Reset() },
		"cut":          func(fl *filtertest.Flow) { fl.Cut() },
		"malformed":    func(fl *filtertest.Flow) { fl.Client.Send("\x00") },
	}
	for name, end := range ends {
		g, fl := setup(t, "")
		ask(fl, "PASV\r\n", "227 (203,0,113,10,19,137)\r\n")
		fl.Client.Send("NOOP\r\n" + portIn)
		fl.Server.Expect("NOOP\r\n" + portOut)
		end(fl)
		err := fl.Wait()
		if (name == "quit") != (err == nil) {
			t.Errorf("%s: Pump: %v", name, err)
		}
		if open := g.Open(); len(open) > 0 {
			t.Errorf("%s: still open: %v", name, open)
		}
	}
}

func nothingPassed(t *testing.T, g *filtertest.Gateway) {
	t.Helper()
	permissions(t, g)
	if sent := g.Sent(filtertest.ToServer); sent != "" {
		t.Errorf("the server saw %q", sent)
	}
}
