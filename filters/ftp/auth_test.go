package ftp

import (
	"errors"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
)

func TestAuthRefused(t *testing.T) {
	g, fl := setup(t, "")
	for _, line := range []string{"AUTH TLS", "AUTH SSL", "auth tls-c", "AUTH GSSAPI", "AUTH"} {
		fl.Client.Exchange(line+"\r\n", "534 AUTH refused by the gateway's rules: encrypted control connections are not allowed.\r\n")
	}
	nothingPassed(t, g)
}

func TestAuthPassed(t *testing.T) {
	g, fl := setup(t, "auth_tls: pass")
	// What follows AUTH is not read as a command before the reply.
	hidden := "\x16\x03\x01 STOR PORT 10,0,0,2,0,22\r\n"
	fl.Client.Send("AUTH TLS\r\n" + hidden)
	fl.Server.Expect("AUTH TLS\r\n")
	fl.Server.Send("234 go\r\n\x16\x03\x03")
	fl.Client.Expect("234 go\r\n\x16\x03\x03")
	fl.Server.Expect(hidden)
	if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
		t.Fatalf("Pump: %v, want ErrReleased", err)
	}
	fl.Client.Send("\x17\x00")
	fl.Server.Expect("\x17\x00")
	fl.Server.Send("\x17\x01")
	fl.Client.Expect("\x17\x01")
	permissions(t, g)
}

func TestAuthDeclinedByServer(t *testing.T) {
	g, fl := setup(t, "auth_tls: pass")
	fl.Client.Send("AUTH TLS\r\n" + portIn)
	fl.Server.Expect("AUTH TLS\r\n")
	permissions(t, g)
	fl.Server.Send("504 no\r\n")
	fl.Client.Expect("504 no\r\n")
	fl.Server.Expect(portOut)
	fl.Server.Send("200 ok\r\n")
	fl.Client.Expect("200 ok\r\n")
	permissions(t, g, reserved, armed)
	// GSSAPI takes two commands.
	ask(fl, "AUTH GSSAPI\r\n", "334 more\r\n")
	ask(fl, "ADAT YWJj\r\n", "235 done\r\n")
	if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
		t.Errorf("Pump: %v, want ErrReleased", err)
	}
	if open := g.Open(); len(open) > 0 {
		t.Errorf("open after the release: %v", open)
	}
}

func TestServerGoesBeforeAuth(t *testing.T) {
	_, fl := setup(t, "auth_tls: pass")
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
	fl.Client.Send("AUTH TLS\r\nNOOP\r\n")
	fl.Server.Expect("AUTH TLS\r\nNOOP\r\n")
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()
	if err := fl.Wait(); err != nil {
		t.Error(err)
	}
}
