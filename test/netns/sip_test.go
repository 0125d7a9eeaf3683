package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// sipAgent speaks SIP over UDP message by message, as no real one can be made
// to.
type sipAgent struct {
	at   netip.AddrPort
	conn *net.UDPConn
}

func newSIPAgent(h *lab.Host, at netip.AddrPort) *sipAgent {
	return &sipAgent{at, h.MustListenPacket("udp", at.String())}
}

// sipText ends the lines of a message and gives it the length of its body.
func sipText(body string, lines ...string) string {
	return strings.Join(lines, "\r\n") + fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// sipSDP describes one stream of sound.
func sipSDP(at netip.AddrPort) string {
	family := "IP4"
	if at.Addr().Is6() {
		family = "IP6"
	}
	return fmt.Sprintf("v=0\r\no=a 1 1 IN %s %s\r\ns=-\r\nc=IN %s %s\r\nt=0 0\r\nm=audio %d RTP/AVP 8\r\n", family, at.Addr(), family, at.Addr(), at.Port())
}

// request is a request of this agent's in one dialog.
func (a *sipAgent) request(method, uri string, number int, call, body string, more ...string) string {
	lines := []string{
		method + " " + uri + " SIP/2.0",
		fmt.Sprintf("Via: SIP/2.0/UDP %s;branch=z9hG4bK%s-%s-%d", a.at, call, method, number),
		"From: <sip:a@example.org>;tag=a", "To: <sip:b@example.org>", "Call-ID: " + call,
		fmt.Sprintf("CSeq: %d %s", number, method), "Max-Forwards: 70", fmt.Sprintf("Contact: <sip:a@%s>", a.at),
	}
	if body != "" {
		lines = append(lines, "Content-Type: application/sdp")
	}
	return sipText(body, append(lines, more...)...)
}

// answer answers a request as it was received.
func (a *sipAgent) answer(request, status, body string, more ...string) string {
	lines := []string{"SIP/2.0 " + status}
	for line := range strings.SplitSeq(strings.Split(request, "\r\n\r\n")[0], "\r\n") {
		name, _, _ := strings.Cut(line, ":")
		switch name {
		case "To":
			if !strings.Contains(line, "tag=") {
				line += ";tag=b"
			}
			fallthrough
		case "Via", "From", "Call-ID", "CSeq":
			lines = append(lines, line)
		}
	}
	lines = append(lines, more...)
	if body != "" {
		lines = append(lines, fmt.Sprintf("Contact: <sip:b@%s>", a.at), "Content-Type: application/sdp")
	}
	return sipText(body, lines...)
}

func (a *sipAgent) send(t testing.TB, to netip.AddrPort, text string) {
	t.Helper()
	if _, err := a.conn.WriteToUDPAddrPort([]byte(text), to); err != nil {
		t.Fatalf("send from %s: %v", a.at, err)
	}
}

// receive waits for a message that begins so, and says where it comes from.
func (a *sipAgent) receive(t testing.TB, beginning string) (text string, from netip.AddrPort) {
	t.Helper()
	deadline(t, a.conn, 10*time.Second)
	b := make([]byte, 65536)
	for {
		n, from, err := a.conn.ReadFromUDPAddrPort(b)
		if err != nil {
			t.Fatalf("%s waits for %q: %v", a.at, beginning, err)
		}
		if strings.HasPrefix(string(b[:n]), beginning) {
			return string(b[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		}
	}
}

// silent: nothing comes for a while.
func (a *sipAgent) silent(t testing.TB, when string) {
	t.Helper()
	if err := a.conn.SetReadDeadline(time.Now().Add(silence())); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65536)
	if n, from, err := a.conn.ReadFromUDPAddrPort(b); !timedOut(err) {
		t.Errorf("%s, %s: got %q from %s, %v", a.at, when, b[:n], from, err)
	}
}

// mediaOf reads where a message wants its sound.
func mediaOf(t testing.TB, message string) netip.AddrPort {
	t.Helper()
	var addr netip.Addr
	var port uint16
	for line := range strings.SplitSeq(message, "\r\n") {
		if f := strings.Fields(line); strings.HasPrefix(line, "c=IN") && len(f) == 3 {
			addr, _ = netip.ParseAddr(f[2])
		} else if strings.HasPrefix(line, "m=audio ") {
			_, _ = fmt.Sscanf(line, "m=audio %d", &port)
		}
	}
	if !addr.IsValid() {
		t.Fatalf("no media address in %q", message)
	}
	return netip.AddrPortFrom(addr, port)
}

// contactIn reads the first contact of a message.
func contactIn(t testing.TB, message string) netip.AddrPort {
	t.Helper()
	_, after, _ := strings.Cut(message, "\r\nContact: <sip:a@")
	text, _, _ := strings.Cut(after, ">")
	at, err := netip.ParseAddrPort(text)
	if err != nil {
		t.Fatalf("no contact in %q: %v", message, err)
	}
	return at
}

// sipCall is a call that stands, from client to srv, with a socket for sound on
// each side. told is where the server was told to send.
type sipCall struct {
	near, far           *sipAgent
	nearSound, farSound *sipAgent
	told                netip.AddrPort
	contact, from       netip.AddrPort
}

// callOut makes a call with its media at this port.
func callOut(t testing.TB, l *lab.Lab, near, far *sipAgent, id string, port uint16) *sipCall {
	t.Helper()
	c := &sipCall{near: near, far: far}
	c.nearSound = newSIPAgent(l.Client, netip.AddrPortFrom(near.at.Addr(), port))
	c.farSound = newSIPAgent(l.Srv, netip.AddrPortFrom(far.at.Addr(), port))
	near.send(t, far.at, near.request("INVITE", "sip:b@"+far.at.String(), 1, id, sipSDP(c.nearSound.at)))
	invite, from := far.receive(t, "INVITE ")
	c.told, c.contact, c.from = mediaOf(t, invite), contactIn(t, invite), from
	far.send(t, from, far.answer(invite, "200 OK", sipSDP(c.farSound.at)))
	near.receive(t, "SIP/2.0 200")
	near.send(t, far.at, near.request("ACK", "sip:b@"+far.at.String(), 1, id, ""))
	far.receive(t, "ACK ")
	return c
}

// sound sends both ways until it has come through, then says so many more.
func (c *sipCall) sound(t testing.TB, more int) {
	t.Helper()
	for i := range more {
		out, in := fmt.Sprintf("\x80\x08 out %d", i), fmt.Sprintf("\x80\x08 in %d", i)
		c.nearSound.send(t, c.farSound.at, out)
		if _, from := c.farSound.receive(t, out); from != c.told {
			t.Fatalf("sound comes from %s, and the server was told %s", from, c.told)
		}
		c.farSound.send(t, c.told, in)
		if _, from := c.nearSound.receive(t, in); from != c.farSound.at {
			t.Fatalf("sound comes from %s", from)
		}
	}
}

// The media of a call is the kernel's: it goes on while the daemon stands. No
// third host gets in, and after BYE nobody does.
func TestSIPMediaInKernel(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(sipConfig(""))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		near, far := newSIPAgent(l.Client, netip.AddrPortFrom(client, 5060)), newSIPAgent(l.Srv, netip.AddrPortFrom(srv, 5060))
		other := newSIPAgent(l.Other, netip.AddrPortFrom(map[bool]netip.Addr{true: lab.Other4, false: lab.Other6}[srv.Is4()], 7000))
		call := callOut(t, l, near, far, "kernel", 7000)
		want := client
		if client.Is4() {
			want = lab.Outside4
			if call.told.Port()%2 != 0 {
				t.Errorf("the server was told the odd port %d", call.told.Port())
			}
		}
		if call.told.Addr() != want {
			t.Errorf("the server was told %s, want %s", call.told, want)
		}
		call.sound(t, 3)
		f, ok := l.GW.Flow("udp", client, call.farSound.at)
		if !ok || f.Path() != "kernel" {
			t.Errorf("the media in conntrack: %+v", f)
		}
		g.Freeze()
		call.sound(t, 100)
		g.Thaw()

		other.send(t, call.told, "\x80\x08 intruder")
		call.nearSound.silent(t, "a third host sends")

		// The server hangs up at the contact that it was told.
		far.send(t, call.contact, strings.ReplaceAll(far.request("BYE", "sip:a@"+call.contact.String(), 2, "kernel", ""), "tag=a", "tag=b"))
		bye, _ := near.receive(t, "BYE sip:a@"+near.at.String()+" SIP/2.0")
		near.send(t, far.at, near.answer(bye, "200 OK", ""))
		far.receive(t, "SIP/2.0 200")
		noPermissions(t, g)
		call.farSound.send(t, call.told, "\x80\x08 late")
		call.nearSound.silent(t, "after BYE")
		call.nearSound.send(t, call.farSound.at, "\x80\x08 late")
		call.farSound.silent(t, "after BYE")
		near.conn.Close()
		far.conn.Close()
		other.conn.Close()
	})
}

