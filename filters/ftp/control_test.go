package ftp

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
)

func TestGreeting(t *testing.T) {
	g := filtertest.New(t, New(), "")
	fl := g.Connect(client4, server4)
	// The client does not wait; the gateway's answer does.
	fl.Client.Send("STRU F\r\n\r\n")
	fl.Server.Send("120 wait\r\n")
	fl.Client.Expect("120 wait\r\n")
	fl.Server.Expect("STRU F\r\n")
	fl.Server.Send("220-hello\r\n", " any text\r\n220\r\n", "200 ok\r\n")
	fl.Client.Expect("220-hello\r\n any text\r\n220\r\n200 ok\r\n500 Empty command.\r\n")
}

func TestOwnAnswersInOrder(t *testing.T) {
	g, fl := setup(t, "read_only: true")
	fl.Client.Send("NOOP\r\nSTOR x\r\nPORT 1,2,3,4,5,6\r\nRETR a\r\nAUTH TLS\r\nLPSV\r\nSYST\r\n")
	fl.Server.Expect("NOOP\r\nRETR a\r\nSYST\r\n")
	fl.Server.Send("200-a\r\n200 noop\r\n")
	fl.Client.Expect("200-a\r\n200 noop\r\n" +
		"550 STOR refused by the gateway: this rule is read-only.\r\n" +
		"504 PORT refused by the gateway: the address is not the client's own.\r\n")
	fl.Server.Send("150 soon\r\n226 done\r\n")
	fl.Client.Expect("150 soon\r\n226 done\r\n" +
		"534 AUTH refused by the gateway's rules: encrypted control connections are not allowed.\r\n" +
		"502 LPSV refused by the gateway: use PORT, EPRT, PASV or EPSV.\r\n")
	fl.Server.Send("215 UNIX\r\n")
	fl.Client.Expect("215 UNIX\r\n")
	permissions(t, g)
}

func TestOwnAnswerNeverInsideAReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, fl := setup(t, "read_only: true")
		fl.Server.Send("213-unasked\r\n")
		fl.Client.Expect("213-unasked\r\n")
		fl.Client.Send("STOR x\r\n")
		synctest.Wait()
		if got := fl.Client.Waiting(); got != "" {
			t.Errorf("the client has %q inside another reply", got)
		}
		fl.Server.Send("213 end\r\n")
		fl.Client.Expect("213 end\r\n550 STOR refused by the gateway: this rule is read-only.\r\n")
	})
}

func TestMultiLineReply(t *testing.T) {
	_, fl := setup(t, "")
	// RFC 959, 4.2: only the same code and a space end it.
	ask(fl, "HELP\r\n", "214-Commands\r\n 214 not yet\r\n200 nor this\r\n214-nor this\r\n2140\r\n\xff\x80 bytes\r\n214 end\r\n")
	ask(fl, "FEAT\r\n", "211-Features:\r\n MDTM\r\n EPSV\r\n211 End\r\n")
}

func TestMultiLineRepliesToNegotiations(t *testing.T) {
	g, fl := setup(t, "")
	fl.Client.Send(portIn)
	fl.Server.Expect(portOut)
	fl.Server.Send("200-one\r\n", "two\r\n", "200 three\r\n")
	fl.Client.Expect("200-one\r\ntwo\r\n200 three\r\n")
	g.Before(filtertest.Armed, "40000", filtertest.ToClient, "200-one")
	fl.Client.Send("PASV\r\n")
	fl.Server.Expect("PASV\r\n")
	fl.Server.Send("227-soon (203,0,113,10,0,22)\r\n", "227 (203,0,113,10,0,22)\r\n")
	fl.Client.Expect("425 Can't open data connection: the gateway allows no ports below 1024.\r\n")
}

