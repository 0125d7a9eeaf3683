package kernelpath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	rtnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// sysctlNeed is one switch that the gateway needs in its network namespace.
type sysctlNeed struct {
	path, value string
	// drags are the files that the kernel changes along with it, by pattern, in
	// the order in which they must be put back after it.
	drags []string
	// flowtable: only kernels with flowtables have it.
	flowtable bool
}

// sysctlNeeds: the forwarding switches overwrite their namesakes of every
// interface (inet_forward_change in net/ipv4/devinet.c, addrconf_fixup_forwarding
// in net/ipv6/addrconf.c), and IPv4's also turns accept_redirects.
// nf_conntrack_events is 2 (auto) by default: then flows that began while
// nobody listened end without an event.
var sysctlNeeds = []sysctlNeed{
	{"net/ipv4/ip_forward", "1", []string{
		"net/ipv4/conf/default/forwarding", "net/ipv4/conf/*/forwarding", "net/ipv4/conf/all/accept_redirects"}, false},
	{"net/ipv6/conf/all/forwarding", "1", []string{"net/ipv6/conf/default/forwarding", "net/ipv6/conf/*/forwarding"}, false},
	{path: "net/netfilter/nf_conntrack_events", value: "1"},
	{path: "net/netfilter/nf_conntrack_acct", value: "1"},
	{path: "net/netfilter/nf_conntrack_timestamp", value: "1"},
	{path: "net/netfilter/nf_flowtable_tcp_timeout", value: "5", flowtable: true},
	{path: "net/netfilter/nf_flowtable_udp_timeout", value: "10", flowtable: true},
}

// Idle is how long, in seconds, flows in the kernel may carry nothing. What is 0
// is left as it is.
type Idle struct {
	UDP            uint32
	ICMP           uint32 // queries
	TCPEstablished uint32
	TCPTransitory  uint32 // connections that open or close
}

// needs are conntrack's sysctls for that. What is left of a connection that was
// reset, or that both ends have closed, is not among them: RFC 5382, REQ-5,
// leaves it open, and nobody waits for it.
func (i Idle) needs() (list []sysctlNeed) {
	for _, t := range []struct {
		seconds uint32
		names   []string
	}{
		{i.UDP, []string{"udp_timeout", "udp_timeout_stream"}},
		{i.ICMP, []string{"icmp_timeout", "icmpv6_timeout"}},
		{i.TCPEstablished, []string{"tcp_timeout_established"}},
		{i.TCPTransitory, []string{"tcp_timeout_syn_sent", "tcp_timeout_syn_recv", "tcp_timeout_fin_wait", "tcp_timeout_close_wait", "tcp_timeout_last_ack"}},
	} {
		for _, name := range t.names {
			if t.seconds != 0 {
				list = append(list, sysctlNeed{path: "net/netfilter/nf_conntrack_" + name, value: fmt.Sprint(t.seconds)})
			}
		}
	}
	return list
}

const sysctlRoot = "/proc/sys"

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysctlRoot, path))
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func writeSysctl(path, value string) error {
	f, err := os.OpenFile(filepath.Join(sysctlRoot, path), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set sysctl: %w", err)
	}
	_, err = f.WriteString(value + "\n")
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set sysctl to %s: %w", value, err)
	}
	return nil
}

// before reads a switch and what it drags along.
func (n sysctlNeed) before() ([]sysctlValue, error) {
	paths := []string{n.path}
	for _, pattern := range n.drags {
		found, err := filepath.Glob(filepath.Join(sysctlRoot, pattern))
		if err != nil {
			return nil, fmt.Errorf("find sysctl %s: %w", pattern, err)
		}
		for _, f := range found {
			paths = append(paths, strings.TrimPrefix(f, sysctlRoot+"/"))
		}
	}
	var values []sysctlValue
	seen := make(map[string]bool)
	for _, p := range paths {
		if seen[p] {
			continue
		}
		seen[p] = true
		v, err := readSysctl(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue // an interface that went meanwhile
		}
		if err != nil {
			return nil, err
		}
		values = append(values, sysctlValue{p, v})
	}
	return values, nil
}

