package config

import (
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluicegw/sluice/nat"
)

// section reads a mapping whose keys are known. An absent value leaves the
// defaults alone.
func (r *reader) section(n ast.Node, what string, keys map[string]func(ast.Node)) {
	for _, v := range r.mapping(n, what) {
		key := keyOf(v)
		if read := keys[key]; read != nil {
			read(v.Value)
			continue
		}
		known := slices.Sorted(maps.Keys(keys))
		r.fail(v.Key, "%s: unknown key %q; the keys are %s", what, key, strings.Join(known, ", "))
	}
}

// mapping reads a mapping with keys of the administrator's choice.
func (r *reader) mapping(n ast.Node, what string) []*ast.MappingValueNode {
	list := pairs(n)
	if _, empty := n.(*ast.NullNode); list == nil && !empty && n != nil && n.Type() != ast.MappingType {
		r.fail(n, "%s: want a mapping, got %s", what, kindOf(n))
		r.maimed = true
	}
	return list
}

// sequence reads a list.
func (r *reader) sequence(n ast.Node, what string) []ast.Node {
	switch n := n.(type) {
	case *ast.SequenceNode:
		return n.Values
	case *ast.NullNode:
		return nil
	}
	r.fail(n, "%s: want a list, got %s", what, kindOf(n))
	r.maimed = true
	return nil
}

// oneOrMore reads a single value or a list of them.
func oneOrMore(n ast.Node) []ast.Node {
	switch n := n.(type) {
	case *ast.SequenceNode:
		return n.Values
	case *ast.NullNode:
		return nil
	}
	return []ast.Node{n}
}

func (r *reader) text(n ast.Node, what string) (string, bool) {
	s, ok := n.(*ast.StringNode)
	if !ok {
		r.fail(n, "%s: want text, got %s", what, kindOf(n))
		return "", false
	}
	return s.Value, true
}

// name reads what things are called by: in rules, on the command line, in the
// log.
func (r *reader) name(n ast.Node, what string) (string, bool) {
	s, ok := r.text(n, what)
	return s, ok && r.nameText(n, s, what)
}

const maxName = 64

func (r *reader) nameText(n ast.Node, s, what string) bool {
	odd := func(c rune) bool { return !unicode.IsPrint(c) || c == '"' || c == '\\' }
	if s == "" || len(s) > maxName || strings.TrimSpace(s) != s || strings.ContainsFunc(s, odd) {
		r.fail(n, "%s: %q is no name: want 1 to %d printable characters, no quotes, no blanks around", what, s, maxName)
		return false
	}
	return true
}

func (r *reader) names(n ast.Node, what string) (list []string, ok bool) {
	ok = true
	for _, item := range oneOrMore(n) {
		s, good := r.text(item, what)
		ok = ok && good
		list = append(list, s)
	}
	return list, ok
}

func (r *reader) boolean(n ast.Node, what string) (value, ok bool) {
	b, ok := n.(*ast.BoolNode)
	if !ok {
		r.fail(n, "%s: want true or false, got %s", what, kindOf(n))
		return false, false
	}
	return b.Value, true
}

// choice reads one of a few words.
func (r *reader) choice(n ast.Node, what string, words ...string) (string, bool) {
	if s, ok := n.(*ast.StringNode); ok {
		if slices.Contains(words, s.Value) {
			return s.Value, true
		}
		r.fail(n, "%s: %q is none of %s", what, s.Value, strings.Join(words, ", "))
		return "", false
	}
	r.fail(n, "%s: want one of %s, got %s", what, strings.Join(words, ", "), kindOf(n))
	return "", false
}

// number reads an integer: decimal, or 0x and hexadecimal.
func (r *reader) number(n ast.Node, what string, lo, hi uint64) (uint64, bool) {
	if i, ok := n.(*ast.IntegerNode); ok {
		text := i.Token.Value
		base := 10
		if hex, is := strings.CutPrefix(text, "0x"); is {
			text, base = hex, 16
		}
		// A leading zero means octal to some and nothing to others.
		octal := base == 10 && len(text) > 1 && text[0] == '0'
		if v, err := strconv.ParseUint(text, base, 64); err == nil && !octal && v >= lo && v <= hi {
			return v, true
		}
		r.fail(n, "%s: %s is not a number from %d to %d", what, i.Token.Value, lo, hi)
		return 0, false
	}
	r.fail(n, "%s: want a number from %d to %d, got %s", what, lo, hi, kindOf(n))
	return 0, false
}

// span reads one number or a range of them, "3000-3010".
func (r *reader) span(n ast.Node, what string, lo, hi uint64) (nat.Range, bool) {
	s, ok := n.(*ast.StringNode)
	if !ok {
		v, ok := r.number(n, what, lo, hi)
		return nat.Range{Lo: uint16(v), Hi: uint16(v)}, ok
	}
	first, last, isRange := strings.Cut(s.Value, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(strings.TrimSpace(first), 10, 16)
	b, errB := strconv.ParseUint(strings.TrimSpace(last), 10, 16)
	if errA != nil || errB != nil || a < lo || b > hi || a > b {
		r.fail(n, "%s: %q is no number or range from %d to %d", what, s.Value, lo, hi)
		return nat.Range{}, false
	}
	return nat.Range{Lo: uint16(a), Hi: uint16(b)}, true
}

// prefix reads a network's addresses; an address alone is that one host.
func (r *reader) prefix(n ast.Node, what string) (netip.Prefix, bool) {
	if pairs(n) != nil {
		r.fail(n, "%s: want a prefix, got a mapping; in brackets IPv6 needs quotes", what)
		return netip.Prefix{}, false
	}
	s, ok := r.text(n, what)
	if !ok {
		return netip.Prefix{}, false
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		return p, true
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	r.fail(n, "%s: %q is neither a prefix nor an address", what, s)
	return netip.Prefix{}, false
}

func (r *reader) address(n ast.Node, what string) (netip.Addr, bool) {
	s, ok := r.text(n, what)
	if !ok {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		r.fail(n, "%s: %q is no address", what, s)
		return netip.Addr{}, false
	}
	return a, true
}

// maxInterface is the kernel's IFNAMSIZ without the final zero.
const maxInterface = 15

func (r *reader) interfaceName(n ast.Node, what string) (string, bool) {
	s, ok := r.text(n, what)
	if !ok {
		return "", false
	}
	odd := func(c rune) bool { return c <= ' ' || c > '~' || strings.ContainsRune(`/:"*\`, c) }
	if s == "" || s == "." || s == ".." || len(s) > maxInterface || strings.ContainsFunc(s, odd) {
		r.fail(n, "%s: %q is no interface name", what, s)
		return "", false
	}
	return s, true
}

// maxSocket is the size of sun_path in unix(7) without the final zero.
const maxSocket = 107

func (r *reader) socketPath(n ast.Node, what string) (string, bool) {
	s, ok := r.text(n, what)
	if !ok {
		return "", false
	}
	if !filepath.IsAbs(s) || filepath.Clean(s) != s || s == "/" || len(s) > maxSocket || strings.ContainsRune(s, 0) {
		r.fail(n, "%s: %q is no clean absolute path of at most %d bytes", what, s, maxSocket)
		return "", false
	}
	return s, true
}
