package lab

import (
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func itoa(n int) string { return strconv.Itoa(n) }

// Eventually asks until the answer is yes. It is for what the kernel shows but
// gives no event for; the pauses are short.
func Eventually(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(Patience(d))
	for pause := 2 * time.Millisecond; !ok(); pause = min(2*pause, 100*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", Patience(d), what)
		}
		time.Sleep(pause)
	}
}

// Tracked is one conntrack entry.
type Tracked struct {
	Proto              string
	Src, Dst           netip.AddrPort // of the first packet
	ReplySrc, ReplyDst netip.AddrPort
	State              string // TCP only
	Mark               uint32
	Zone               uint16
	Assured, Offloaded bool
	OutBytes, InBytes  int64 // zero if nothing is counted
	Line               string
}

// Conntrack lists a host's connection tracking table, one family after the
// other.
func (h *Host) Conntrack() []Tracked {
	h.lab.T.Helper()
	var all []Tracked
	for _, family := range []string{"ipv4", "ipv6"} {
		// What it says to standard error would come in the middle of a line.
		out := h.Run("sh", "-c", "conntrack -L -o extended -f "+family+" 2>/dev/null")
		for line := range strings.Lines(out) {
			if t, ok := parseTracked(line); ok {
				all = append(all, t)
			}
		}
	}
	return all
}

// Flow finds the entry of a flow by the destination and protocol of its first
// packet, and its source address. Only the default zone is looked at: a gateway
// may have the far leg of the same flow in another.
func (h *Host) Flow(proto string, src netip.Addr, dst netip.AddrPort) (Tracked, bool) {
	h.lab.T.Helper()
	for _, t := range h.Conntrack() {
		if t.Proto == proto && t.Src.Addr() == src && t.Dst == dst && t.Zone == 0 && t.State != "TIME_WAIT" && t.State != "CLOSE" {
			return t, true
		}
	}
	return Tracked{}, false
}

// parseTracked reads `conntrack -L -o extended`: "ipv4 2 tcp 6 431999
// ESTABLISHED src=.. dst=.. sport=.. dport=.. [packets= bytes=] src=.. ..."
func parseTracked(line string) (Tracked, bool) {
	f := strings.Fields(line)
	if len(f) < 6 || (f[0] != "ipv4" && f[0] != "ipv6") {
		return Tracked{}, false
	}
	t := Tracked{Proto: f[2], Line: strings.TrimSpace(line)}
	side := -1
	var addrs [2][2]netip.Addr
	var ports [2][2]uint16
	var bytes [2]int64
	for _, word := range f[4:] {
		key, value, has := strings.Cut(word, "=")
		n, _ := strconv.ParseUint(value, 10, 64)
		if key == "src" {
			side++
		}
		switch {
		case word == "[ASSURED]":
			t.Assured = true
		case word == "[OFFLOAD]" || word == "[HW_OFFLOAD]":
			t.Offloaded = true
		case !has && side < 0 && word == strings.ToUpper(word) && strings.Trim(word, "0123456789") != "":
			t.State = word
		case key == "zone":
			t.Zone = uint16(n)
		case key == "mark":
			t.Mark = uint32(n)
		case side < 0 || side > 1:
		case key == "src":
			addrs[side][0], _ = netip.ParseAddr(value)
		case key == "dst":
			addrs[side][1], _ = netip.ParseAddr(value)
		case key == "sport" || key == "id":
			ports[side][0] = uint16(n)
		case key == "dport" || key == "type":
			ports[side][1] = uint16(n)
		case key == "bytes":
			bytes[side] = int64(n)
		}
	}
	t.Src, t.Dst = netip.AddrPortFrom(addrs[0][0], ports[0][0]), netip.AddrPortFrom(addrs[0][1], ports[0][1])
	t.ReplySrc, t.ReplyDst = netip.AddrPortFrom(addrs[1][0], ports[1][0]), netip.AddrPortFrom(addrs[1][1], ports[1][1])
	t.OutBytes, t.InBytes = bytes[0], bytes[1]
	return t, side >= 1
}

