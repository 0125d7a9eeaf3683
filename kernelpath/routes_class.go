package kernelpath

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	rtnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Nearly every first packet goes to an address that nobody has asked about. It
// need not be asked about, because few answers differ: the kernel chooses a route
// by the prefixes of its tables that have the address in them, and two addresses
// whose longest such prefix, of all tables together, is the same have all of them
// in common. They are a class, and what is known of one is known of all.
//
// That is so for IPv4. The source address that IPv6 prefers depends on the
// destination itself (RFC 6724), and so does the way where a route has several.

// maxClassPrefixes bounds the prefixes that classes are made of. A table with
// more, a backbone's, changes all the time, and is asked about each address.
const maxClassPrefixes = 4096

// classes are the IPv4 prefixes of all tables and rules, the longest first.
type classes []prefixes

// prefixes are those of one length.
type prefixes struct {
	bits int
	all  map[uint32]struct{}
}

// class is one prefix.
type class struct {
	addr uint32
	bits int
}

// of is the class of an address; false: it has none. What the kernel treats by
// its number alone has none.
func (c classes) of(a netip.Addr) (class, bool) {
	if !a.Is4() || a.IsMulticast() {
		return class{}, false
	}
	raw := a.As4()
	n := binary.BigEndian.Uint32(raw[:])
	if n>>24 == 0 || n == 1<<32-1 {
		return class{}, false
	}
	for i := range c {
		head := n & uint32(uint64(1<<32-1)<<(32-c[i].bits))
		if _, ok := c[i].all[head]; ok {
			return class{head, c[i].bits}, true
		}
	}
	return class{}, false
}

var (
	errManyRoutes = errors.New("too many routes")
	errManyWays   = errors.New("a route has several ways")
)

// readClasses reads the tables and rules. An error: there are no classes.
func readClasses(h *rtnl.Handle) (classes, error) {
	all := map[class]struct{}{{0, 0}: {}}
	var refused error
	err := h.RouteListFilteredIter(rtnl.FAMILY_V4, &rtnl.Route{Table: unix.RT_TABLE_UNSPEC}, rtnl.RT_FILTER_TABLE, func(r rtnl.Route) bool {
		switch {
		case len(all) > maxClassPrefixes:
			refused = errManyRoutes
		case len(r.MultiPath) > 0, r.Type == unix.RTN_UNICAST && r.LinkIndex == 0:
			refused = errManyWays
		default:
			addPrefix(all, r.Dst)
		}
		return refused == nil
	})
	if err = errors.Join(err, refused); err != nil {
		return nil, err
	}
	rules, err := h.RuleList(rtnl.FAMILY_V4)
	if err != nil {
		return nil, err
	}
	for _, r := range rules {
		addPrefix(all, r.Dst)
	}
	byBits := map[int]map[uint32]struct{}{}
	for c := range all {
		if byBits[c.bits] == nil {
			byBits[c.bits] = map[uint32]struct{}{}
		}
		byBits[c.bits][c.addr] = struct{}{}
	}
	var list classes
	for bits, addrs := range byBits {
		list = append(list, prefixes{bits, addrs})
	}
	slices.SortFunc(list, func(a, b prefixes) int { return b.bits - a.bits })
	return list, nil
}

// addPrefix adds what a route or a rule is for; nil: everything.
func addPrefix(all map[class]struct{}, dst *net.IPNet) {
	if dst == nil {
		return
	}
	ip, bits := dst.IP.To4(), 0
	if bits, _ = dst.Mask.Size(); ip != nil {
		// A rule keeps the bits behind its prefix ("to 10.1.2.3/8"), and ignores them.
		all[class{binary.BigEndian.Uint32(ip.Mask(dst.Mask)), bits}] = struct{}{}
	}
}

// classify keeps the classes of the cache true, until ctx is over. After a change
// there are none for a moment, and while there are none each address is asked
// about.
func (r *Routes) classify(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.changed:
		}
		begun, cache := time.Now(), r.routes.Load()
		if c, err := readClasses(r.tables); err == nil && cache != nil {
			cache.classes.Store(&c)
		}
		select { // tables that change all the time, or are large, must not keep us busy
		case <-ctx.Done():
			return
		case <-time.After(max(classPause, classShare*time.Since(begun))):
		}
	}
}

// classPause is the least pause between two looks at the tables, and classShare
// how much longer than the look it is.
const (
	classPause = 100 * time.Millisecond
	classShare = 10
)
