package probe

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

// many is what the order "many" has asked for: very many permissions of one
// kind, for the bench.
type many struct {
	base     int64               // bytes of the heap before the first of them
	kept     []any               // what the gateway gave for each of them
	sessions []filterapi.Session // of the clients, in turn
}

// clientQuota is how many permissions one client may hold (engine.DefaultQuota).
const clientQuota = 64

// timedCalls are those whose time is taken, the last of an order.
const timedCalls = 500

// makeMany has the probe hold a number of permissions of a kind, without a
// primary connection: to the ports of a target on, for clients from an address
// on. It tells what each of them takes of the heap, with all that the gateway
// keeps for it, and how long calls took beside those that there were.
func (f *Filter) makeMany(a args, out *reply) error {
	client, err1 := netip.ParseAddr(a.Local)
	target, err2 := addrPort(a.Remote)
	if err1 != nil || err2 != nil || a.Bytes == 0 {
		return filterapi.ErrInvalidArgument
	}
	f.manyMu.Lock()
	defer f.manyMu.Unlock()
	m := &f.many
	if m.kept == nil {
		m.base = heapInUse()
	}
	first, n := len(m.kept), int(a.Bytes)
	m.kept = append(slices.Grow(m.kept, n-first), make([]any, n-first)...)
	for len(m.sessions)*clientQuota < n {
		s, err := f.fw.ClientSession(nth(client, len(m.sessions)))
		if err != nil {
			return err
		}
		m.sessions = append(m.sessions, s)
	}
	call := func(i int) (err error) {
		m.kept[i], err = permit(m.sessions[i/clientQuota], a, nth(client, i/clientQuota), target, i)
		return err
	}
	if err := together(first, n-timedCalls, call); err != nil {
		return err
	}
	took := make([]time.Duration, 0, timedCalls)
	for i := max(first, n-timedCalls); i < n; i++ {
		began := time.Now()
		if err := call(i); err != nil {
			return err
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	out.P50, out.P99 = took[len(took)/2].Microseconds(), took[len(took)*99/100].Microseconds()
	out.Heap = float64(heapInUse()-m.base) / float64(n)
	return nil
}

// permit asks for permission i.
func permit(s filterapi.Session, a args, client netip.Addr, target netip.AddrPort, i int) (any, error) {
	n := filterapi.Negotiated{Proto: a.proto(), Protocol: a.Protocol, Flags: filterapi.Timeout, Expiry: time.Hour}
	// Other ports before other addresses, as of few servers.
	to := netip.AddrPortFrom(nth(target.Addr(), i/1000), target.Port()+uint16(i%1000))
	switch a.Kind {
	case "future":
		return s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: to})
	case "redirect":
		_, actions, err := s.RedirectConnections(filterapi.Redirect{Negotiated: n, Targets: []netip.AddrPort{to}})
		if err != nil {
			return nil, err
		}
		return actions[0], nil
	case "bind":
		binds, err := s.BindForClient(filterapi.Bind{
			Negotiated: n, Clients: []netip.AddrPort{netip.AddrPortFrom(client, to.Port())}, IPFilter: filterapi.OnlyFrom(to.Addr()),
		})
		if err != nil {
			return nil, err
		}
		return binds[0], nil
	}
	return nil, fmt.Errorf("kind %q: %w", a.Kind, filterapi.ErrInvalidArgument)
}

// together makes calls as many callers come together.
func together(from, to int, call func(int) error) error {
	const callers = 64
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error
	next := make(chan int)
	for range callers {
		wg.Go(func() {
			for i := range next {
				if err := call(i); err != nil {
					mu.Lock()
					failed = err
					mu.Unlock()
				}
			}
		})
	}
	for i := from; i < to; i++ {
		next <- i
	}
	close(next)
	wg.Wait()
	return failed
}

// nth is the nth address after one.
func nth(a netip.Addr, n int) netip.Addr {
	b := a.As4()
	x := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	x += uint32(n)
	return netip.AddrFrom4([4]byte{byte(x >> 24), byte(x >> 16), byte(x >> 8), byte(x)})
}

// heapInUse is what lives on the heap.
func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // pools let go in the second one
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}
