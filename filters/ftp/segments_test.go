package ftp

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/filterapi/filtertest"
)

// script is a whole conversation: what the client sends and what the server
// answers to each line that reaches it.
var script = []struct{ client, atServer, server string }{
	{"USER anonymous\r\n", "", "331 password\r\n"},
	{"PASS a@b\r\n", "", "230-welcome\r\n230 is not the end\r\n"},
	{"TYPE I\r\n", "", "200 ok\r\n"},
	{"PORT 10,0,0,2,19,137\r\n", "PORT 203,0,113,1,156,64\r\n", "200 ok\r\n"},
	{"RETR a\r\n", "", "150 here\r\n226 done\r\n"},
	{"PORT 10,0,0,3,19,137\r\n", "-", ""},
	{"STOR b\r\n", "-", ""},
	{"PASV\r\n", "", "227 Entering Passive Mode (192,168,7,7,19,138).\r\n"},
	{"LIST\r\n", "", "125 here\r\n226 done\r\n"},
	{"\r\n", "-", ""},
	{"EPRT |1|10.0.0.2|5003|\r\n", "EPRT |1|203.0.113.1|40001|\r\n", "500 no\r\n"},
	{"EPSV\r\n", "", "229 Extended (|||5004|)\r\n"},
	{"CWD caf\xc3\xa9 \xe2\x82\xac \xe9\r\n", "", "250 \"caf\xc3\xa9\"\r\n"},
	{"AUTH TLS\r\n", "-", ""},
	{"STAT\r\n", "", "211-status\r\n 227 (1,2,3,4,5,6)\r\n227 x\r\n211 end\r\n"},
	{"\xff\xf4\xff\xf2ABOR\r\n", "ABOR\r\n", "226 aborted\r\n"},
	{"EPSV 2\r\n", "-", ""},
	{"QUIT\r\n", "", "221 bye\r\n"},
}

// split cuts a text into random segments, short ones more often than long.
func split(r *rand.Rand, text string) []string {
	var out []string
	for len(text) > 0 {
		n := 1 + r.IntN(1+r.IntN(len(text)))
		out = append(out, text[:n])
		text = text[n:]
	}
	return out
}

// converse plays the script, pipelined or in step, and gives what came out.
func converse(t *testing.T, r *rand.Rand, pipelined bool) (toServer, toClient string, permissions []string) {
	g, fl := setup(t, "read_only: true")
	cut := func(s string) []string {
		if r == nil {
			return []string{s}
		}
		return split(r, s)
	}
	answers := make(chan string)
	go func() {
		all, _ := fl.Client.ReadAll()
		answers <- all
	}()
	all := ""
	for _, step := range script {
		all += step.client
	}
	if pipelined {
		fl.Client.Send(cut(all)...)
	}
	for _, step := range script {
		if !pipelined {
			fl.Client.Send(cut(step.client)...)
		}
		if step.atServer == "-" {
			continue
		}
		want := step.atServer
		if want == "" {
			want = step.client
		}
		fl.Server.Expect(want)
		fl.Server.Send(cut(step.server)...)
	}
	fl.Server.CloseWrite()
	toClient = <-answers
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()
	if err := fl.Wait(); err != nil {
		t.Errorf("Pump: %v", err)
	}
	return g.Sent(filtertest.ToServer), toClient, g.Permissions()
}

// Whatever the segments are, the bytes and the permissions are the same.
func TestAnySegmentation(t *testing.T) {
	wantServer, wantClient, wantPermissions := converse(t, nil, false)
	slices.Sort(wantPermissions)
	for _, text := range []string{"203,0,113,10,19,138", "550 STOR", "504 PORT", "534 AUTH", "500 Empty", "522 ", "221 bye"} {
		if !strings.Contains(wantClient, text) {
			t.Fatalf("the client has no %q:\n%s", text, wantClient)
		}
	}
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 1))
		server, client, permissions := converse(t, r, seed%2 == 0)
		slices.Sort(permissions) // the two directions are read side by side
		if server != wantServer || client != wantClient || !slices.Equal(permissions, wantPermissions) {
			t.Fatalf("seed %d:\nserver %q\nwant   %q\nclient %q\nwant   %q\npermissions %q\nwant        %q",
				seed, server, wantServer, client, wantClient, permissions, wantPermissions)
		}
	}
}