func TestUnsolicitedReplies(t *testing.T) {
	g, fl := setup(t, "")
	fl.Server.Send("227 (203,0,113,10,19,137)\r\n229 (|||5001|)\r\n")
	fl.Client.Expect("227 (203,0,113,10,19,137)\r\n229 (|||5001|)\r\n")
	// Nor does the answer to another command open anything, whatever it says.
	ask(fl, "NOOP\r\n", "227 (203,0,113,10,19,137)\r\n")
	ask(fl, "PASV\r\n", "229 (|||5001|)\r\n")
	ask(fl, "EPSV\r\n", "227 (203,0,113,10,19,137)\r\n")
	ask(fl, "EPSV ALL\r\n", "229 (|||5001|)\r\n")
	permissions(t, g)
	fl.Server.Send("421 idle\r\n")
	fl.Client.Expect("421 idle\r\n")
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()
	if err := fl.Wait(); err != nil {
		t.Error(err)
	}
}

func TestPassiveReplies(t *testing.T) {
	const low = "425 Can't open data connection: the gateway allows no ports below 1024.\r\n"
	const bad = "425 Can't open data connection: the gateway does not understand the server's reply.\r\n"
	for _, c := range []struct{ command, reply, want string }{
		{"PASV", "227 203,0,113,10,19,137", ""},
		{"PASV", "227 =203,0,113,10,19,137", ""},
		{"PASV", "227 Entering Passive Mode (203,0,113,10,0,22)", low},
		{"PASV", "227 Entering Passive Mode (203,0,113,10,3,255)", low},
		{"PASV", "227 Entering Passive Mode (203,0,113,266,19,137)", bad},
		{"PASV", "227 Entering Passive Mode (203,0,113,10,19)", bad},
		{"PASV", "227 Entering Passive Mode (203,0,113,10,19,137,1)", bad},
		{"PASV", "227 Mode 2 (203,0,113,10,19,137)", bad},
		{"PASV", "227 (203,0,113,10,19,137) or (203,0,113,10,19,138)", bad},
		{"PASV", "227 Entering Passive Mode", bad},
		{"PASV", "227", bad},
		{"EPSV", "229 Extended (|||5001|)", ""},
		{"EPSV 1", "229 Extended (!!!5001!)", ""},
		{"EPSV", "229 Extended (|||22|)", low},
		{"EPSV", "229 Extended (|||0|)", low},
		{"EPSV", "229 Extended (|1|203.0.113.11|5001|)", bad},
		{"EPSV", "229 Extended (|||70000|)", bad},
		{"EPSV", "229 Extended (|||5001)", bad},
		{"EPSV", "229 (x) (|||5001|)", bad},
		{"EPSV", "229 (|||5001|) (|||5002|)", bad},
		{"EPSV", "229 |||5001|", bad},
	} {
		g, fl := setup(t, "")
		fl.Client.Send(c.command + "\r\n")
		fl.Server.Expect(c.command + "\r\n")
		fl.Server.Send(c.reply + "\r\n")
		if c.want != "" {
			fl.Client.Expect(c.want)
			permissions(t, g)
			ask(fl, "NOOP\r\n", "200 still in step\r\n")
			continue
		}
		fl.Client.Expect(c.reply + "\r\n")
		permissions(t, g, "allowed tcp 10.0.0.2 > 203.0.113.10:5001")
	}
}

func TestEPSVArguments(t *testing.T) {
	g, fl := setup(t, "")
	fl.Client.Exchange("EPSV 2\r\n", "522 Network protocol not supported, use (1)\r\n")
	fl.Client.Exchange("EPSV x\r\n", "501 EPSV refused by the gateway: syntax error in the argument.\r\n")
	fl.Client.Exchange("EPRT |2|fd00:a::2|5001|\r\n", "522 Network protocol not supported, use (1)\r\n")
	ask(fl, "EPSV ALL\r\n", "200 only EPSV now\r\n")
	fl.Client.Exchange(portIn, "503 PORT refused by the gateway: EPSV ALL is in force.\r\n")
	fl.Client.Exchange("PASV\r\n", "503 PASV refused by the gateway: EPSV ALL is in force.\r\n")
	ask(fl, "EPSV\r\n", "229 (|||5001|)\r\n")
	ask(fl, "REIN\r\n", "220 as new\r\n")
	ask(fl, "PASV\r\n", "227 (203,0,113,10,19,140)\r\n")
	permissions(t, g, "allowed tcp 10.0.0.2 > 203.0.113.10:5001", "cancelled tcp 10.0.0.2 > 203.0.113.10:5001",
		"allowed tcp 10.0.0.2 > 203.0.113.10:5004")
}

