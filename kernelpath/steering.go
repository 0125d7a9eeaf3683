package kernelpath

import (
	"errors"
	"fmt"
	"net"
	"os"

	rtnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// Steering is the policy routing that delivers packets of the User path to
// the gateway's own sockets, whatever their destination:
//
//	ip rule add fwmark U/PM lookup TABLE priority PRIORITY
//	ip route add local default dev lo table TABLE
//
// for IPv4 and IPv6 each.
type Steering struct {
	Mark     uint32 `json:"mark"`
	Mask     uint32 `json:"mask"`
	Table    int    `json:"table"`
	Priority int    `json:"priority"`
}

// NewSteering steers the User path of these marks.
func NewSteering(m flow.Marks, table, priority int) Steering {
	return Steering{m.Value(flow.User), m.PathMask(), table, priority}
}

func (s Steering) String() string {
	return fmt.Sprintf("fwmark 0x%x/0x%x lookup %d priority %d", s.Mark, s.Mask, s.Table, s.Priority)
}

// Prepare sets the routes up, and refuses a routing table that holds routes of
// others. Alone they lead no packet anywhere.
//
// One rule of anybody's makes the kernel walk the list of rules for each packet
// (fib_has_custom_rules in net/ipv4/fib_rules.c), which costs each flow about 8%
// of what forwarding it costs. So Install waits for the first flow of user
// space.
func (s Steering) Prepare() error {
	handle, err := rtnl.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open route netlink socket: %w", err)
	}
	defer handle.Close()
	for _, family := range ipFamilies() {
		if err := s.checkTable(handle, family); err != nil {
			return err
		}
	}
	for _, family := range ipFamilies() {
		if err := s.lay(handle, family); err != nil {
			_, undo := s.Remove()
			return errors.Join(err, undo)
		}
	}
	return nil
}

// Install sets the rules and routes up in the network namespace of the calling
// thread; what is there already is left as it is. It refuses a routing table
// that holds routes of others. undo takes away what belongs to the Steering,
// also what an earlier start left, and may be called from a thread of the
// same namespace, more than once. On error nothing is left behind.
func (s Steering) Install() (undo func() error, err error) {
	undo = func() error { _, err := s.Remove(); return err }
	handle, err := rtnl.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open route netlink socket: %w", err)
	}
	defer handle.Close()
	for _, family := range ipFamilies() {
		if err := s.checkTable(handle, family); err != nil {
			return nil, err
		}
	}
	for _, family := range ipFamilies() {
		if err := s.install(handle, family); err != nil {
			return nil, errors.Join(err, undo())
		}
	}
	return undo, nil
}

// ipFamilies are those that the kernel has.
func ipFamilies() []int {
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		return []int{rtnl.FAMILY_V4}
	}
	return []int{rtnl.FAMILY_V4, rtnl.FAMILY_V6}
}

func (s Steering) rule(family int) *rtnl.Rule {
	r := rtnl.NewRule()
	r.Family, r.Mark, r.Mask, r.Table, r.Priority = family, s.Mark, &s.Mask, s.Table, s.Priority
	return r
}

func (s Steering) route(family int, lo rtnl.Link) *rtnl.Route {
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if family == rtnl.FAMILY_V6 {
		all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &rtnl.Route{Family: family, Dst: all, Table: s.Table, Type: unix.RTN_LOCAL, Scope: rtnl.SCOPE_HOST, LinkIndex: lo.Attrs().Index}
}

// routes lists the table; own are those that Install sets up.
func (s Steering) routes(h *rtnl.Handle, family int) (own, others []rtnl.Route, err error) {
	all, err := h.RouteListFiltered(family, &rtnl.Route{Table: s.Table}, rtnl.RT_FILTER_TABLE)
	if err != nil {
		return nil, nil, fmt.Errorf("list routes of table %d: %w", s.Table, err)
	}
	for _, r := range all {
		whole := r.Dst == nil
		if !whole {
			ones, _ := r.Dst.Mask.Size()
			whole = ones == 0
		}
		if whole && r.Type == unix.RTN_LOCAL {
			own = append(own, r)
		} else {
			others = append(others, r)
		}
	}
	return own, others, nil
}

func (s Steering) rules(h *rtnl.Handle, family int) ([]rtnl.Rule, error) {
	all, err := h.RuleList(family)
	if err != nil {
		return nil, fmt.Errorf("list routing rules: %w", err)
	}
	var own []rtnl.Rule
	for _, r := range all {
		if r.Mark == s.Mark && r.Mask != nil && *r.Mask == s.Mask && r.Table == s.Table && r.Priority == s.Priority {
			own = append(own, r)
		}
	}
	return own, nil
}

func (s Steering) checkTable(h *rtnl.Handle, family int) error {
	_, others, err := s.routes(h, family)
	if err != nil {
		return err
	}
	if len(others) > 0 {
		return fmt.Errorf("routing table %d belongs to somebody else: it has %d other routes; choose another table", s.Table, len(others))
	}
	return nil
}

// lay adds the route.
func (s Steering) lay(h *rtnl.Handle, family int) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := h.RouteAdd(s.route(family, lo)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add local default route to table %d: %w", s.Table, err)
	}
	return nil
}

func (s Steering) install(h *rtnl.Handle, family int) error {
	// The route comes first: a rule without it would let marked packets fall
	// through to the other tables.
	if err := s.lay(h, family); err != nil {
		return err
	}
	own, err := s.rules(h, family)
	if err != nil || len(own) > 0 {
		return err
	}
	if err := h.RuleAdd(s.rule(family)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add routing rule %s: %w", s, err)
	}
	return nil
}

// Remove takes the rules and routes away and says which.
func (s Steering) Remove() (did []string, err error) {
	handle, err := rtnl.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open route netlink socket: %w", err)
	}
	defer handle.Close()
	var errs []error
	for _, family := range ipFamilies() {
		name := map[int]string{rtnl.FAMILY_V4: "IPv4", rtnl.FAMILY_V6: "IPv6"}[family]
		rules, err := s.rules(handle, family)
		errs = append(errs, err)
		for range rules {
			if err := handle.RuleDel(s.rule(family)); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("delete %s routing rule %s: %w", name, s, err))
				continue
			}
			did = append(did, fmt.Sprintf("deleted %s routing rule %s", name, s))
		}
		own, _, err := s.routes(handle, family)
		errs = append(errs, err)
		for _, r := range own {
			if err := handle.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("delete %s local default route of table %d: %w", name, s.Table, err))
				continue
			}
			did = append(did, fmt.Sprintf("deleted %s local default route of table %d", name, s.Table))
		}
	}
	return did, errors.Join(errs...)
}
