package pcp

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// lookEvery is how often the keeper looks at the addresses of interfaces and at
// the clocks of mappings.
const lookEvery = 2 * time.Second

// keeper has a socket at each address of the gateway that is served, and tells
// the hosts there when the state of the server begins anew.
type keeper struct {
	s        *Server
	open     map[netip.Addr]*socket
	begun    bool
	external map[netip.Addr]netip.Addr // of the hosts at each address, as it was told last
	failed   map[string]int            // what was logged, and is not repeated
	news     int                       // announcements that are left to send
	next     time.Time                 // when
	pause    time.Duration             // and then
}

// socket is open at one address.
type socket struct {
	conn    filterapi.PacketConn
	at      netip.Addr
	iface   string
	sources atomic.Pointer[filterapi.IPFilter]
	done    chan struct{}
	once    sync.Once
}

// place is where a socket is to be, and whom it serves.
type place struct {
	at      netip.Addr
	iface   string
	sources *filterapi.IPFilter
	guest   netip.Addr // one of the hosts that may be there
}

func (k *keeper) run(ctx context.Context) {
	tick := time.NewTimer(lookEvery)
	defer tick.Stop()
	defer k.closeAll()
	for {
		configured := false
		select {
		case <-ctx.Done():
			return
		case <-k.s.wake:
			configured = true
			k.look(ctx)
		case <-tick.C:
			if k.s.config.Load() != nil {
				k.look(ctx)
			}
		}
		k.announce()
		k.s.look(ctx, job{configured: configured})
		tick.Reset(k.until())
	}
}

// until is the time until there is something to do.
func (k *keeper) until() time.Duration {
	if k.news == 0 {
		return lookEvery
	}
	return min(lookEvery, max(time.Until(k.next), time.Millisecond))
}

// look has the sockets follow the configuration and the interfaces' addresses.
func (k *keeper) look(ctx context.Context) {
	c := k.s.serving()
	places := k.places(c)
	for at, x := range k.open {
		i := slices.IndexFunc(places, func(p place) bool { return p.at == at && p.iface == x.iface })
		if i < 0 {
			x.close()
			delete(k.open, at)
			k.s.log.Info("serves no more", zap.Stringer("at", at))
			continue
		}
		if !places[i].sources.Equal(x.sources.Load()) {
			if err := x.conn.SetIPFilter(places[i].sources); err != nil {
				k.complain("change who may ask", at, err)
				continue
			}
			x.sources.Store(places[i].sources)
		}
	}
	fresh := false
	for _, p := range places {
		if k.open[p.at] == nil && k.listen(p) {
			fresh = true
		}
	}
	if len(k.open) == 0 {
		k.begun, k.external = false, nil // what was there has ended
		return
	}
	k.watchExternal(ctx, places)
	if !k.begun {
		k.begun = true
		k.s.begin()
	}
	if fresh {
		k.renew()
	}
}

// places are the addresses to listen at: those of the interfaces of networks
// that are served, where hosts of such a network can be.
func (k *keeper) places(c *Config) (out []place) {
	for _, n := range c.Networks {
		for _, iface := range n.Interfaces {
			list, err := k.s.interfaces(iface)
			if err != nil {
				continue // it is not there now
			}
			for _, a := range list {
				out = k.add(out, n, iface, a)
			}
		}
	}
	return out
}

// add adds one address of an interface; several networks may share it.
func (k *keeper) add(all []place, n Network, iface string, a netip.Prefix) []place {
	from := n.of(a.Addr())
	if len(n.Prefixes) == 0 {
		from = []netip.Prefix{a.Masked()}
	}
	if !slices.ContainsFunc(from, a.Overlaps) {
		return all // its hosts are not on this link
	}
	i := slices.IndexFunc(all, func(p place) bool { return p.at == a.Addr() })
	if i < 0 {
		i = len(all)
		all = append(all, place{at: a.Addr(), iface: iface, sources: &filterapi.IPFilter{}, guest: guest(a)})
	}
	for _, p := range from {
		lo, hi := bounds(p)
		_ = all[i].sources.IncludeRange(lo, hi) // a prefix is a range
	}
	return all
}

// guest is an address that a host on the link may have.
func guest(a netip.Prefix) netip.Addr {
	if _, last := bounds(a); a.Addr().Next().Less(last) {
		return a.Addr().Next()
	}
	return a.Addr().Prev()
}

// bounds are the first and the last address of a prefix.
func bounds(p netip.Prefix) (lo, hi netip.Addr) {
	lo = p.Masked().Addr()
	b := lo.AsSlice()
	for i := p.Bits(); i < lo.BitLen(); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	hi, _ = netip.AddrFromSlice(b)
	return lo, hi
}

// listen opens a socket; false: it will be tried again.
func (k *keeper) listen(p place) bool {
	conn, err := k.s.fw.ListenPacket(netip.AddrPortFrom(p.at, Port), p.sources)
	if err != nil {
		k.complain("listen", p.at, err)
		return false
	}
	x := &socket{conn: conn, at: p.at, iface: p.iface, done: make(chan struct{})}
	x.sources.Store(p.sources)
	k.open[p.at] = x
	k.s.log.Info("serves", zap.Stringer("at", p.at), zap.String("interface", p.iface))
	go func() {
		defer close(x.done)
		k.s.read(x)
	}()
	return true
}

// complain logs what fails, once for each address.
func (k *keeper) complain(what string, at netip.Addr, err error) {
	text := fmt.Sprint(what, at, err)
	if k.failed == nil || len(k.failed) > 100 {
		k.failed = make(map[string]int)
	}
	if k.failed[text]++; k.failed[text] == 1 {
		k.s.log.Warn("cannot "+what+"; it is tried again", zap.Stringer("at", at), zap.Error(err))
	}
}

func (x *socket) close() {
	x.once.Do(func() {
		_ = x.conn.Close() // nobody asks any more
		<-x.done
	})
}

func (k *keeper) closeAll() {
	for _, x := range k.open {
		x.close()
	}
}

// read hands on what comes to a socket. Who is not to be served has been kept
// away by the kernel; it is looked at once more.
func (s *Server) read(x *socket) {
	b := make([]byte, maxMessage+1)
	for {
		n, from, err := x.conn.ReadFrom(b)
		switch {
		case closed(err):
			return
		case err != nil:
			time.Sleep(time.Millisecond) // an ICMP error of a client that has gone
			continue
		}
		to, ok := from.(*net.UDPAddr)
		if !ok {
			continue
		}
		peer := netip.AddrPortFrom(to.AddrPort().Addr().Unmap().WithZone(""), to.AddrPort().Port())
		if x.at == peer.Addr() || !x.sources.Load().Includes(peer.Addr()) || !s.serving().serves(peer.Addr()) {
			continue
		}
		s.hand(job{from: peer, text: slices.Clone(b[:n]), reply: func(answer []byte) {
			_, _ = x.conn.WriteTo(answer, from) // the client asks again
		}})
	}
}

// addressesOf are the addresses of an interface that hosts can ask, with the
// prefixes that are on its link. Those of the link alone are left out: they
// stand for no host in a mapping.
func addressesOf(name string) ([]netip.Prefix, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("look up interface %q: %w", name, err)
	}
	all, err := i.Addrs()
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %q: %w", name, err)
	}
	var out []netip.Prefix
	for _, a := range all {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		addr, ok := netip.AddrFromSlice(n.IP)
		bits, _ := n.Mask.Size()
		if addr = addr.Unmap(); ok && addr.IsGlobalUnicast() {
			out = append(out, netip.PrefixFrom(addr, bits))
		}
	}
	return out, nil
}