func TestIPv6(t *testing.T) {
	g := filtertest.New(t, New(), "")
	fl := g.Connect(client6, server6)
	fl.Server.Send(banner)
	fl.Client.Expect(banner)
	// A pinhole at the client's own address: the line passes unchanged.
	ask(fl, "EPRT |2|fd00:a::2|5001|\r\n", "200 ok\r\n")
	ask(fl, "EPSV\r\n", "229 (|||6001|)\r\n")
	ask(fl, "PASV\r\n", "227 (0,0,0,0,23,114)\r\n")
	fl.Client.Exchange("EPRT |1|10.0.0.2|5001|\r\n", "522 Network protocol not supported, use (2)\r\n")
	fl.Client.Exchange("EPRT |2|fd00:a::3|5001|\r\n", "504 EPRT refused by the gateway: the address is not the client's own.\r\n")
	fl.Client.Exchange(portIn, "504 PORT refused by the gateway: the address is not the client's own.\r\n")
	permissions(t, g,
		"reserved tcp [fd00:a::2]:5001 > [fd00:a::2]:5001 from []",
		"armed tcp [fd00:a::2]:5001 > [fd00:a::2]:5001 from [2001:db8:b::10]",
		"killed tcp [fd00:a::2]:5001 > [fd00:a::2]:5001 from [2001:db8:b::10]",
		"allowed tcp fd00:a::2 > [2001:db8:b::10]:6001",
		"cancelled tcp fd00:a::2 > [2001:db8:b::10]:6001",
		"allowed tcp fd00:a::2 > [2001:db8:b::10]:6002")
}

func TestEPRTAndRouted(t *testing.T) {
	_, fl := setup(t, "")
	fl.Client.Send("eprt !1!10.0.0.2!5001!\r\n")
	fl.Server.Expect("EPRT |1|203.0.113.1|40000|\r\n")

	g := filtertest.New(t, New(), "")
	g.Routed = true
	fl = talk(t, g)
	ask(fl, "port 10,0,0,2,19,137\r\n", "200 ok\r\n")
}

func TestGatewayCannotOpen(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{filterapi.ErrNoPorts, "425 Can't open data connection: no port is free at the gateway.\r\n"},
		{filterapi.ErrQuota, "425 Can't open data connection: too many are pending at the gateway.\r\n"},
		{filterapi.ErrPolicyDenied, "425 Can't open data connection: the gateway's rules do not allow it.\r\n"},
		{filterapi.ErrTerminating, "421 Service not available, the gateway is closing the connection.\r\n"},
		{errors.New("netlink"), "425 Can't open data connection at the gateway.\r\n"},
	} {
		g := filtertest.New(t, New(), "")
		g.Refuse = c.err
		fl := talk(t, g)
		fl.Client.Exchange(portIn, c.want)
		fl.Client.Send("EPSV\r\n")
		fl.Server.Expect("EPSV\r\n")
		fl.Server.Send("229 (|||5001|)\r\n")
		fl.Client.Expect(c.want)
		permissions(t, g)
		ask(fl, "NOOP\r\n", "200 still in step\r\n")
	}
}

