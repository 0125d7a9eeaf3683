package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	rtnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Why an address has no route. The errors of Routes.Lookup match one of them.
var (
	ErrNoRoute     = fmt.Errorf("no route: %w", unix.ENETUNREACH)
	ErrUnreachable = fmt.Errorf("unreachable route: %w", unix.EHOSTUNREACH)
	ErrProhibited  = errors.New("administratively prohibited")   // a route of type prohibit
	ErrBlackhole   = errors.New("silently dropped by its route") // a route of type blackhole
	// ErrNoHost: a broadcast address of a link of the gateway's, or an anycast
	// address of its own. The gateway itself hears what is sent there.
	ErrNoHost = errors.New("not the address of a host")
)

// maxRoutes bounds the cache, some 100 bytes an entry. A full one is emptied:
// what is in use comes back with one question each.
const maxRoutes = 16384

// Routes answers where an address is reached, as the kernel's tables say. It
// implements engine.Routes. Safe for concurrent use.
//
// Answers are cached while Run listens to the kernel's changes, and only then; see
// routes_class.go.
type Routes struct {
	handle  *rtnl.Handle
	tables  *rtnl.Handle  // for whole tables, which take their time
	changed chan struct{} // holds one: the classes are to be made anew
	events  *netlink.Conn
	routes  atomic.Pointer[routeCache] // nil: no cache
	names   atomic.Pointer[nameCache]
}

// routeCache holds the answers between two changes. An answer that was asked
// for before a change ends in the cache that the change has thrown away.
type routeCache struct {
	classes atomic.Pointer[classes] // nil: there are none, or none yet

	mu      sync.RWMutex
	byAddr  map[netip.Addr]routeAnswer
	byClass map[class]routeAnswer
}

// get is what is known of an address.
func (c *routeCache) get(dst netip.Addr) (routeAnswer, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	a, ok := c.byAddr[dst]
	if ok {
		return a, true
	}
	if of := c.classes.Load(); of != nil {
		if k, in := of.of(dst); in {
			if a, ok = c.byClass[k]; a.err != nil {
				a.err = lookUpFailed(dst, a.err)
			}
		}
	}
	return a, ok
}

// keep keeps an answer: for all addresses that have the same, or for the one. The
// gateway's own have each another.
func (c *routeCache) keep(dst netip.Addr, a routeAnswer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if of := c.classes.Load(); of != nil && !a.local {
		if k, in := of.of(dst); in {
			a.err = errors.Unwrap(a.err) // without the address
			c.byClass[k] = a
			return
		}
	}
	if len(c.byAddr) >= maxRoutes {
		clear(c.byAddr)
	}
	c.byAddr[dst] = a
}

type nameCache struct {
	mu      sync.RWMutex
	byIndex map[int]string
}

type routeAnswer struct {
	iface  string
	source netip.Addr
	local  bool
	err    error
}

// routeGroups are the changes that make answers stale
// (enum rtnetlink_groups, linux/rtnetlink.h).
var routeGroups = []uint32{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE,
	unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_NEXTHOP,
}

// NewRoutes opens its sockets in the network namespace of the calling thread.
func NewRoutes() (*Routes, error) {
	handle, err := rtnl.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open route netlink socket: %w", err)
	}
	events, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		handle.Close()
		return nil, fmt.Errorf("open route netlink socket: %w", err)
	}
	tables, err := rtnl.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		handle.Close()
		events.Close()
		return nil, fmt.Errorf("open route netlink socket: %w", err)
	}
	r := &Routes{handle: handle, tables: tables, changed: make(chan struct{}, 1), events: events}
	for _, g := range routeGroups {
		if err := events.JoinGroup(g); err != nil {
			r.Close()
			return nil, fmt.Errorf("listen to route changes: %w", err)
		}
	}
	return r, nil
}

// Close frees the sockets; lookups fail from then on.
func (r *Routes) Close() error {
	r.routes.Store(nil)
	r.names.Store(nil)
	r.handle.Close()
	r.tables.Close()
	return r.events.Close()
}

// Run keeps the cache true until ctx is over, which is no error.
func (r *Routes) Run(ctx context.Context) error {
	defer r.routes.Store(nil)
	defer r.names.Store(nil)
	in, err := newRawReader(r.events, 64<<10)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { r.events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	r.forget(true)
	looking, cancel := context.WithCancel(ctx)
	var classifier sync.WaitGroup
	defer classifier.Wait()
	defer cancel()
	classifier.Go(func() { r.classify(looking) })
	for {
		datagram, err := in.read()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			r.forget(true)
		case err != nil:
			return fmt.Errorf("read route changes: %w", err)
		default:
			r.forget(tellsLink(datagram))
		}
	}
}

func tellsLink(datagram []byte) bool {
	for {
		m, rest, ok := nextMessage(datagram)
		if !ok {
			return false
		}
		if m.kind == unix.RTM_NEWLINK || m.kind == unix.RTM_DELLINK {
			return true
		}
		datagram = rest
	}
}

