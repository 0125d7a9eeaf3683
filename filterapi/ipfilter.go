package filterapi

import (
	"fmt"
	"net/netip"

	"go4.org/netipx"
)

// IPFilter is a set of source addresses, IPv4 and IPv6. A nil filter is the
// set of all, the zero value the empty one. What is handed to the gateway is
// copied there. Not safe for concurrent changes. (IFWXIpFilter)
type IPFilter struct{ set *netipx.IPSet }

// OnlyFrom makes the filter that admits exactly these hosts.
func OnlyFrom(addrs ...netip.Addr) *IPFilter {
	f := new(IPFilter)
	_ = f.change(func(b *netipx.IPSetBuilder) {
		for _, a := range addrs {
			b.Add(a)
		}
	})
	return f
}

// change applies edits to the set.
func (f *IPFilter) change(edit func(*netipx.IPSetBuilder)) error {
	var b netipx.IPSetBuilder
	b.AddSet(f.current())
	edit(&b)
	set, err := b.IPSet()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidArgument, err)
	}
	f.set = set
	return nil
}

func (f *IPFilter) current() *netipx.IPSet {
	if f.set == nil {
		return new(netipx.IPSet)
	}
	return f.set
}

func addressRange(lo, hi netip.Addr) (netipx.IPRange, error) {
	r := netipx.IPRangeFrom(lo, hi)
	if !r.IsValid() || lo.Zone() != "" || lo.Is4In6() || hi.Is4In6() {
		return r, fmt.Errorf("range %v-%v: %w", lo, hi, ErrInvalidArgument)
	}
	return r, nil
}

// IncludeRange adds the addresses from lo to hi, both included.
// ErrInvalidArgument: they are no range of one family.
func (f *IPFilter) IncludeRange(lo, hi netip.Addr) error {
	r, err := addressRange(lo, hi)
	if err != nil {
		return err
	}
	return f.change(func(b *netipx.IPSetBuilder) { b.AddRange(r) })
}

// ExcludeRange takes the addresses from lo to hi away.
func (f *IPFilter) ExcludeRange(lo, hi netip.Addr) error {
	r, err := addressRange(lo, hi)
	if err != nil {
		return err
	}
	return f.change(func(b *netipx.IPSetBuilder) { b.RemoveRange(r) })
}

// IncludeFilter adds what another filter admits.
func (f *IPFilter) IncludeFilter(o *IPFilter) error {
	return f.change(func(b *netipx.IPSetBuilder) { b.AddSet(o.all()) })
}

// ExcludeFilter takes away what another filter admits.
func (f *IPFilter) ExcludeFilter(o *IPFilter) error {
	return f.change(func(b *netipx.IPSetBuilder) { b.RemoveSet(o.all()) })
}

// all is the set of a filter that may be nil.
func (f *IPFilter) all() *netipx.IPSet {
	if f != nil {
		return f.current()
	}
	var b netipx.IPSetBuilder
	b.AddPrefix(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	b.AddPrefix(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	set, _ := b.IPSet() // two valid prefixes
	return set
}

// Includes says whether a source is in the set; a nil filter includes all.
// (IsIncluded)
func (f *IPFilter) Includes(a netip.Addr) bool { return f == nil || f.current().Contains(a) }

// Equal says whether two filters admit the same sources; nil and the set of
// every address differ. (Compare)
func (f *IPFilter) Equal(o *IPFilter) bool {
	if f == nil || o == nil {
		return f == o
	}
	return f.current().Equal(o.current())
}

// Clone is a copy that the caller may change.
func (f *IPFilter) Clone() *IPFilter {
	if f == nil {
		return nil
	}
	return &IPFilter{f.set} // an IPSet never changes
}

// Prefixes are the fewest prefixes that make up the set, in order; none for a
// nil filter.
func (f *IPFilter) Prefixes() []netip.Prefix {
	if f == nil {
		return nil
	}
	return f.current().Prefixes()
}
