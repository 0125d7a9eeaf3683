package main

import (
	"errors"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFTPAddresses(t *testing.T) {
	at := &unix.SockaddrInet4{Addr: [4]byte{198, 18, 0, 7}, Port: 40001}
	if got := hostPort(at); got != "198,18,0,7,156,65" {
		t.Errorf("got %s", got)
	}
	back, err := passiveAddress("227 Entering Passive Mode (" + hostPort(at) + ").")
	if err != nil || *back != *at {
		t.Errorf("got %v, %v", back, err)
	}
	for _, bad := range []string{"227 Entering Passive Mode", "227 (1,2,3,4,5)", "227 (1,2,3,4,5,256)", "227 (a,2,3,4,5,6)"} {
		if a, err := passiveAddress(bad); err == nil {
			t.Errorf("%q is %v", bad, a)
		}
	}
}

// Replies come in pieces, and several at a time.
func TestFTPLines(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	var r lineReader
	for _, c := range []struct {
		text string
		want []string
	}{
		{"150 Here", nil}, {" it comes.\r", nil}, {"\n226 Done.\r\n22", []string{"150 Here it comes.", "226 Done."}}, {"1 \r\n", []string{"221 "}},
	} {
		if _, err := unix.Write(fds[0], []byte(c.text)); err != nil {
			t.Fatal(err)
		}
		if got, err := r.read(fds[1]); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("after %q: %q, %v, want %q", c.text, got, err, c.want)
		}
	}
	unix.Close(fds[0])
	if _, err := r.read(fds[1]); !errors.Is(err, errEnded) {
		t.Errorf("at the end: %v", err)
	}
}

// The two connections of a session differ in their ports alone, and those of
// other sessions from both.
func TestFTPFlows(t *testing.T) {
	seen := map[[6]byte]bool{}
	for n := range uint32(connections) {
		k := n/256*512 + n%256
		c, s, p := ends(k)
		c2, s2, p2 := ends(k + 256)
		if c != c2 || s != s2 || p == p2 {
			t.Fatalf("session %d: %v to %v, port %d, and %v to %v, port %d", n, c, s, p, c2, s2, p2)
		}
		for _, port := range []uint16{p, p2} {
			key := [6]byte{s[0], s[1], s[2], s[3], byte(port >> 8), byte(port)}
			if seen[key] {
				t.Fatalf("session %d: port %d to %v comes twice", n, port, s)
			}
			seen[key] = true
		}
	}
}

// The load of FTP, through the kernel's helper: each of its kinds has transfers.
func TestFTPLoad(t *testing.T) {
	s := &stand{}
	t.Cleanup(s.close)
	s.declareFTP(t.Context(), "")
	if err := s.helper.up(); err != nil {
		t.Fatal(err)
	}
	const length = 100 * time.Millisecond
	for _, c := range s.ftpCases(length) {
		a, err := c.load(s.helper)
		// A machine that is busy may have no session done in so short a time.
		for begun := time.Now(); err == nil && a.units == 0 && time.Since(begun) < 10*time.Second; {
			a, err = c.load(s.helper)
		}
		if err != nil || a.units == 0 || a.time <= 0 {
			t.Errorf("%s: %v units in %v, %v", c.name, a.units, a.time, err)
		}
	}
}
