package tftp

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/sluicegw/sluice/filterapi/filtertest"
)

var requestSeeds = []string{
	getFile, req(wrq, "file", "netascii"), req(rrq, "f", "octet", "blksize", "1428", "tsize", "0"), req(rrq, "f", "octet", "multicast", ""),
	req(rrq, "f", "mail"), req(rrq, "", "octet"), req(rrq, "f\x00g", "octet"), req(wrq, "f", "octet", "windowsize", "0"), "\x00\x01f\x00octet",
	"\x00\x03\x00\x01data", "\x00\x04\x00\x01", "\x00\x05\x00\x01no\x00", "\x00\x06tsize\x001\x00", "\x00\x01\x00\x08\x21\x12\xa4\x42abcdefghijkl", "", "\x00",
}

// A request that is read is written again as it was, but for multicast, and
// that is read as the same.
func FuzzRequest(f *testing.F) {
	for _, s := range requestSeeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		r, err := parseRequest([]byte(in))
		if err != nil {
			return
		}
		out := string(r.message())
		if !strings.Contains(strings.ToLower(in), multicast) && out != in {
			t.Fatalf("%q becomes %q", in, out)
		}
		again, err := parseRequest([]byte(out))
		if err != nil || string(again.message()) != out || again.op != r.op || again.file != r.file || again.mode != r.mode {
			t.Fatalf("%q becomes %q, and that %+v, %v", in, out, again, err)
		}
		if strings.Count(in, "\x00") != 3+2*len(r.options) || r.file == "" || len(in) > 512 { // the opcode has a zero as well
			t.Fatalf("%q is taken for a request", in)
		}
	})
}

// Any datagrams of both ends: no panic, no hang; nothing opens without a whole
// request, nothing else reaches the server, and nothing stays open.
func FuzzRequests(f *testing.F) {
	const sep = "\xff\xfe"
	f.Add(strings.Join(requestSeeds, sep), strings.Join(requestSeeds, sep), false)
	for i, s := range requestSeeds {
		f.Add(s+sep+s, requestSeeds[len(requestSeeds)-1-i], i%2 == 0)
	}
	f.Fuzz(func(t *testing.T, client, server string, readOnly bool) {
		if len(client)+len(server) > 16<<10 {
			return
		}
		g := filtertest.New(t, New(), fmt.Sprintf("read_only: %v", readOnly))
		fl, err := g.Associate(client4, server4)
		if err != nil {
			t.Fatal(err)
		}
		var ends sync.WaitGroup
		for end, text := range map[*filtertest.End]string{fl.Client: client, fl.Server: server} {
			ends.Go(func() {
				for datagram := range strings.SplitSeq(text, sep) {
					if end.Offer(datagram) != nil {
						return
					}
				}
				end.CloseWrite()
			})
			ends.Go(func() { _, _ = end.ReadAll() })
		}
		_ = fl.Wait()
		fl.Cut()
		ends.Wait()
		if open := g.Open(); len(open) > 0 {
			t.Errorf("open at the end: %v", open)
		}
		judge(t, g, strings.Split(client, sep), readOnly)
	})
}

// judge is the oracle: each permission is for the answer to a request that the
// client sent, in the plainest reading of it.
func judge(t *testing.T, g *filtertest.Gateway, sent []string, readOnly bool) {
	t.Helper()
	asked := 0
	for _, s := range sent {
		if fields := strings.Split(s, "\x00"); len(fields) >= 4 && fields[0] == "" && fields[len(fields)-1] == "" {
			mode := strings.ToLower(fields[2])
			write := strings.HasPrefix(fields[1], wrq)
			if (write && !readOnly || strings.HasPrefix(fields[1], rrq)) && len(fields[1]) > 1 && (mode == "octet" || mode == "netascii") {
				asked++
			}
		}
	}
	passed := 0
	for _, e := range g.Journal() {
		switch e.What {
		case filtertest.Bound:
			if asked--; asked < 0 || e.Text != bind {
				t.Errorf("opened without being asked for: %v", e)
			}
		case filtertest.ToServer:
			passed++
			if op, _ := opcodeOf([]byte(e.Text)); op != opRead && (op != opWrite || readOnly) {
				t.Errorf("the server saw %q", e.Text)
			}
		case filtertest.ToClient:
			if !isError([]byte(e.Text)) {
				t.Errorf("the client saw %q", e.Text)
			}
		case filtertest.Allowed, filtertest.Reserved:
			t.Errorf("opened: %v", e)
		}
	}
	if passed > len(sent) {
		t.Errorf("the server saw %d datagrams of %d", passed, len(sent))
	}
}
