package lab

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/sys/unix"
)

// snapLen is how much of a packet a capture keeps: all of one that fits a wire.
const snapLen = 2048

// Capture is a packet socket on an interface. The kernel puts a packet there in
// the same moment in which it passes it on, so what a test has seen the effect
// of is in the capture when it is stopped.
type Capture struct {
	host  *Host
	iface string
	fd    int
	once  sync.Once
	done  chan struct{}
	stop  chan struct{}

	mu      sync.Mutex
	frames  []frame
	dropped int
}

type frame struct {
	at   time.Time
	data []byte
	out  bool
}

// Seen is one captured IP packet.
type Seen struct {
	At       time.Time
	Out      bool // sent by this host
	Src, Dst netip.AddrPort
	Proto    string // tcp, udp, icmp, icmpv6
	TCP      *layers.TCP
	Payload  []byte
	// ICMPType and ICMPCode are set for icmp and icmpv6.
	ICMPType, ICMPCode uint8
}

// Capture starts to capture on the host's wire; it is kept if the test fails.
func (h *Host) Capture() *Capture { return h.CaptureOn("eth0") }

// CaptureOn is Capture on an interface of that name.
func (h *Host) CaptureOn(iface string) *Capture {
	h.lab.T.Helper()
	c := &Capture{host: h, iface: iface, done: make(chan struct{}), stop: make(chan struct{})}
	if err := h.Do(c.open); err != nil {
		h.lab.T.Fatalf("capture on %s: %v", h.Name, err)
	}
	go c.read()
	h.lab.mu.Lock()
	h.lab.captures = append(h.lab.captures, c)
	h.lab.mu.Unlock()
	return c
}

func (c *Capture) open() error {
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	dev, err := net.InterfaceByName(c.iface)
	if err != nil {
		return err
	}
	if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
		return fmt.Errorf("packet buffer: %w", err)
	}
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
		return fmt.Errorf("packet times: %w", err)
	}
	wake := unix.NsecToTimeval(int64(20 * time.Millisecond))
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wake); err != nil {
		return fmt.Errorf("packet timeout: %w", err)
	}
	return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: dev.Index})
}

// read takes frames until it is stopped and nothing is left.
func (c *Capture) read() {
	defer close(c.done)
	buffer, control := make([]byte, 65536), make([]byte, 256)
	for {
		stopping := false
		select {
		case <-c.stop:
			stopping = true
		default:
		}
		flags := unix.MSG_TRUNC
		if stopping {
			flags |= unix.MSG_DONTWAIT
		}
		n, oob, _, from, err := unix.Recvmsg(c.fd, buffer, control, flags)
		if err != nil {
			if stopping {
				return
			}
			continue
		}
		f := frame{at: stamped(control[:oob]), data: append([]byte(nil), buffer[:min(n, snapLen, len(buffer))]...)}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok {
			f.out = ll.Pkttype == unix.PACKET_OUTGOING
		}
		c.mu.Lock()
		c.frames = append(c.frames, f)
		c.mu.Unlock()
	}
}

// stamped is when the kernel met the packet: captures on several hosts can be
// compared.
func stamped(control []byte) time.Time {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return time.Time{}
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS && len(m.Data) >= 16 {
			return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return time.Time{}
}

// Stop ends the capture and gives every IP packet in it. It may be called again.
func (c *Capture) Stop() []Seen {
	c.once.Do(func() {
		close(c.stop)
		<-c.done
		if stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			c.dropped = int(stats.Drops)
		}
		_ = unix.Close(c.fd)
	})
	if c.dropped > 0 {
		c.host.lab.T.Errorf("the capture on %s lost %d packets", c.host.Name, c.dropped)
	}
	return c.packets()
}

func (c *Capture) packets() []Seen {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []Seen
	for _, f := range c.frames {
		if s, ok := parseFrame(f); ok {
			all = append(all, s)
		}
	}
	return all
}

func parseFrame(f frame) (Seen, bool) {
	p := gopacket.NewPacket(f.data, layers.LayerTypeEthernet, gopacket.DecodeOptions{NoCopy: true})
	s := Seen{At: f.at, Out: f.out}
	var src, dst netip.Addr
	switch ip := p.NetworkLayer().(type) {
	case *layers.IPv4:
		src, _ = netip.AddrFromSlice(ip.SrcIP.To4())
		dst, _ = netip.AddrFromSlice(ip.DstIP.To4())
	case *layers.IPv6:
		src, _ = netip.AddrFromSlice(ip.SrcIP.To16())
		dst, _ = netip.AddrFromSlice(ip.DstIP.To16())
	default:
		return s, false
	}
	var sport, dport uint16
	if tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP); ok {
		s.Proto, s.TCP, s.Payload = "tcp", tcp, tcp.Payload
		sport, dport = uint16(tcp.SrcPort), uint16(tcp.DstPort)
	} else if udp, ok := p.Layer(layers.LayerTypeUDP).(*layers.UDP); ok {
		s.Proto, s.Payload = "udp", udp.Payload
		sport, dport = uint16(udp.SrcPort), uint16(udp.DstPort)
	} else if icmp, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
		s.Proto, s.ICMPType, s.ICMPCode, s.Payload = "icmp", icmp.TypeCode.Type(), icmp.TypeCode.Code(), icmp.Payload
	} else if icmp, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok {
		s.Proto, s.ICMPType, s.ICMPCode, s.Payload = "icmpv6", icmp.TypeCode.Type(), icmp.TypeCode.Code(), icmp.Payload
	}
	s.Src, s.Dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return s, true
}

// write keeps the capture as a pcap file.
func (c *Capture) write(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	w := pcapgo.NewWriter(file)
	if err := w.WriteFileHeader(snapLen, layers.LinkTypeEthernet); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.frames {
		if err := w.WritePacket(gopacket.CaptureInfo{Timestamp: f.at, CaptureLength: len(f.data), Length: len(f.data)}, f.data); err != nil {
			return err
		}
	}
	return nil
}

// Select gives the packets that satisfy ok.
func Select(all []Seen, ok func(Seen) bool) []Seen {
	var some []Seen
	for _, s := range all {
		if ok(s) {
			some = append(some, s)
		}
	}
	return some
}

// SYN says whether this is a first SYN to the address.
func SYN(to netip.AddrPort) func(Seen) bool {
	return func(s Seen) bool { return s.TCP != nil && s.TCP.SYN && !s.TCP.ACK && s.Dst == to }
}

// UDPTo says whether this is a datagram to the address.
func UDPTo(to netip.AddrPort) func(Seen) bool {
	return func(s Seen) bool { return s.Proto == "udp" && s.Dst == to }
}

// Peek gives what is captured so far. A packet of this moment may be missing:
// only Stop is sure to have it.
func (c *Capture) Peek() []Seen { return c.packets() }
