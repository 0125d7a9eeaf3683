package lab

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// link joins an interface of a host to a switch.
type link struct {
	host      *Host
	iface     string
	onSwitch  string
	addresses []string
	routes    []string // "PREFIX VIA"
}

func addSwitch(h *Host, name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	quiet := false
	b := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &quiet}
	if err := h.netlink.LinkAdd(b); err != nil {
		return fmt.Errorf("switch %s: %w", name, err)
	}
	return h.netlink.LinkSetUp(b)
}

// plug makes the veth, sets its addresses and plugs it in.
func (k link) plug(switches *Host, offloads bool) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = k.iface
	attrs.TxQLen = 1000
	port := (k.host.Name + "-" + k.iface)
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: port, PeerNamespace: netlink.NsFd(int(switches.ns))}
	if err := k.host.netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth: %w", err)
	}
	mine, err := k.host.netlink.LinkByName(k.iface)
	if err != nil {
		return fmt.Errorf("veth: %w", err)
	}
	if !offloads {
		if err := k.host.Do(func() error { return withoutOffloads(k.iface) }); err != nil {
			return err
		}
	}
	if err := k.host.netlink.LinkSetUp(mine); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	peer, err := switches.netlink.LinkByName(port)
	if err != nil {
		return fmt.Errorf("port %s: %w", port, err)
	}
	master, err := switches.netlink.LinkByName(k.onSwitch)
	if err != nil {
		return fmt.Errorf("switch %s: %w", k.onSwitch, err)
	}
	if err := switches.netlink.LinkSetUp(peer); err != nil {
		return fmt.Errorf("port %s up: %w", port, err)
	}
	if err := switches.netlink.LinkSetMaster(peer, master); err != nil {
		return fmt.Errorf("plug in %s: %w", port, err)
	}
	for _, a := range k.addresses {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := k.host.netlink.AddrAdd(mine, addr); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	for _, r := range k.routes {
		to, via, _ := strings.Cut(r, " ")
		_, dst, err := net.ParseCIDR(to)
		if err != nil {
			return err
		}
		if err := k.host.netlink.RouteAdd(&netlink.Route{LinkIndex: mine.Attrs().Index, Dst: dst, Gw: net.ParseIP(via)}); err != nil {
			return fmt.Errorf("route %s: %w", r, err)
		}
	}
	return nil
}

// awaitLinks waits until every interface has its carrier and no address is
// tentative; link events say when to look again.
func (h *Host) awaitLinks() error {
	links := make(chan netlink.LinkUpdate, 64)
	addrs := make(chan netlink.AddrUpdate, 64)
	done := make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribeAt(h.ns, links, done); err != nil {
		return fmt.Errorf("%s: watch links: %w", h.Name, err)
	}
	if err := netlink.AddrSubscribeAt(h.ns, addrs, done); err != nil {
		return fmt.Errorf("%s: watch addresses: %w", h.Name, err)
	}
	limit := time.After(Patience(10 * time.Second))
	for {
		missing, err := h.notReady()
		if err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		if missing == "" {
			return nil
		}
		select {
		case <-links:
		case <-addrs:
		case <-limit:
			return fmt.Errorf("%s: not ready: %s", h.Name, missing)
		}
	}
}

func (h *Host) notReady() (string, error) {
	links, err := dump(h.netlink.LinkList)
	if err != nil {
		return "", fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if a := l.Attrs(); a.Name != "lo" && a.OperState != netlink.OperUp {
			return a.Name + " is " + a.OperState.String(), nil
		}
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return h.netlink.AddrList(nil, netlink.FAMILY_V6) })
	if err != nil {
		return "", fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if a.Flags&unix.IFA_F_TENTATIVE != 0 {
			return a.IP.String() + " is tentative", nil
		}
	}
	return "", nil
}

// dump repeats a dump that a change interrupted.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for {
		all, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
}

// withoutOffloads makes an interface send what a wire carries: packets of at
// most the MTU with whole checksums (linux/ethtool.h).
func withoutOffloads(iface string) error {
	const sTxCsum, sTSO, sGSO, sGRO = 0x17, 0x1f, 0x24, 0x2c
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("ethtool socket: %w", err)
	}
	defer unix.Close(fd)
	for _, command := range []uint32{sTSO, sGSO, sGRO, sTxCsum} {
		value := struct{ cmd, data uint32 }{command, 0}
		request := struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&value)}
		copy(request.name[:], iface)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
			return fmt.Errorf("ethtool %#x on %s: %w", command, iface, errno)
		}
	}
	return nil
}
