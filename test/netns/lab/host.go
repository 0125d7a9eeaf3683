package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Host is one network namespace. Its methods are safe for concurrent use.
type Host struct {
	// Name is what the topology calls it, Namespace what `ip netns` calls it.
	Name, Namespace string
	lab             *Lab
	ns              netns.NsHandle
	netlink         *netlink.Handle
}

func newHost(l *Lab, name string) (*Host, error) {
	h := &Host{Name: name, Namespace: l.name + "-" + name, lab: l}
	runtime.LockOSThread()
	before, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("own namespace: %w", err)
	}
	defer before.Close()
	h.ns, err = netns.NewNamed(h.Namespace)
	if back := netns.Set(before); back != nil {
		return nil, fmt.Errorf("back from %s: %w", h.Namespace, back) // the thread stays locked, and dies
	}
	runtime.UnlockOSThread()
	if err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", h.Namespace, err)
	}
	if h.netlink, err = netlink.NewHandleAt(h.ns); err != nil {
		return nil, fmt.Errorf("netlink in %s: %w", h.Namespace, err)
	}
	for _, s := range []string{"all", "default"} {
		for key, value := range map[string]string{"accept_dad": "0", "dad_transmits": "0", "accept_ra": "0", "router_solicitations": "0"} {
			if err := h.Sysctl("net/ipv6/conf/"+s+"/"+key, value); err != nil {
				return nil, err
			}
		}
	}
	lo, err := h.netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("%s: loopback: %w", name, err)
	}
	return h, h.netlink.LinkSetUp(lo)
}

func (h *Host) remove() {
	killInside(filepath.Join(namedDir, h.Namespace))
	if h.netlink != nil {
		h.netlink.Close()
	}
	if h.ns.IsOpen() {
		_ = h.ns.Close()
	}
	_ = netns.DeleteNamed(h.Namespace)
}

// Do runs f inside the namespace, on a thread that nothing else uses meanwhile.
// f must not start goroutines that need the namespace.
func (h *Host) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		before, err := netns.Get()
		if err != nil {
			done <- fmt.Errorf("own namespace: %w", err)
			return
		}
		defer before.Close()
		if err := netns.Set(h.ns); err != nil {
			done <- fmt.Errorf("enter %s: %w", h.Namespace, err)
			return
		}
		result := f()
		// A thread must not die here: the processes that it started would get
		// their parent-death signal.
		if err := netns.Set(before); err != nil {
			panic("lab: a thread is stuck in " + h.Namespace + ": " + err.Error())
		}
		runtime.UnlockOSThread()
		done <- result
	}()
	return <-done
}

// Sysctl writes one of the namespace's settings; the key has slashes.
func (h *Host) Sysctl(key, value string) error {
	return h.Do(func() error {
		if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		return nil
	})
}

// Dial connects from this host. addr is numeric.
func (h *Host) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return h.DialFrom(ctx, network, netip.AddrPort{}, addr)
}

// DialFrom connects from one of this host's addresses and ports; what is zero
// is chosen by the kernel.
func (h *Host) DialFrom(ctx context.Context, network string, from netip.AddrPort, addr string) (net.Conn, error) {
	d := net.Dialer{}
	d.SetMultipathTCP(false)
	if from.IsValid() {
		if strings.HasPrefix(network, "udp") {
			d.LocalAddr = net.UDPAddrFromAddrPort(from)
		} else {
			d.LocalAddr = net.TCPAddrFromAddrPort(from)
		}
		d.Control = reuseAddr
	}
	var c net.Conn
	err := h.Do(func() (err error) {
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Listen opens a TCP listener on this host.
func (h *Host) Listen(network, addr string) (net.Listener, error) {
	lc := net.ListenConfig{Control: reuseAddr}
	lc.SetMultipathTCP(false)
	var l net.Listener
	err := h.Do(func() (err error) {
		l, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	return l, err
}

// ListenPacket opens an unconnected UDP socket on this host.
func (h *Host) ListenPacket(network, addr string) (*net.UDPConn, error) {
	var c net.PacketConn
	err := h.Do(func() (err error) {
		c, err = net.ListenPacket(network, addr)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

func reuseAddr(_, _ string, c syscall.RawConn) error {
	var inner error
	if err := c.Control(func(fd uintptr) {
		inner = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	}); err != nil {
		return err
	}
	return inner
}

// MustDial connects from this host within d or fails the test; the connection
// is closed with the lab.
func (h *Host) MustDial(network, addr string, d time.Duration) net.Conn {
	h.lab.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience(d))
	defer cancel()
	c, err := h.Dial(ctx, network, addr)
	if err != nil {
		h.lab.T.Fatalf("%s: %v", h.Name, err)
	}
	h.lab.OnClose(func() { _ = c.Close() })
	return c
}

// MustListenPacket is ListenPacket that fails the test; the socket is closed
// with the lab.
func (h *Host) MustListenPacket(network, addr string) *net.UDPConn {
	h.lab.T.Helper()
	c, err := h.ListenPacket(network, addr)
	if err != nil {
		h.lab.T.Fatalf("%s: %v", h.Name, err)
	}
	h.lab.OnClose(func() { _ = c.Close() })
	return c
}

// MustListen is Listen that fails the test; the listener is closed with the lab.
func (h *Host) MustListen(network, addr string) net.Listener {
	h.lab.T.Helper()
	c, err := h.Listen(network, addr)
	if err != nil {
		h.lab.T.Fatalf("%s: %v", h.Name, err)
	}
	h.lab.OnClose(func() { _ = c.Close() })
	return c
}
