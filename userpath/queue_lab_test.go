package userpath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// queueSpace is a network namespace without a name: it goes with its last
// file descriptor, however the test ends.
type queueSpace struct{ file *os.File }

func newQueueSpace(t testing.TB) *queueSpace {
	t.Helper()
	s := &queueSpace{}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace (root is needed): %w", err)
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		s.file = f
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.file.Close() })
	return s
}

// onThread runs fn on a thread that is thrown away after it.
func onThread(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- fn()
	}()
	return <-done
}

func (s *queueSpace) in(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

func (s *queueSpace) must(t testing.TB, fn func() error) {
	t.Helper()
	if err := s.in(fn); err != nil {
		t.Fatal(err)
	}
}

func runCommand(input, name string, args ...string) error {
	c := exec.Command(name, args...)
	c.Stdin = strings.NewReader(input)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w\n%s", name, args, err, out)
	}
	return nil
}

// queueRules ask for UDP 7000-7999 and TCP 8000-8999 of both families, and read
// the mark when the packet comes again.
const queueRules = `
table inet sluice {
	chain refuse {
		meta l4proto tcp reject with tcp reset
		reject with icmpx type admin-prohibited
	}
	chain ask {
	}
	chain arrive {
		type filter hook prerouting priority -155; policy accept;
		ct mark & 0x07000000 == 0x05000000 accept
		meta mark & 0x07000000 == 0x01000000 goto refuse
		meta mark & 0x07000000 == 0x05000000 ct mark set 0x05000000 accept
		meta mark & 0x07000000 == 0x06000000 ct mark set 0x05000000 accept
		udp dport 7000-7999 goto ask
		tcp dport 8000-8999 tcp flags & (fin|syn|rst|ack) == syn goto ask
		udp dport 7000-7999 drop
		tcp dport 8000-8999 drop
	}
}
`

const (
	labQueue   = 10
	labHolding = 20
)

// queueLab is a client and a gateway with servers of its own behind a queue.
type queueLab struct {
	t          testing.TB
	client, gw *queueSpace
	q          *Queues
	stop       func()

	mu    sync.Mutex
	asked map[flow.Tuple]int
}

// labTakeovers answers for both protocols.
type labTakeovers func(context.Context, *engine.Takeover) flow.Path

func (f labTakeovers) TCP(t *engine.Takeover, within time.Duration, first Held) Dialling {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	go func() {
		defer cancel()
		first.Answer(f(ctx, t))
		first.Release()
	}()
	return cancelled(cancel)
}
func (f labTakeovers) UDP(ctx context.Context, t *engine.Takeover) flow.Path { return f(ctx, t) }

func newQueueLab(t testing.TB, bypass bool) *queueLab {
	t.Helper()
	l := &queueLab{t: t, client: newQueueSpace(t), gw: newQueueSpace(t), asked: make(map[flow.Tuple]int)}
	l.client.must(t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "c0"
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "g0", PeerNamespace: netlink.NsFd(l.gw.file.Fd())})
	})
	address := func(dev string, host int) func() error {
		return func() error {
			return runCommand("", "sh", "-c", fmt.Sprintf(`set -e
				ip link set lo up; ip link set %[1]s up
				ip addr add 10.0.0.%[2]d/24 dev %[1]s; ip addr add fd00::%[2]d/64 dev %[1]s nodad`, dev, host))
		}
	}
	l.client.must(t, address("c0", 2))
	l.gw.must(t, address("g0", 1))
	l.gw.must(t, func() error {
		if err := runCommand(queueRules, "nft", "-f", "-"); err != nil {
			return err
		}
		if bypass { // a packet that skips the queue carries its path already
			if err := runCommand("", "nft", "add rule inet sluice ask meta mark set 0x05000000"); err != nil {
				return err
			}
		}
		return addQueueRule(labQueue, bypass)
	})
	return l
}

