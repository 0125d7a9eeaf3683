package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// Peers collects the far addresses that a server saw. Safe for concurrent use.
type Peers struct {
	mu  sync.Mutex
	all []netip.AddrPort
}

func (p *Peers) add(a net.Addr) {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
}

// Addrs are the addresses so far, in the order of their coming.
func (p *Peers) Addrs() []netip.AddrPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]netip.AddrPort(nil), p.all...)
}

// ServeTCP runs a handler for every connection to a port of this host, both
// families. It is ready when it returns and ends with the lab; the handler
// closes nothing.
func (h *Host) ServeTCP(port int, handle func(*net.TCPConn)) *Peers {
	h.lab.T.Helper()
	l := h.MustListen("tcp", ":"+strconv.Itoa(port))
	peers := &Peers{}
	ctx, cancel := context.WithCancel(context.Background())
	h.lab.OnClose(cancel)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			peers.add(c.RemoteAddr())
			go func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { _ = c.Close() })()
				handle(c.(*net.TCPConn))
			}()
		}
	}()
	return peers
}

// EchoTCP answers every byte with itself, and a half-close with one.
func (h *Host) EchoTCP(port int) *Peers {
	h.lab.T.Helper()
	return h.ServeTCP(port, func(c *net.TCPConn) {
		_, _ = io.Copy(c, c)
		_ = c.CloseWrite()
	})
}

// EchoUDP answers every datagram with itself from the address it was sent to.
func (h *Host) EchoUDP(port int) *Peers {
	h.lab.T.Helper()
	peers := &Peers{}
	for _, address := range []string{"0.0.0.0", "[::]"} {
		network := map[bool]string{true: "udp4", false: "udp6"}[address == "0.0.0.0"]
		c := h.MustListenPacket(network, address+":"+strconv.Itoa(port))
		go func() {
			b := make([]byte, 65536)
			for {
				n, from, err := c.ReadFromUDPAddrPort(b)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					peers.add(net.UDPAddrFromAddrPort(from))
					_, _ = c.WriteToUDPAddrPort(b[:n], from)
				}
			}
		}()
	}
	return peers
}

// Content is n bytes that are the same for the same n, and their hash.
func Content(n int) ([]byte, string) {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)})
	_, _ = r.Read(b) // never fails
	return b, Hash(b)
}

// Hash is the hexadecimal SHA-256 of bytes.
func Hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// HTTP serves /N (N bytes of Content) and takes uploads, which it answers with
// their hash.
func (h *Host) HTTP(port int) *Peers {
	h.lab.T.Helper()
	l := h.MustListen("tcp", ":"+strconv.Itoa(port))
	peers := &Peers{}
	s := &http.Server{ReadHeaderTimeout: time.Minute}
	s.ConnState = func(c net.Conn, state http.ConnState) {
		if state == http.StateNew {
			peers.add(c.RemoteAddr())
		}
	}
	s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			sum := sha256.New()
			_, _ = io.Copy(sum, r.Body)
			fmt.Fprintf(w, "%x", sum.Sum(nil))
			return
		}
		var n int
		if _, err := fmt.Sscanf(r.URL.Path, "/%d", &n); err != nil {
			http.NotFound(w, r)
			return
		}
		b, _ := Content(n)
		_, _ = w.Write(b)
	})
	go func() { _ = s.Serve(l) }()
	h.lab.OnClose(func() { _ = s.Close() })
	return peers
}

// Stream serves bytes without an end, as fast as they are taken.
func (h *Host) Stream(port int) *Peers {
	h.lab.T.Helper()
	block, _ := Content(64 << 10)
	return h.ServeTCP(port, func(c *net.TCPConn) {
		for {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	})
}

// AwaitListening waits until a program on this host listens on a TCP port.
func (h *Host) AwaitListening(p *Process, port int) {
	h.lab.T.Helper()
	Eventually(h.lab.T, 10*time.Second, fmt.Sprintf("%s listens on port %d", p.Name, port), func() bool {
		select {
		case <-p.Done():
			h.lab.T.Fatalf("%s ended:\n%s", p.Name, p.Output)
		default:
		}
		out := h.Run("ss", "-Hltn", "sport = :"+strconv.Itoa(port))
		return out != ""
	})
}