func TestReadOnly(t *testing.T) {
	g, fl := setup(t, "read_only: true")
	for _, line := range []string{
		"STOR a", "stor a", "STOU", "APPE a", "DELE a", "RMD a", "XRMD a", "MKD a", "XMKD a", "RNFR a", "RNTO b",
		"SITE CHMOD 777 a", "MFMT 20250101000000 a", "MFCT 20250101000000 a", "MFF Modify=1; a", "COMB a b", "ALLO 1",
		"MDTM 20250101000000 a", "XFOO a",
	} {
		verb := strings.ToUpper(strings.Fields(line)[0])
		fl.Client.Exchange(line+"\r\n", "550 "+verb+" refused by the gateway: this rule is read-only.\r\n")
	}
	fl.Client.Exchange("ENC c3Rvcg==\r\n", "533 ENC refused by the gateway's rules: protected commands are not allowed.\r\n")
	nothingPassed(t, g)
	for _, line := range []string{"RETR a", "MDTM a", "LIST", "MLSD", "SIZE a", "XPWD", "XMD5 a", "HASH a", "CWD caf\xc3\xa9", "CWD caf\xe9"} {
		ask(fl, line+"\r\n", "250 ok\r\n")
	}
}

func TestAbort(t *testing.T) {
	// With urgent data in the stream, without, and by clients that make IAC
	// the urgent byte.
	for _, synch := range []string{"\xff\xf4\xff\xf2", "\xff\xf4\xff", "\xff\xf4\xf2", "\xf2", ""} {
		_, fl := setup(t, "")
		ask(fl, "RETR a\r\n", "150 here\r\n")
		fl.Client.Send(synch, "ABOR\r\n")
		fl.Server.Expect("ABOR\r\n")
		fl.Server.Send("426 cut\r\n226 aborted\r\n")
		fl.Client.Expect("426 cut\r\n226 aborted\r\n")
		ask(fl, "NOOP\r\n", "200 ok\r\n")
	}
}

func TestAbortWithOneReply(t *testing.T) {
	g, fl := setup(t, "")
	ask(fl, "RETR a\r\n", "150 here\r\n")
	ask(fl, "ABOR\r\n", "226 aborted\r\n")
	ask(fl, "PASV\r\n", "227 (203,0,113,10,19,137)\r\n")
	permissions(t, g, "allowed tcp 10.0.0.2 > 203.0.113.10:5001")
}

func TestReinitialise(t *testing.T) {
	g, fl := setup(t, "")
	ask(fl, "EPSV\r\n", "229 (|||5001|)\r\n")
	ask(fl, "REIN\r\n", "120 soon\r\n220 again\r\n")
	ask(fl, "USER x\r\n", "331 password\r\n")
	if open := g.Open(); len(open) > 0 {
		t.Errorf("open after REIN: %v", open)
	}
}

func TestHalfClose(t *testing.T) {
	_, fl := setup(t, "")
	fl.Client.Send("RETR a\r\nDELE b") // no line end: no command
	fl.Client.CloseWrite()
	fl.Server.Expect("RETR a\r\n")
	fl.Server.ExpectEOF()
	fl.Server.Send("150 here\r\n", "226 done\r\n221 bye")
	fl.Server.CloseWrite()
	fl.Client.Expect("150 here\r\n226 done\r\n221 bye")
	fl.Client.ExpectEOF()
	if err := fl.Wait(); err != nil {
		t.Error(err)
	}
}

func TestExtraCommands(t *testing.T) {
	_, fl := setup(t, "commands: [ladm, QUOTA9]")
	ask(fl, "LADM x\r\n", "200 ok\r\n")
	ask(fl, "quota9\r\n", "200 ok\r\n")
}

func TestOptions(t *testing.T) {
	for _, text := range []string{
		"read_only: true\nauth_tls: pass", "read_only: true\nmalformed: pass", "auth_tls: maybe", "malformed: drop",
		"commands: [STOR]", "commands: ['A B']", "commands: ['']", "commands: [ABCDEFGHIJKL]", "nosuch: 1", "read_only: [1]",
	} {
		if o, err := filtertest.ParseOptions(New(), text); err == nil {
			t.Errorf("%q is taken: %+v", text, o)
		}
	}
	if o, err := filtertest.ParseOptions(New(), "auth_tls: refuse\nmalformed: cut"); err != nil {
		t.Errorf("defaults: %v %v", o, err)
	}
}