// A registration lets the registrar in, nobody else, and not longer than it was
// granted.
func TestSIPRegistrationExpires(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(sipConfig(""))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		near, far := newSIPAgent(l.Client, netip.AddrPortFrom(client, 5060)), newSIPAgent(l.Srv, netip.AddrPortFrom(srv, 5060))
		defer near.conn.Close()
		defer far.conn.Close()
		other := newSIPAgent(l.Other, netip.AddrPortFrom(map[bool]netip.Addr{true: lab.Other4, false: lab.Other6}[srv.Is4()], 5060))
		defer other.conn.Close()
		near.send(t, far.at, near.request("REGISTER", "sip:"+far.at.String(), 1, "reg", "", "Expires: 3"))
		asked, from := far.receive(t, "REGISTER ")
		at := contactIn(t, asked)
		knock := func(from *sipAgent, call string) {
			from.send(t, at, strings.ReplaceAll(from.request("OPTIONS", "sip:a@"+at.String(), 1, call, ""), "tag=a", "tag=b"))
		}
		again := newSIPAgent(l.Srv, netip.AddrPortFrom(srv, 5070))
		defer again.conn.Close()
		knock(again, "early")
		near.silent(t, "before the registrar has agreed")
		far.send(t, from, far.answer(asked, "200 OK", "", fmt.Sprintf("Contact: <sip:a@%s>;expires=3", at)))
		ok, _ := near.receive(t, "SIP/2.0 200")
		if contactIn(t, ok) != near.at {
			t.Errorf("the client is told the contact %s, want its own", contactIn(t, ok))
		}
		knock(other, "other")
		knock(again, "registrar")
		got, _ := near.receive(t, "OPTIONS sip:a@"+near.at.String()+" SIP/2.0")
		if !strings.Contains(got, "Call-ID: registrar\r\n") {
			t.Errorf("the client got %q", got)
		}
		near.send(t, again.at, near.answer(got, "200 OK", ""))
		again.receive(t, "SIP/2.0 200")
		noPermissions(t, g)
		fresh := newSIPAgent(l.Srv, netip.AddrPortFrom(srv, 5071))
		defer fresh.conn.Close()
		knock(fresh, "late")
		near.silent(t, "after the registration has expired")
	})
}

