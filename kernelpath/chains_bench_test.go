package kernelpath

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// BenchmarkNewFlow is what a plain new flow costs that the kernel carries and
// translates: a UDP packet from the client's socket to beyond the gateway, each
// to an address of its own. Run it with -benchtime 50000x: conntrack must not
// fill up.
func BenchmarkNewFlow(b *testing.B) { benchmarkPackets(b, true) }

// BenchmarkLivingFlow is the same for the packets of one flow.
func BenchmarkLivingFlow(b *testing.B) { benchmarkPackets(b, false) }

func benchmarkPackets(b *testing.B, fresh bool) {
	j := newJourney(b)
	table := openTable(b, j.gw)
	o := testOptions(b)
	o.Native = false
	mustLoad(b, table, mustBuild(b, flowPolicy(), o))
	j.gw.sh("ip route add 198.18.0.0/15 via 203.0.113.10")
	j.server.nft(`table inet sink { chain c { type filter hook prerouting priority -400; policy accept; udp dport 53 drop; }; }`)
	j.gw.sh("ping -n -c 1 -w 5 10.0.0.2; ping -n -c 1 -w 5 203.0.113.10")
	fd := made(j.client, func() (int, error) {
		return unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	})
	defer unix.Close(fd)
	first := netip.MustParseAddr("198.18.0.1").As4()
	packet := []byte{0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, byte(flow.UDP), 0, 0, 10, 0, 0, 2, 0, 0, 0, 0, 0x27, 0x10, 0, 53, 0, 8, 0, 0}
	n := uint32(0)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := systemTime(b)
	for b.Loop() {
		to := first
		binary.BigEndian.PutUint32(to[:], binary.BigEndian.Uint32(first[:])+n)
		copy(packet[16:], to[:])
		if fresh {
			n++
		}
		if err := unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: to}); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(systemTime(b)-before)/float64(b.N), "cpu-ns/op")
	if list := j.gw.sh("conntrack -C"); fresh && b.N > 100 && len(list) < 3 {
		b.Errorf("%d packets made %s flows", b.N, list)
	}
	j.gw.sh("conntrack -F 2>/dev/null")
}

// systemTime is what the kernel did for this thread: on a machine that others
// use, too, it says more than the clock.
func systemTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Stime.Nano())
}