// A slow end stops the other one; nothing grows without bound, and nothing is
// lost.
func TestBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		g.Window = 4 << 10
		fl := talk(t, g)
		line := "214-" + strings.Repeat("x", 1000) + "\r\n"
		var sent atomic.Int32
		go func() {
			for range 500 {
				if fl.Server.Offer(line) != nil {
					return
				}
				sent.Add(1)
			}
		}()
		synctest.Wait()
		// Two windows, what waits, and what is being sent.
		if n := int(sent.Load()) * len(line); n > 2*g.Window+3*maxPending {
			t.Errorf("%d bytes were taken for a client that does not read", n)
		}
		fl.Client.Expect(strings.Repeat(line, 500))
	})
}

func TestManyOutstanding(t *testing.T) {
	_, fl := setup(t, "")
	const n = 4 * maxOutstanding
	go func() {
		for range n {
			if fl.Client.Offer("NOOP\r\n") != nil {
				return
			}
		}
	}()
	for range n {
		fl.Server.Expect("NOOP\r\n")
		fl.Server.Send("200 ok\r\n")
		fl.Client.Expect("200 ok\r\n")
	}
}

// A server that has gone must not leave the client's reader waiting for its
// replies.
func TestServerGoesWithRepliesOutstanding(t *testing.T) {
	_, fl := setup(t, "")
	for range 2 * maxOutstanding {
		fl.Client.Send("NOOP\r\n")
	}
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
	fl.Server.Expect(strings.Repeat("NOOP\r\n", 2*maxOutstanding))
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()
	if err := fl.Wait(); err != nil {
		t.Error(err)
	}
}

// What was given to a socket is the next owner's, also the memory behind it.
func TestSentBytesAreNotTouchedAgain(t *testing.T) {
	c := newControl(nil, nil, nil, nil)
	server := &keeper{}
	c.server.sock = server
	c.server.out = append(make([]byte, 0, 100), "first"...)
	c.flush()
	c.server.out = append(c.server.out, "second"...)
	for _, b := range server.got {
		_ = append(b, "changed"...)
	}
	if len(server.got) != 1 || string(server.got[0]) != "first" || string(c.server.out) != "second" {
		t.Errorf("sent %q, to be sent %q", server.got, c.server.out)
	}
}

// keeper keeps what it is sent.
type keeper struct {
	filterapi.Socket
	got [][]byte
}

func (k *keeper) Send(b *filterapi.Buffer) error {
	k.got = append(k.got, b.Data)
	return nil
}

// What one reader adds while the other one sends to the same end leaves behind
// it, by the one that sends.
func TestSenderTakesAlongWhatIsNew(t *testing.T) {
	c := newControl(nil, nil, nil, nil)
	client := &slow{sending: make(chan struct{}), let: make(chan struct{})}
	c.client.sock = client
	c.client.out = []byte("first")
	done := make(chan struct{})
	go func() {
		c.flush()
		close(done)
	}()
	<-client.sending
	c.mu.Lock()
	c.client.out = append(c.client.out, "second"...)
	c.mu.Unlock()
	c.flush() // does not wait
	if len(client.got) != 0 {
		t.Errorf("sent %q", client.got)
	}
	close(client.let)
	<-done
	if want := [][]byte{[]byte("first"), []byte("second")}; !slices.EqualFunc(client.got, want, bytes.Equal) {
		t.Errorf("sent %q", client.got)
	}
}

// slow takes its first buffer when it is let go.
type slow struct {
	keeper
	sending, let chan struct{}
	once         sync.Once
}

func (s *slow) Send(b *filterapi.Buffer) error {
	s.once.Do(func() { close(s.sending) })
	<-s.let
	return s.keeper.Send(b)
}