// What a call must not open: media of hosts that have no part in it.
func TestB60SIPThirdHosts(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(sipConfig("media: [203.0.113.11, \"2001:db8:b::11\"]"))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		near, far := newSIPAgent(l.Client, netip.AddrPortFrom(client, 5060)), newSIPAgent(l.Srv, netip.AddrPortFrom(srv, 5060))
		defer near.conn.Close()
		defer far.conn.Close()
		second, other, nobody := lab.Second4, lab.Other4, lab.Nobody4
		if srv.Is6() {
			second, other, nobody = lab.Second6, lab.Other6, lab.Nobody6
		}
		// Another inside host, and a port where a service listens.
		for i, at := range []netip.AddrPort{netip.AddrPortFrom(second, 7000), netip.AddrPortFrom(client, 22), netip.AddrPortFrom(srv, 7000)} {
			near.send(t, far.at, near.request("INVITE", "sip:b@"+far.at.String(), 1, fmt.Sprintf("bad-%d", i), sipSDP(at)))
			near.receive(t, "SIP/2.0 488 ")
		}
		near.send(t, far.at, near.request("REGISTER", "sip:"+far.at.String(), 1, "bad-reg", "", fmt.Sprintf("Contact: <sip:a@%s>", netip.AddrPortFrom(second, 5060))))
		near.receive(t, "SIP/2.0 403 ")
		far.silent(t, "after requests that were refused")
		noPermissions(t, g)

		// The far end names a third host: the stream is off. One that the rule
		// names is on.
		invite := func(call string) string {
			near.send(t, far.at, near.request("INVITE", "sip:b@"+far.at.String(), 1, call, sipSDP(netip.AddrPortFrom(client, 7000))))
			text, _ := far.receive(t, "INVITE ")
			return text
		}
		text := invite("third")
		far.send(t, viaOf(t, text), far.answer(text, "200 OK", sipSDP(netip.AddrPortFrom(nobody, 7000))))
		ok, _ := near.receive(t, "SIP/2.0 200")
		if at := mediaOf(t, ok); at.Port() != 0 {
			t.Errorf("the client is told to send to %s", at)
		}
		text = invite("media")
		told := mediaOf(t, text)
		sound := newSIPAgent(l.Other, netip.AddrPortFrom(other, 7000))
		defer sound.conn.Close()
		mine := newSIPAgent(l.Client, netip.AddrPortFrom(client, 7000))
		defer mine.conn.Close()
		far.send(t, viaOf(t, text), far.answer(text, "200 OK", sipSDP(sound.at)))
		near.receive(t, "SIP/2.0 200")
		sound.send(t, told, "\x80 from the media server")
		mine.receive(t, "\x80 from the media server")
		mine.send(t, sound.at, "\x80 from the client")
		if _, from := sound.receive(t, "\x80 from the client"); from != told {
			t.Errorf("the media server hears %s, want %s", from, told)
		}
		for _, call := range []string{"third", "media"} {
			near.send(t, far.at, near.request("BYE", "sip:b@"+far.at.String(), 2, call, ""))
			far.receive(t, "BYE ")
		}
		noPermissions(t, g)
	})
}

