package netns_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// curl of Debian speaks every version.
func TestSocksCurl(t *testing.T) {
	eachSocks(t, socksConfig(openly+"  # a comment"), func(s *scene) {
		peers := s.Srv.HTTP(80)
		_, hash := lab.Content(1 << 20)
		versions := []string{"--socks5", "--socks5-hostname"}
		if s.srv.Is4() {
			versions = append(versions, "--socks4", "--socks4a")
		}
		for _, v := range versions {
			out := filepath.Join(s.Dir(), "got"+v)
			s.Client.Run("curl", "-gsS", "--max-time", "20", v, fmt.Sprintf("%s:1080", bracketed(s.inside)), "-o", out, s.url(80, 1<<20))
			if got, err := os.ReadFile(out); err != nil || lab.Hash(got) != hash {
				t.Errorf("%s: %d bytes with another hash, %v", v, len(got), err)
			}
		}
		for _, p := range peers.Addrs() {
			if p.Addr() != s.outside {
				t.Errorf("the server saw %v, want the gateway's %v", p, s.outside)
			}
		}
		r := s.flowRecord(to(s.srv, 80), resultIs("closed"))
		if r.Text("path") != "user" || r.Text("rule") != "plain" {
			t.Errorf("record %v", r)
		}
		_ = time.Second
	})
}
