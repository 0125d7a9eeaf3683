package netns_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// RFC 4787, REQ-8: who may send to a mapping, by the rule's filtering. Whoever
// was refused is heard once the client has spoken to him, at the same external
// address; and none of it needs the daemon.
func TestNUDP08Filtering(t *testing.T) {
	for _, m := range modes {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			g := l.Gateway(m.config(""))
			client := socket(l.Client, clientAt)
			peer, samehost, stranger := socket(l.Srv, to(lab.Srv4, 9000)), socket(l.Srv, to(lab.Srv4, 9001)), socket(l.Other, to(lab.Other4, 9000))
			at := seenBy(t, peer, client)
			check := func(when string) {
				t.Helper()
				t.Log(when)
				if from := reaches(t, peer, at, client); from != addrPort(peer) {
					t.Errorf("the peer's answer comes from %v", from)
				}
				if m.filtering == byAddressPort {
					lost(t, samehost, at, client)
				} else if from := reaches(t, samehost, at, client); from != addrPort(samehost) {
					t.Errorf("another port's datagram comes from %v", from)
				}
				if m.filtering != independent {
					lost(t, stranger, at, client)
				} else if from := reaches(t, stranger, at, client); from != addrPort(stranger) {
					t.Errorf("a stranger's datagram comes from %v", from)
				}
			}
			check("as it is")
			g.Freeze()
			check("while the daemon stands still")
			g.Thaw()
			if m.mapping != independent {
				return
			}
			if seen := seenBy(t, stranger, client); seen != at {
				t.Errorf("who was refused sees %v, the peer saw %v", seen, at)
			}
			reaches(t, stranger, at, client)
		})
	}
}

// A stranger who may not send gets no answer at all, and what he sends does not
// become an entry that stands in the client's way.
func TestNUDP08Silence(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(mode{independent, byAddressPort}.config(""))
	client := socket(l.Client, clientAt)
	at := seenBy(t, socket(l.Srv, to(lab.Srv4, 9000)), client)
	seen := l.Other.Capture()
	stranger := socket(l.Other, to(lab.Other4, 9000))
	for range 20 {
		sends(t, stranger, at)
	}
	lost(t, stranger, at, client)
	if n := len(lab.Select(seen.Stop(), func(s lab.Seen) bool { return !s.Out && s.Src.Addr() == lab.Outside4 })); n != 0 {
		t.Errorf("the stranger got %d packets from the gateway", n)
	}
	if from := seenBy(t, stranger, client); from != at {
		t.Errorf("the stranger sees %v, the peer saw %v", from, at)
	}
}

// REQ-9: two inside hosts reach each other by their external addresses, and each
// sees the other's external one, under the filtering of the rule. A host reaches
// itself as well.
func TestNUDP09Hairpin(t *testing.T) {
	for _, m := range modes[:3] {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(""))
			server := socket(l.Srv, to(lab.Srv4, 9000))
			client, second, third := socket(l.Client, clientAt), socket(l.Client2, secondAt), socket(l.Client, to(lab.Client4, 5001))
			a, b, c := seenBy(t, server, client), seenBy(t, server, second), seenBy(t, server, third)
			if m.filtering == independent {
				if from := reaches(t, client, b, second); from != a {
					t.Errorf("the second host saw %v, want the first one's external %v", from, a)
				}
			} else {
				lost(t, client, b, second)
			}
			if from := reaches(t, second, a, client); from != b {
				t.Errorf("the first host saw %v, want the second one's external %v", from, b)
			}
			if from := reaches(t, client, b, second); from != a {
				t.Errorf("the second host saw %v, want the first one's external %v", from, a)
			}
			// Which of two packets of different flows is judged first nobody says.
			lab.Eventually(t, 10*time.Second, "one socket of a host reaches another", func() bool {
				if m.filtering != independent {
					sends(t, third, a)
				}
				from, ok := hears(t, third, sends(t, client, c), silence())
				if ok && from != a {
					t.Errorf("another socket of the same host saw %v, want the external %v", from, a)
				}
				return ok
			})
			if seen := seenBy(t, server, client); seen != a {
				t.Errorf("after the hairpin the server sees %v, before it was %v", seen, a)
			}
		})
	}
	t.Run("plain masquerade does not", func(t *testing.T) {
		t.Parallel()
		l := lab.New(t)
		masquerade(l, "")
		server := socket(l.Srv, to(lab.Srv4, 9000))
		client, second := socket(l.Client, clientAt), socket(l.Client2, netip.AddrPortFrom(lab.Second4, 5001))
		a, b := seenBy(t, server, client), seenBy(t, server, second)
		sends(t, second, a)
		lost(t, client, b, second)
	})
}

// A packet that the gateway lets go nowhere leaves nobody known to whom it was
// sent: the memory of it goes when flows are counted, and those of flows stay.
func TestNUDP08PacketThatDied(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	m := mode{independent, byAddress}
	g := l.Gateway(m.config(""))
	client, peer, stranger := socket(l.Client, clientAt), socket(l.Srv, to(lab.Srv4, 9000)), socket(l.Other, to(lab.Other4, 9000))
	at := seenBy(t, peer, client)
	short, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	ttl := func(n int) {
		if err := errors.Join(short.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, n) }), err); err != nil {
			t.Fatal(err)
		}
	}
	peers := func() string { return l.GW.Run("nft", "list", "set", "inet", "sluice", "peer4") }
	ttl(1)
	for i := range 20 {
		sends(t, client, to(lab.Other4, 9000+i))
	}
	lab.Eventually(t, 5*time.Second, "the kernel knows whom they were sent to", func() bool { return strings.Contains(peers(), lab.Other4.String()) })
	g.Reload(m.config("")) // has flows counted
	lab.Eventually(t, 15*time.Second, "it knows no more", func() bool { return !strings.Contains(peers(), lab.Other4.String()) })
	lost(t, stranger, at, client)
	reaches(t, peer, at, client)
	ttl(64)
	seenBy(t, stranger, client)
	reaches(t, stranger, at, client)
}