// viaOf reads where the answer to a request goes.
func viaOf(t testing.TB, message string) netip.AddrPort {
	t.Helper()
	_, after, _ := strings.Cut(message, "\r\nVia: SIP/2.0/UDP ")
	text, _, _ := strings.Cut(after, ";")
	at, err := netip.ParseAddrPort(text)
	if err != nil {
		t.Fatalf("no Via in %q: %v", message, err)
	}
	return at
}

// B60: an HTTP request to port 5060, with a REGISTER in a segment of its own,
// opens nothing.
func TestB60SIPSlipstream(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Client.EchoTCP(3306)
	for _, options := range []string{"", "malformed: pass"} {
		t.Run("options "+options, func(t *testing.T) {
			heard := make(chan string, 16)
			server := l.Srv.MustListen("tcp", netip.AddrPortFrom(lab.Srv4, 5060).String())
			go func() {
				defer close(heard)
				c, err := server.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				b := make([]byte, 65536)
				for {
					n, err := c.Read(b)
					if err != nil {
						return
					}
					heard <- string(b[:n])
					// A confederate agrees to everything.
					_, _ = c.Write([]byte("SIP/2.0 200 OK\r\nVia: SIP/2.0/TCP 10.0.0.2:5060;branch=z9hG4bK1\r\nFrom: <sip:a@x>;tag=a\r\nTo: <sip:a@x>;tag=b\r\nCall-ID: slip\r\nCSeq: 1 REGISTER\r\nContact: <sip:a@10.0.0.2:3306;transport=tcp>;expires=600\r\nContent-Length: 0\r\n\r\n"))
				}
			}()
			g := l.Gateway(sipConfig(options))
			defer g.Stop()
			c := l.Client.MustDial("tcp", netip.AddrPortFrom(lab.Srv4, 5060).String(), 5*time.Second)
			deadline(t, c, 3*time.Second)
			register := "REGISTER sip:x SIP/2.0\r\nVia: SIP/2.0/TCP 10.0.0.2:5060;branch=z9hG4bK1\r\nFrom: <sip:a@x>;tag=a\r\nTo: <sip:a@x>\r\nCall-ID: slip\r\nCSeq: 1 REGISTER\r\nContact: <sip:a@10.0.0.2:3306;transport=tcp>\r\nExpires: 600\r\nContent-Length: 0\r\n\r\n"
			mustWrite(t, c, fmt.Sprintf("POST / HTTP/1.1\r\nHost: srv:5060\r\nContent-Length: %d\r\n\r\n", len(register)))
			awaitSegment(l.Client, 5060)
			_, _ = c.Write([]byte(register)) // may be cut by now
			_ = c.(*net.TCPConn).CloseWrite()
			readToEnd(c)
			_ = c.Close()
			_ = server.Close()
			for text := range heard {
				if strings.Contains(text, "203.0.113.1") {
					t.Errorf("the server was told of an address: %q", text)
				}
			}
			if list := openPermissions(g); len(list) != 0 {
				t.Errorf("open: %+v", list)
			}
		})
	}
}