// Path is what Sluice's bits in the mark say, with the mask at its default: the
// path's name, or "" where there is none.
func (t Tracked) Path() string {
	return map[uint32]string{5: "kernel", 6: "user", 7: "own"}[t.Mark>>24&7]
}

// SocketInfo is one socket that is not listening.
type SocketInfo struct {
	State       string
	Local, Peer netip.AddrPort
}

// Sockets lists a host's sockets of a protocol (tcp or udp) that have a peer.
func (h *Host) Sockets(proto string) []SocketInfo {
	h.lab.T.Helper()
	out := h.Run("ss", "-Hna", "--"+proto)
	var all []SocketInfo
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 5 || f[0] == "LISTEN" || f[0] == "TIME-WAIT" {
			continue
		}
		local, err1 := parseEndpoint(f[3])
		peer, err2 := parseEndpoint(f[4])
		if err1 == nil && err2 == nil {
			all = append(all, SocketInfo{f[0], local, peer})
		}
	}
	return all
}

func parseEndpoint(s string) (netip.AddrPort, error) {
	if i := strings.IndexByte(s, '%'); i >= 0 { // 127.0.0.1%lo:53
		s = s[:i] + s[strings.LastIndexByte(s, ':'):]
	}
	a, err := netip.ParseAddrPort(s)
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), err
}

// Ruleset is a host's nft ruleset as text.
func (h *Host) Ruleset() string {
	h.lab.T.Helper()
	return h.Run("nft", "-a", "list", "ruleset")
}

// Snapshot is what a host's administrator can see of its network settings.
type Snapshot map[string]string

// Snapshot reads the ruleset, policy routing, routes, links and every setting
// under /proc/sys/net.
func (h *Host) Snapshot() Snapshot {
	h.lab.T.Helper()
	s := Snapshot{
		"nft ruleset": h.Run("nft", "list", "ruleset"),
		"ip rule":     h.Run("ip", "-4", "rule"), "ip -6 rule": h.Run("ip", "-6", "rule"),
		"ip route": h.Run("ip", "-4", "route", "show", "table", "all"), "ip -6 route": h.Run("ip", "-6", "route", "show", "table", "all"),
		"ip link": h.Run("ip", "-o", "link"), "ip address": h.Run("ip", "-o", "address"),
	}
	// ip(8) looks for the far end of a veth among all named namespaces and
	// complains about one that another lab is just removing.
	s["ip link"] = strings.ReplaceAll(s["ip link"], "Error: Peer netns reference is invalid.\n", "")
	err := h.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || moving(path) {
				return nil //nolint:nilerr // a setting may vanish with its device
			}
			if text, err := os.ReadFile(path); err == nil { // some are for writing only
				s[path] = strings.TrimSpace(string(text))
			}
			return nil
		})
	})
	if err != nil {
		h.lab.T.Fatalf("snapshot: %v", err)
	}
	return s
}

// moving names the settings that are counters or random.
func moving(path string) bool {
	for _, s := range []string{"nf_conntrack_count", "/route/flush", "stable_secret", "tcp_fastopen_key", "/netfilter/nf_log"} {
		if strings.Contains(path, s) {
			return true
		}
	}
	return false
}

// Diff tells what differs between two snapshots; empty: nothing.
func (s Snapshot) Diff(after Snapshot) string {
	var b strings.Builder
	for k, v := range s {
		if w, ok := after[k]; !ok {
			fmt.Fprintf(&b, "%s is gone (was %q)\n", k, v)
		} else if v != w {
			fmt.Fprintf(&b, "%s has changed:\n%s", k, lineDiff(v, w))
		}
	}
	for k, v := range after {
		if _, ok := s[k]; !ok {
			fmt.Fprintf(&b, "%s is new: %q\n", k, v)
		}
	}
	return b.String()
}

// lineDiff names the lines that only one of two texts has.
func lineDiff(before, after string) string {
	var b strings.Builder
	was, is := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, s := range was {
		if !slices.Contains(is, s) {
			fmt.Fprintf(&b, "  - %s\n", s)
		}
	}
	for _, s := range is {
		if !slices.Contains(was, s) {
			fmt.Fprintf(&b, "  + %s\n", s)
		}
	}
	return b.String()
}
