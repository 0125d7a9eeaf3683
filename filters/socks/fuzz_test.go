package socks

import (
	"bytes"
	"io"
	"net/netip"
	"testing"
	"time"
)

// countReader says how much was taken.
type countReader struct {
	r io.Reader
	n int
}

func (c *countReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += n
	return n, err
}

var seeds = []string{
	"\x01\x00\x50\xcb\x00\x71\x0auser\x00",
	"\x01\x00\x50\x00\x00\x00\x01user\x00example.org\x00rest",
	"\x05\x01\x00\x01\xcb\x00\x71\x0a\x00\x50",
	"\x05\x01\x00\x03\x0bexample.org\x00\x50rest",
	"\x05\x03\x00\x04aaaaaaaaaaaaaaaa\x00\x35",
	"\x05\x01\x00\x03\x00\x00\x50", "\x05\x01\x00\x03\xff", "\x05\x01\x00\x02", "\x04", "",
}

// What is read as a request has a target that can be dialled or asked for, and
// not a byte behind it was taken.
func FuzzRequest(f *testing.F) {
	for _, s := range seeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for version, parse := range map[byte]func(io.Reader) (request, error){version4: readRequest4, version5: readRequest5} {
			r := &countReader{r: bytes.NewReader(b)}
			q, err := parse(r)
			if err != nil {
				continue
			}
			if q.version != version || q.target.addr.IsValid() == (q.target.name != "") || len(q.target.name) > maxName {
				t.Fatalf("% x: %+v", b, q)
			}
			again, err := parse(bytes.NewReader(b[:r.n]))
			if err != nil || again != q {
				t.Fatalf("% x: %+v of the first %d bytes, %v", b, again, r.n, err)
			}
			if r.n > 0 {
				if _, err := parse(bytes.NewReader(b[:r.n-1])); err == nil {
					t.Fatalf("% x: one byte less does as well", b)
				}
			}
			for _, c := range []code{granted, failed, badAddress} {
				if a := q.answer(c, netip.AddrPortFrom(q.target.addr, q.target.port)); len(a) < 8 || len(a) > 22 {
					t.Fatalf("answer % x", a)
				}
			}
		}
	})
}

// What stands behind the head of a datagram is the payload, all of it.
func FuzzDatagram(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x01\xcb\x00\x71\x0a\x00\x35payload"))
	f.Add([]byte("\x00\x00\x01\x03\x01a\x00\x35"))
	f.Add([]byte("\x00\x00\x00\x09"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, err := cutDatagram(b)
		if err != nil {
			return
		}
		if !bytes.HasSuffix(b, payload) || h.fragment != b[2] {
			t.Fatalf("% x: %+v, % x", b, h, payload)
		}
		if !h.target.addr.IsValid() {
			return
		}
		head := appendHead(nil, netip.AddrPortFrom(h.target.addr, h.target.port))
		g, rest, err := cutDatagram(append(head, payload...))
		if err != nil || g.target != h.target || !bytes.Equal(rest, payload) {
			t.Fatalf("% x: made anew it is %+v, % x, %v", b, g, rest, err)
		}
	})
}

// Whatever a client says, in whatever pieces, the gateway hangs up or does as it
// was asked, and dials nobody but the one that is there.
func FuzzConversation(f *testing.F) {
	for i, s := range seeds {
		f.Add([]byte("\x05\x01\x00"+s), i)
		f.Add([]byte("\x04"+s), i)
	}
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), 3)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		s := settings()
		s.Handshake, s.Connect, s.Bind = 50*time.Millisecond, 50*time.Millisecond, 50*time.Millisecond
		s.Resolvers = []netip.Addr{netip.MustParseAddr("192.0.2.53")} // which is not there
		g, _ := start(t, s)
		c := dial(t, g, alice)
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		go func() {
			cut = min(max(cut, 0), len(b))
			_, _ = c.Write(b[:cut])
			_, _ = c.Write(b[cut:])
			time.Sleep(60 * time.Millisecond)
			_ = c.Close()
		}()
		_, _ = io.Copy(io.Discard, c)
		for _, fl := range g.Flows() {
			if to := fl.Conn.Tuple().Dst.Addr(); to.IsLoopback() || to == inside.Addr() || to == g.External {
				t.Fatalf("% x reaches %v", b, to)
			}
		}
	})
}