// sysctlPlan is what Prepare has to change.
type sysctlPlan struct {
	change  []sysctlNeed
	missing []string
}

// planSysctls compares and adds the old values to the state; what an earlier
// start recorded stays.
func planSysctls(s *state, idle Idle) (plan sysctlPlan, err error) {
	for _, n := range slices.Concat(sysctlNeeds, idle.needs()) {
		now, err := readSysctl(n.path)
		if errors.Is(err, fs.ErrNotExist) {
			if !n.flowtable {
				plan.missing = append(plan.missing, n.path)
			}
			continue
		}
		if err != nil {
			return plan, err
		}
		if now == n.value {
			continue
		}
		plan.change = append(plan.change, n)
		if s.has(n.path) {
			continue
		}
		values, err := n.before()
		if err != nil {
			return plan, err
		}
		s.Sysctls = append(s.Sysctls, values...)
	}
	return plan, nil
}

// restoreSysctls puts recorded values back and says which. A file that is gone
// belonged to an interface that is gone.
func restoreSysctls(values []sysctlValue) (did []string, err error) {
	var errs []error
	for _, v := range values {
		now, err := readSysctl(v.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil && now != v.Value {
			if err = writeSysctl(v.Path, v.Value); err == nil {
				did = append(did, fmt.Sprintf("set sysctl %s from %s back to %s", v.Path, now, v.Value))
			}
		}
		errs = append(errs, err)
	}
	return did, errors.Join(errs...)
}

// advertisedRoutes warns of IPv6 default routes that the kernel drops when
// forwarding is switched on: those that it learned from router advertisements,
// unless accept_ra is 2 (Documentation/networking/ip-sysctl.rst).
func advertisedRoutes() ([]string, error) {
	routes, err := rtnl.RouteListFiltered(rtnl.FAMILY_V6, &rtnl.Route{Protocol: unix.RTPROT_RA}, rtnl.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("list IPv6 routes: %w", err)
	}
	var warnings []string
	for _, r := range routes {
		link, err := rtnl.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue // gone meanwhile
		}
		name := link.Attrs().Name
		if v, err := readSysctl("net/ipv6/conf/" + name + "/accept_ra"); err == nil && v == "1" {
			warnings = append(warnings, fmt.Sprintf("IPv6 routes of %s come from router advertisements, which the kernel stops to heed when it forwards: set net.ipv6.conf.%s.accept_ra=2", name, name))
		}
	}
	return warnings, nil
}

// Prepared says what Prepare did.
type Prepared struct {
	// Changed sysctls, as paths below /proc/sys.
	Changed []string
	// Missing sysctls: the kernel was built without what they control.
	Missing []string
	// Warnings are for the administrator.
	Warnings []string
}

// Prepare makes the network namespace of the calling thread ready for a
// gateway: the sysctls and the policy routing. What it changes is recorded
// before, in the state file of dir (empty: DefaultStateDir), which Down reads;
// the record of an earlier start is kept. It is safe to repeat, also with another
// idle.
func Prepare(dir string, steer Steering, idle Idle) (p Prepared, err error) {
	file, err := StateFile(dir)
	if err != nil {
		return p, err
	}
	s, known, err := loadState(file)
	if err != nil {
		return p, err
	}
	if known && s.Steering != steer {
		// The configuration has moved the mark or the table.
		if _, err := s.Steering.Remove(); err != nil {
			return p, err
		}
	}
	s.Steering = steer
	_ = tryCtNetlink() // where conntrack is a module, its sysctls come with it
	plan, err := planSysctls(&s, idle)
	if err != nil {
		return p, err
	}
	p.Missing = plan.missing
	if err := s.save(file); err != nil {
		return p, err
	}
	for _, n := range plan.change {
		if n.path == "net/ipv6/conf/all/forwarding" {
			if p.Warnings, err = advertisedRoutes(); err != nil {
				return p, err
			}
		}
		if err := writeSysctl(n.path, n.value); err != nil {
			return p, err
		}
		p.Changed = append(p.Changed, n.path)
	}
	return p, steer.Prepare()
}
