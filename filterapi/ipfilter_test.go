package filterapi_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestIPFilterRanges(t *testing.T) {
	var f filterapi.IPFilter // the empty one
	for _, r := range [][2]string{{"192.0.2.10", "192.0.2.20"}, {"2001:db8::1", "2001:db8::ff"}, {"0.0.0.0", "0.0.0.0"}} {
		if err := f.IncludeRange(addr(r[0]), addr(r[1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.ExcludeRange(addr("192.0.2.15"), addr("192.0.2.15")); err != nil {
		t.Fatal(err)
	}
	for a, want := range map[string]bool{
		"192.0.2.9": false, "192.0.2.10": true, "192.0.2.14": true, "192.0.2.15": false, "192.0.2.20": true, "192.0.2.21": false,
		"2001:db8::": false, "2001:db8::1": true, "2001:db8::ff": true, "2001:db8::100": false, "0.0.0.0": true, "::": false,
		"::ffff:192.0.2.10": false,
	} {
		if f.Includes(addr(a)) != want {
			t.Errorf("%s included: %v", a, !want)
		}
	}
}

func TestIPFilterInvalidRanges(t *testing.T) {
	for name, r := range map[string][2]netip.Addr{
		"backwards":    {addr("192.0.2.2"), addr("192.0.2.1")},
		"two families": {addr("192.0.2.2"), addr("2001:db8::1")},
		"no address":   {{}, addr("192.0.2.1")},
		"none at all":  {},
		"zone":         {addr("fe80::1%eth0"), addr("fe80::2%eth0")},
		"mapped":       {addr("::ffff:192.0.2.1"), addr("::ffff:192.0.2.2")},
	} {
		f := filterapi.OnlyFrom(addr("192.0.2.1"))
		for call, change := range map[string]func(lo, hi netip.Addr) error{"include": f.IncludeRange, "exclude": f.ExcludeRange} {
			if err := change(r[0], r[1]); !errors.Is(err, filterapi.ErrInvalidArgument) {
				t.Errorf("%s, %s: %v", name, call, err)
			}
		}
		if !f.Equal(filterapi.OnlyFrom(addr("192.0.2.1"))) {
			t.Errorf("%s changed the filter to %v", name, f.Prefixes())
		}
	}
}

func TestIPFilterNilAndEmpty(t *testing.T) {
	var all *filterapi.IPFilter
	none := &filterapi.IPFilter{}
	every := &filterapi.IPFilter{}
	if err := every.IncludeFilter(nil); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"192.0.2.1", "255.255.255.255", "::", "2001:db8::1"} {
		if !all.Includes(addr(a)) || none.Includes(addr(a)) || !every.Includes(addr(a)) {
			t.Errorf("%s: nil %v, empty %v, every address %v", a, all.Includes(addr(a)), none.Includes(addr(a)), every.Includes(addr(a)))
		}
	}
	if all.Clone() != nil || len(all.Prefixes()) > 0 || len(none.Prefixes()) > 0 {
		t.Error("copies of nil, prefixes of nil and of the empty filter")
	}
	if !all.Equal(nil) || all.Equal(none) || all.Equal(every) || none.Equal(nil) || !none.Equal(filterapi.OnlyFrom()) {
		t.Error("nil, empty and every address are three filters")
	}
	if err := every.ExcludeFilter(nil); err != nil || !every.Equal(none) {
		t.Errorf("everything without everything: %v, %v", every.Prefixes(), err)
	}
	zero := filterapi.OnlyFrom(netip.Addr{})
	if zero == nil || len(zero.Prefixes()) > 0 {
		t.Errorf("only from no address lets in %v", zero.Prefixes())
	}
}

func TestIPFilterClone(t *testing.T) {
	f := filterapi.OnlyFrom(addr("192.0.2.1"), addr("2001:db8::1"))
	c := f.Clone()
	if !c.Equal(f) || c == f {
		t.Fatalf("a copy is %v", c.Prefixes())
	}
	if err := c.IncludeRange(addr("192.0.2.9"), addr("192.0.2.9")); err != nil {
		t.Fatal(err)
	}
	if f.Includes(addr("192.0.2.9")) || c.Equal(f) {
		t.Error("a change of the copy changed the filter")
	}
	if got := fmt.Sprint(f.Prefixes()); got != "[192.0.2.1/32 2001:db8::1/128]" {
		t.Errorf("prefixes %s", got)
	}
}

// Any sequence of edits does what it does to a plain table of 256 addresses.
func TestIPFilterAgainstAModel(t *testing.T) {
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}) }
	for range 50 {
		var f, g filterapi.IPFilter
		var model, other [256]bool
		edits := []string{}
		for range 30 {
			lo := rand.IntN(256)
			hi := lo + rand.IntN(256-lo)
			op := rand.IntN(5)
			edits = append(edits, fmt.Sprintf("%d(%d-%d)", op, lo, hi))
			var err error
			switch op {
			case 0:
				err = f.IncludeRange(at(lo), at(hi))
			case 1:
				err = f.ExcludeRange(at(lo), at(hi))
			case 2:
				err = g.IncludeRange(at(lo), at(hi))
			case 3:
				err = f.IncludeFilter(&g)
			case 4:
				err = f.ExcludeFilter(&g)
			}
			if err != nil {
				t.Fatal(err)
			}
			for i := range model {
				in := i >= lo && i <= hi
				switch op {
				case 0:
					model[i] = model[i] || in
				case 1:
					model[i] = model[i] && !in
				case 2:
					other[i] = other[i] || in
				case 3:
					model[i] = model[i] || other[i]
				case 4:
					model[i] = model[i] && !other[i]
				}
			}
		}
		var rebuilt filterapi.IPFilter
		for i, want := range model {
			if f.Includes(at(i)) != want {
				t.Fatalf("%v: %v included: %v", edits, at(i), !want)
			}
			if in := slices.ContainsFunc(f.Prefixes(), func(p netip.Prefix) bool { return p.Contains(at(i)) }); in != want {
				t.Fatalf("%v: %v in a prefix: %v", edits, at(i), in)
			}
			if want {
				if err := rebuilt.IncludeRange(at(i), at(i)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !rebuilt.Equal(&f) || !f.Equal(f.Clone()) {
			t.Fatalf("%v: not equal to the same set", edits)
		}
	}
}
