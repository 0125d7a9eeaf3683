package kernelpath

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var spaceNumber atomic.Uint32

// space is a network namespace that lives as long as its test.
type space struct {
	t    testing.TB
	name string
}

// newSpace makes a network namespace with lo up.
func newSpace(t testing.TB) space {
	t.Helper()
	s := space{t, fmt.Sprintf("slc%dk%d", os.Getpid(), spaceNumber.Add(1))}
	if out, err := exec.Command("ip", "netns", "add", s.name).CombinedOutput(); err != nil {
		t.Fatalf("make a network namespace (root is needed): %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", s.name).Run() })
	s.sh("ip link set lo up")
	return s
}

// sh runs a script inside and gives its output.
func (s space) sh(script string) string {
	s.t.Helper()
	out, err := s.try(script)
	if err != nil {
		s.t.Fatalf("in %s: %s: %v: %s", s.name, script, err, out)
	}
	return out
}

func (s space) try(script string) (string, error) {
	out, err := exec.Command("ip", "netns", "exec", s.name, "sh", "-ec", script).CombinedOutput()
	return string(out), err
}

// nft loads a ruleset inside.
func (s space) nft(rules string) {
	s.t.Helper()
	cmd := exec.Command("ip", "netns", "exec", s.name, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("nft in %s: %v: %s", s.name, err, out)
	}
}

// in runs f on a thread of the namespace. Sockets that f opens stay there and
// may be used from everywhere. f must not call FailNow.
func (s space) in(f func() error) {
	s.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			fd, err := os.Open("/run/netns/" + s.name)
			if err != nil {
				return err
			}
			defer fd.Close()
			if err := unix.Setns(int(fd.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			return f()
		}()
	}()
	if err := <-done; err != nil {
		s.t.Fatalf("in %s: %v", s.name, err)
	}
}

// made runs a constructor inside.
func made[T any](s space, f func() (T, error)) T {
	s.t.Helper()
	var v T
	s.in(func() (err error) { v, err = f(); return err })
	return v
}

// wire joins two namespaces by a veth pair, both ends up.
func wire(a space, aName string, b space, bName string) {
	a.t.Helper()
	a.sh(fmt.Sprintf("ip link add %s type veth peer name %s netns %s; ip link set %s up", aName, bName, b.name, aName))
	b.sh("ip link set " + bName + " up")
}

// journey is a client and a server with a translating gateway between them:
// client 10.0.0.2, fd00:a::2 | gateway | server 203.0.113.10, 2001:db8:b::10.
type journey struct{ client, gw, server space }

func newJourney(t testing.TB) journey {
	t.Helper()
	j := journey{newSpace(t), newSpace(t), newSpace(t)}
	wire(j.gw, "lan0", j.client, "eth0")
	wire(j.gw, "wan0", j.server, "eth0")
	j.client.sh(`ip addr add 10.0.0.2/24 dev eth0; ip -6 addr add fd00:a::2/64 dev eth0 nodad
		ip route add default via 10.0.0.1; ip -6 route add default via fd00:a::1`)
	j.server.sh(`ip addr add 203.0.113.10/24 dev eth0; ip -6 addr add 2001:db8:b::10/64 dev eth0 nodad
		ip -6 route add default via 2001:db8:b::1`)
	j.gw.sh(`ip addr add 10.0.0.1/24 dev lan0; ip -6 addr add fd00:a::1/64 dev lan0 nodad
		ip addr add 203.0.113.1/24 dev wan0; ip -6 addr add 2001:db8:b::1/64 dev wan0 nodad
		sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1`)
	return j
}

// connectTCP makes a connection from the client to the server and returns both
// ends.
func connectTCP(j journey, to string) (client, server *net.TCPConn) {
	j.client.t.Helper()
	l := made(j.server, func() (net.Listener, error) { return net.Listen("tcp", to) })
	defer l.Close()
	c := made(j.client, func() (net.Conn, error) { return net.Dial("tcp", to) })
	s, err := l.Accept()
	if err != nil {
		j.client.t.Fatal(err)
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// exchange sends n bytes from one end and reads them at the other.
func exchange(t *testing.T, from, to net.Conn, n int) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(make([]byte, n))
		sent <- err
	}()
	to.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.CopyN(io.Discard, to, int64(n)); err != nil {
		t.Fatalf("%d bytes: %v", n, err)
	}
	if err := next(t, "end of the sender", sent); err != nil {
		t.Fatal(err)
	}
}