// addQueueRule appends a queue to the chain ask: nft's own expression where
// the kernel has it, else xt NFQUEUE.
func addQueueRule(number uint16, bypass bool) error {
	flags := uint16(0)
	if bypass {
		flags = 1
	}
	info := xt.Unknown{}
	for _, v := range []uint16{number, 1, flags, 0} {
		info = binary.NativeEndian.AppendUint16(info, v)
	}
	err := addAskRule(&expr.Queue{Num: number, Total: 1, Flag: expr.QueueFlag(flags)})
	if errors.Is(err, unix.ENOENT) {
		err = addAskRule(&expr.Target{Name: "NFQUEUE", Rev: 3, Info: &info})
	}
	return err
}

func addAskRule(e expr.Any) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := &nftables.Table{Name: "sluice", Family: nftables.TableFamilyINet}
	c.AddRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: "ask", Table: table}, Exprs: []expr.Any{e}})
	return c.Flush()
}

// start opens the queues with what the test sets in c, and runs them.
func (l *queueLab) start(c QueueConfig) {
	l.t.Helper()
	marks, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		l.t.Fatal(err)
	}
	c.Marks, c.Logger = marks, zap.NewNop()
	c.First, c.Number = labQueue, 1
	if c.NumberOpen == 1 {
		c.First, c.Number, c.FirstOpen = 0, 0, labQueue
	}
	if c.Takeovers == nil {
		c.Takeovers = labTakeovers(func(context.Context, *engine.Takeover) flow.Path { return flow.Drop })
	}
	decide := c.Decide
	c.Decide = func(ctx context.Context, p flow.Packet) engine.Decision {
		l.mu.Lock()
		l.asked[p.Tuple]++
		l.mu.Unlock()
		return decide(ctx, p)
	}
	l.gw.must(l.t, func() (err error) { l.q, err = OpenQueues(c); return err })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.q.Run(ctx) }()
	l.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Errorf("run: %v", err)
		}
	})
	l.t.Cleanup(l.stop)
}

// questions counts the decisions that were asked, by flow and in all.
func (l *queueLab) questions() (flows, all int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.asked {
		flows++
		all += n
	}
	return flows, all
}

// eventually waits for a condition that is reached by others.
func (l *queueLab) eventually(what string, cond func() bool) {
	l.t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if time.Now().After(deadline) {
			l.t.Fatalf("never came true: %s; %+v", what, l.q.Stats())
		}
		<-tick.C
	}
}

func (l *queueLab) udpServer(addr string) *net.UDPConn {
	l.t.Helper()
	var c *net.UDPConn
	l.gw.must(l.t, func() (err error) {
		if c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr))); err != nil {
			return err
		}
		raw, err := c.SyscallConn() // room for a burst, whatever rmem_max says
		if err != nil {
			return err
		}
		var forced error
		err = raw.Control(func(fd uintptr) {
			forced = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
		})
		return errors.Join(err, forced)
	})
	l.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (l *queueLab) udpClient(addr string) *net.UDPConn {
	l.t.Helper()
	var c *net.UDPConn
	l.client.must(l.t, func() (err error) {
		c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
		return err
	})
	l.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (l *queueLab) tcpServer(addr string) net.Listener {
	l.t.Helper()
	var s net.Listener
	l.gw.must(l.t, func() (err error) { s, err = net.Listen("tcp", addr); return err })
	l.t.Cleanup(func() { _ = s.Close() })
	return s
}

// dial connects from the client; the error is the client's.
func (l *queueLab) dial(addr string, timeout time.Duration) (c net.Conn, err error) {
	err = l.client.in(func() (err error) {
		// One address, no fallback dials: the socket is made on this thread.
		c, err = (&net.Dialer{Timeout: timeout, FallbackDelay: -1}).Dial("tcp", addr)
		return err
	})
	if err == nil {
		l.t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

func send(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

func receive(t testing.TB, c *net.UDPConn) string {
	t.Helper()
	b := make([]byte, 2048)
	if err := c.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// receiveByPeer receives n datagrams and joins the texts of each sender.
func receiveByPeer(t testing.TB, c *net.UDPConn, n int) map[netip.AddrPort]string {
	t.Helper()
	got := make(map[netip.AddrPort]string)
	b := make([]byte, 2048)
	for range n {
		if err := c.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			t.Fatal(err)
		}
		got[from] += string(b[:n])
	}
	return got
}
