package filtertest_test

import (
	"os"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// tutorial: test

func TestRendezvous(t *testing.T) {
	g := filtertest.New(t, Rendezvous{}, "")
	fl := g.Connect(client, server)
	fl.Client.Send("HEL", "LO\r\n") // two segments
	fl.Server.Expect("HELLO\r\n")
	fl.Server.Send("DATA 22\r\nDA", "TA 5001\r\n")
	fl.Client.Expect("DATA 22\r\nDATA 5001\r\n")
	g.Before(filtertest.Allowed, ":5001", filtertest.ToClient, "DATA 5001")
	if got := strings.Join(g.Open(), " "); got != "tcp 10.0.0.2 > 203.0.113.10:5001" {
		t.Errorf("open: %s", got)
	}
	if !g.Dial(flow.TCP, client.Addr(), fl.Server.Addr(5001)) {
		t.Error("the second connection is not let out")
	}
	fl.Server.Send("DATA 5002\r\n")
	fl.Client.Expect("DATA 5002\r\n")
	fl.Client.Reset()
	if err := fl.Wait(); err == nil || len(g.Open()) > 0 {
		t.Errorf("after a reset: %v, open %v", err, g.Open())
	}
}

// tutorial: end

// The tutorial shows the code that was compiled and run.
func TestTutorialIsThisCode(t *testing.T) {
	page, err := os.ReadFile("../../docs/writing-a-filter.md")
	if err != nil {
		t.Fatal(err)
	}
	for file, mark := range map[string]string{"example_test.go": "filter", "tutorial_test.go": "test"} {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, code, _ := strings.Cut(string(source), "// tutorial: "+mark+"\n")
		code, _, ok := strings.Cut(code, "// tutorial: end")
		if code = strings.TrimSpace(code); !ok || !strings.Contains(string(page), code) {
			t.Errorf("docs/writing-a-filter.md does not show the code of %s", file)
		}
	}
}
