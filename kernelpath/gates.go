package kernelpath

import (
	"net/netip"
	"strings"
	"time"

	"github.com/sluicegw/sluice/nat"
)

// gates is the owner goroutine's record of the sets of that name (setGate): the
// destinations that the first packets of permitted flows go to, the clients
// whose flows leave from an endpoint of their permission, and until when
// they are in the kernel; zero: for ever.
//
// A gate lets nobody in; it only has those packets looked at. So it may stay
// longer than its permissions, and they need not be counted: very many of them
// may be for one address. Those without an end are compared with what is held
// when they have become many (Table.closeGates).
type gates struct {
	until map[slotKey]time.Time
	// four and six are the names of the sets.
	four, six string
	// opening are those of the running transaction.
	opening map[slotKey]opening
	swept   time.Time
	// enough is how many there are to be before they are compared.
	enough int
}

type opening struct {
	elem  element
	until time.Time
}

// gateLasts is how much longer than its permission a gate stays: the next one
// for the same address then changes nothing.
const gateLasts = 10 * time.Minute

// minGates are never too many.
const minGates = 4096

func newGates() gates {
	return gates{until: map[slotKey]time.Time{}, four: setGate(ipv4), six: setGate(ipv6), enough: minGates}
}

// open has a permission's destination looked at, and what its client sends if
// that has a source of its own.
func (g *gates) open(p nat.Permission, now time.Time) {
	to, err := destinationOf(p)
	if err != nil {
		return
	}
	g.openFor(to.Addr(), p, now)
	if p.Leaves != "" {
		g.openFor(p.Client.Addr(), p, now)
	}
}

func (g *gates) openFor(a netip.Addr, p nat.Permission, now time.Time) {
	var until time.Time
	if p.Timeout > 0 {
		until = now.Add(p.Timeout)
	}
	set, all := g.four, a.As16()
	raw := all[12:]
	if a.Is6() {
		set, raw = g.six, all[:]
	}
	// Nearly every one is open; these look-ups make no string.
	if have, ok := g.until[slotKey{set, string(raw)}]; ok && covers(have, until) {
		return
	}
	if have, ok := g.opening[slotKey{set, string(raw)}]; ok && covers(have.until, until) {
		return
	}
	k := slotKey{set, string(raw)}
	if !until.IsZero() {
		until = until.Add(gateLasts)
	}
	if g.opening == nil {
		g.opening = map[slotKey]opening{}
	}
	g.opening[k] = opening{element{text: a.String(), key: []byte(k.key)}, until}
}

// covers says whether a gate that is open until have is open until want.
func covers(have, want time.Time) bool {
	return have.IsZero() || !want.IsZero() && !have.Before(want)
}

// change adds what opens to the elements of a transaction: what may be there
// goes first, so that its time begins anew.
func (g *gates) change(gone, fresh map[string][]element, now time.Time) {
	for k, o := range g.opening {
		gone[k.set] = append(gone[k.set], o.elem)
		if !o.until.IsZero() {
			o.elem.timeout = o.until.Sub(now)
		}
		fresh[k.set] = append(fresh[k.set], o.elem)
	}
}

// opened is told that the kernel has acknowledged.
func (g *gates) opened(now time.Time) {
	for k, o := range g.opening {
		g.until[k] = o.until
	}
	g.opening = nil
	if now.Sub(g.swept) < gateLasts {
		return
	}
	g.swept = now
	for k, until := range g.until {
		if !until.IsZero() && until.Before(now) {
			delete(g.until, k)
		}
	}
}

// restore gives the elements of a set that is new.
func (g *gates) restore(there func(set string) bool, fresh map[string][]element, now time.Time) {
	for k, until := range g.until {
		left := time.Duration(0)
		if !until.IsZero() {
			left = until.Sub(now)
		}
		if left < 0 || there(k.set) {
			continue
		}
		fresh[k.set] = append(fresh[k.set], element{text: k.key, key: []byte(k.key), timeout: left})
	}
}

// closeGates closes the gates without an end that no permission needs any more,
// each time that there are twice as many gates as were left the last time. It is
// for the owner goroutine, between two transactions.
func (t *Table) closeGates() {
	g := &t.holders.gates
	if len(g.until) < g.enough {
		return
	}
	needed := t.holders.addresses()
	closing := map[string][]element{}
	for k, until := range g.until {
		if !until.IsZero() || needed[k.key] {
			continue
		}
		closing[k.set] = append(closing[k.set], element{text: k.key, key: []byte(k.key)})
	}
	tx := &transaction{}
	for _, name := range sortedKeys(closing) {
		s := &set{name: name}
		tx.addElements(s, 0, closing[name]) // somebody else may have closed it
		tx.deleteElements(s, closing[name])
	}
	if len(closing) > 0 && t.commit(tx) == nil { // else they are tried again
		for name, list := range closing {
			for _, e := range list {
				delete(g.until, slotKey{name, string(e.key)})
			}
		}
	}
	g.enough = max(minGates, 2*len(g.until))
}

// addresses are those that what is held begins with: where first packets go, or
// whose flows leave from an endpoint of their own. A key of a permission with
// sources begins with the source: it has both.
func (h *holders) addresses() map[string]bool {
	all := map[string]bool{}
	note := func(k slotKey) {
		size := len(familyOf(strings.HasSuffix(k.set, ipv6.suffix) && !ofNetworkRule(k.set)).unspecified.raw)
		all[k.key[:size]] = true
		if len(k.key) > size+8 { // protocol and port
			all[k.key[size:2*size]] = true
		}
	}
	for k := range h.slots {
		note(k)
	}
	h.lone.each(func(p nat.Permission, until time.Time) {
		for _, x := range heldOf(p, until) {
			note(x.slot.at())
		}
	})
	for _, r := range h.mapped.held {
		all[string(r.inside[:])] = true
		all[string(r.external[:])] = true
	}
	return all
}