// awaitSegment waits until what was written has left, or the connection is
// gone.
func awaitSegment(h *lab.Host, port int) {
	end := time.Now().Add(time.Second)
	for time.Now().Before(end) {
		waiting := false
		for line := range strings.Lines(h.Run("ss", "-Htn", "state", "established", fmt.Sprintf("dport = :%d", port))) {
			if f := strings.Fields(line); len(f) >= 2 && f[1] != "0" {
				waiting = true
			}
		}
		if !waiting {
			return
		}
	}
}

// A registered client can be called when all its flows are silent for so long
// that nobody remembers them.
func TestSIPReachableWithoutFlow(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	config := sipConfig("")
	config.Extra = "udp: {peer_idle: 3, socket_idle: 4}\n"
	g := l.Gateway(config)
	known := map[netip.Addr]netip.AddrPort{}
	agents := map[netip.Addr][2]*sipAgent{}
	for srv, client := range map[netip.Addr]netip.Addr{lab.Srv4: lab.Client4, lab.Srv6: lab.Client6} {
		near, far := newSIPAgent(l.Client, netip.AddrPortFrom(client, 5060)), newSIPAgent(l.Srv, netip.AddrPortFrom(srv, 5060))
		near.send(t, far.at, near.request("REGISTER", "sip:"+far.at.String(), 1, "reg", "", "Expires: 600"))
		asked, from := far.receive(t, "REGISTER ")
		known[client] = contactIn(t, asked)
		far.send(t, from, far.answer(asked, "200 OK", "", fmt.Sprintf("Contact: <sip:a@%s>;expires=600", known[client])))
		near.receive(t, "SIP/2.0 200")
		agents[client] = [2]*sipAgent{near, far}
	}
	for client, both := range agents {
		near, far := both[0], both[1]
		g.AwaitRecord("flow", 150*time.Second, func(r lab.Record) bool { return r.Text("src") == near.at.String() })
		at := known[client]
		deadline(t, far.conn, 10*time.Second)
		far.send(t, at, strings.ReplaceAll(far.request("OPTIONS", "sip:a@"+at.String(), 1, "call", ""), "tag=a", "tag=b"))
		got, _ := near.receive(t, "OPTIONS sip:a@"+near.at.String()+" SIP/2.0")
		near.send(t, far.at, near.answer(got, "200 OK", ""))
		far.receive(t, "SIP/2.0 200")
	}
}

// A datagram as large as UDP has them is read as a whole, and its length is
// right when it leaves.
func TestSIPLargeDatagram(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(sipConfig(""))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		near, far := newSIPAgent(l.Client, netip.AddrPortFrom(client, 5060)), newSIPAgent(l.Srv, netip.AddrPortFrom(srv, 5060))
		defer near.conn.Close()
		defer far.conn.Close()
		body := sipSDP(netip.AddrPortFrom(client, 7000)) + strings.Repeat("a=x:"+strings.Repeat("y", 94)+"\r\n", 600)
		near.send(t, far.at, near.request("INVITE", "sip:b@"+far.at.String(), 1, "large", body))
		got, _ := far.receive(t, "INVITE ")
		head, rest, _ := strings.Cut(got, "\r\n\r\n")
		if !strings.HasSuffix(rest, body[len(body)-60000:]) || !strings.Contains(head+"\r\n", fmt.Sprintf("Content-Length: %d\r\n", len(rest))) {
			t.Errorf("%d bytes of body arrive, %d were sent:\n%s", len(rest), len(body), head)
		}
	})
}