func (r *Routes) forget(links bool) {
	if links {
		r.names.Store(&nameCache{byIndex: make(map[int]string)})
	}
	r.routes.Store(&routeCache{byAddr: make(map[netip.Addr]routeAnswer), byClass: make(map[class]routeAnswer)})
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// Lookup gives the interface that leads to dst, for a packet without a mark,
// and the source address that the route prefers (invalid where the kernel
// names none); local says that dst is the gateway's own. A zone in dst names
// the interface. Errors match ErrNoRoute, ErrUnreachable, ErrProhibited,
// ErrBlackhole or ErrNoHost, unless the question itself failed.
func (r *Routes) Lookup(dst netip.Addr) (iface string, source netip.Addr, local bool, err error) {
	dst = dst.Unmap()
	cache := r.routes.Load()
	if cache != nil {
		if a, ok := cache.get(dst); ok {
			return a.iface, a.source, a.local, a.err
		}
	}
	a, keep := r.ask(dst)
	if cache != nil && keep {
		cache.keep(dst, a)
	}
	return a.iface, a.source, a.local, a.err
}

// Known is Lookup for what the cache has; ok is false for all else.
func (r *Routes) Known(dst netip.Addr) (iface string, local, ok bool) {
	cache := r.routes.Load()
	if cache == nil {
		return "", false, false
	}
	a, ok := cache.get(dst.Unmap())
	return a.iface, a.local, ok && a.err == nil
}

// AddressOf gives the first address of an interface that others may know, of a
// family.
func (r *Routes) AddressOf(iface string, is6 bool) (netip.Addr, error) {
	fail := func(err error) (netip.Addr, error) {
		return netip.Addr{}, fmt.Errorf("look up the address of %q: %w", iface, err)
	}
	link, err := r.handle.LinkByName(iface)
	if err != nil {
		return fail(err)
	}
	family := rtnl.FAMILY_V4
	if is6 {
		family = rtnl.FAMILY_V6
	}
	list, err := r.handle.AddrList(link, family)
	if err != nil {
		return fail(err)
	}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && a.Scope == unix.RT_SCOPE_UNIVERSE {
			return ip.Unmap(), nil
		}
	}
	return fail(ErrNoRoute)
}

func lookUpFailed(dst netip.Addr, err error) error {
	return fmt.Errorf("look up route to %s: %w", dst, err)
}

// ask asks the kernel. keep: the answer is about the route, and holds until
// the next change.
func (r *Routes) ask(dst netip.Addr) (a routeAnswer, keep bool) {
	fail := func(err error, keep bool) (routeAnswer, bool) {
		return routeAnswer{err: lookUpFailed(dst, err)}, keep
	}
	if !dst.IsValid() {
		return fail(ErrNoRoute, false)
	}
	found, err := r.handle.RouteGetWithOptions(dst.AsSlice(), &rtnl.RouteGetOptions{Oif: dst.Zone()})
	if err != nil {
		if known := routeError(err); known != nil {
			return fail(known, true)
		}
		return fail(err, false)
	}
	if len(found) == 0 {
		return fail(ErrNoRoute, false)
	}
	route := found[0]
	// IPv6 tells routes that lead nowhere as an answer of that type.
	switch route.Type {
	case unix.RTN_UNREACHABLE:
		return fail(ErrUnreachable, true)
	case unix.RTN_PROHIBIT:
		return fail(ErrProhibited, true)
	case unix.RTN_BLACKHOLE:
		return fail(ErrBlackhole, true)
	case unix.RTN_BROADCAST, unix.RTN_ANYCAST:
		return fail(ErrNoHost, true)
	}
	if a.iface, err = r.InterfaceName(route.LinkIndex); err != nil {
		return fail(err, false)
	}
	a.source, _ = netip.AddrFromSlice(route.Src)
	a.source = a.source.Unmap()
	a.local = route.Type == unix.RTN_LOCAL
	return a, true
}

// routeError reads what RTM_GETROUTE says of a route that leads nowhere
// (fib_props in net/ipv4/fib_semantics.c).
func routeError(err error) error {
	switch {
	case errors.Is(err, unix.ENETUNREACH):
		return ErrNoRoute
	case errors.Is(err, unix.EHOSTUNREACH):
		return ErrUnreachable
	case errors.Is(err, unix.EACCES):
		return ErrProhibited
	case errors.Is(err, unix.EINVAL):
		return ErrBlackhole
	}
	return nil
}

// InterfaceName names the interface with this index, which packets carry.
func (r *Routes) InterfaceName(index int) (string, error) {
	cache := r.names.Load()
	if cache != nil {
		cache.mu.RLock()
		name, ok := cache.byIndex[index]
		cache.mu.RUnlock()
		if ok {
			return name, nil
		}
	}
	link, err := r.handle.LinkByIndex(index)
	if err != nil {
		return "", fmt.Errorf("name interface %d: %w", index, err)
	}
	name := link.Attrs().Name
	if cache != nil {
		cache.mu.Lock()
		cache.byIndex[index] = name
		cache.mu.Unlock()
	}
	return name, nil
}
