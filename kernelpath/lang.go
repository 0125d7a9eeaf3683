package kernelpath

import (
	"fmt"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// A Ruleset is the whole table as a value: what Build makes of a policy, what
// String prints in nft's own language and what Table.Load puts into the
// kernel. Text and kernel form come from the same statements. It is never
// changed after Build and may be shared.
type Ruleset struct {
	counters  []string
	timers    []uint32 // seconds
	flowtable []string // devices; none: no flowtable
	xtQueue   bool     // its queues have the xt form
	sets      []*set
	chains    []*chain
}

// tableName is the table that belongs to the gateway alone, in family inet.
const tableName = "sluice"

// flowtableName is the one flowtable, if there is any.
const flowtableName = "fast"

// set is an nft set, or a map if it has data.
type set struct {
	name    string // empty: anonymous, part of one rule
	comment string
	key     []nftables.SetDatatype
	data    []nftables.SetDatatype // TypeVerdict alone: a verdict map
	// interval elements are ranges.
	interval bool
	// timeout lets elements expire, dynamic lets rules change them.
	timeout, dynamic bool
	size             uint32
	// lasting sets outlive a reload with what they hold.
	lasting bool
	elems   []element
}

// element of a set. Its text is nft's.
type element struct {
	text string
	key  []byte
	// end is the last key of a range in a concatenated set, and the first key
	// after it in a plain interval set; empty: a single key, or no upper end.
	end     []byte
	val     []byte
	verdict *expr.Verdict
	timeout time.Duration // 0: it stays
}

// label names the element in an error.
func (e element) label() string {
	if e.text == "" {
		return fmt.Sprintf("%x", append(e.key[:len(e.key):len(e.key)], e.end...))
	}
	return e.text
}

// hook is where a base chain stands.
type hook struct {
	typ      nftables.ChainType
	name     string // as nft calls the hook
	num      nftables.ChainHook
	priority int32
	policy   nftables.ChainPolicy
}

// chain is a base chain if it has a hook.
type chain struct {
	name  string
	hook  *hook
	rules []rule
	// onDemand: it is not in the kernel before Table.TakeOver.
	onDemand bool
}

// rule is a row of statements, read from left to right until one of them does
// not match.
type rule []stmt

// stmt is one statement of nft's language: its text and what the kernel
// executes for it.
type stmt struct {
	text string
	gen  func(*code)
}

// code collects what the kernel executes for one rule.
type code struct {
	exprs []expr.Any
	// anonymous sets of the rule; a lookup names them by a number that is
	// unique in one transaction.
	sets   []*set
	ids    []uint32
	nextID *uint32
}

func (c *code) add(e ...expr.Any) { c.exprs = append(c.exprs, e...) }

// anonymous makes a set part of the rule and gives the name and the number by
// which a lookup of the same rule refers to it.
func (c *code) anonymous(s *set) (string, uint32) {
	*c.nextID++
	c.sets = append(c.sets, s)
	c.ids = append(c.ids, *c.nextID)
	return anonymousName(s), *c.nextID
}

// anonymousName is the pattern of which the kernel makes a name.
func anonymousName(s *set) string {
	if len(s.data) > 0 {
		return "__map%d"
	}
	return "__set%d"
}

func (r rule) compile(nextID *uint32) *code {
	c := &code{nextID: nextID}
	for _, s := range r {
		s.gen(c)
	}
	return c
}

func (r rule) String() string {
	words := make([]string, len(r))
	for i, s := range r {
		words[i] = s.text
	}
	return strings.Join(words, " ")
}

func (c *chain) add(statements ...stmt) { c.rules = append(c.rules, statements) }

func (s *set) isVerdictMap() bool {
	return len(s.data) == 1 && s.data[0].Name == nftables.TypeVerdict.Name
}

// String gives the table in nft's own language. `nft -f` loads it, with one
// exception: the xt form of a queue is a comment in it, because nft's language
// has no word for it.
func (r Ruleset) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", tableName)
	for _, c := range r.counters {
		fmt.Fprintf(&b, "\tcounter %s {\n\t}\n\n", c)
	}
	for _, s := range r.timers {
		fmt.Fprintf(&b, "\tct timeout %s {\n\t\tprotocol udp\n\t\tl3proto inet\n\t\tpolicy = { unreplied : %d, replied : %d }\n\t}\n\n", timerName(s), s, s)
	}
	if len(r.flowtable) > 0 {
		devices := make([]string, len(r.flowtable))
		for i, d := range r.flowtable {
			devices[i] = quote(d)
		}
		fmt.Fprintf(&b, "\tflowtable %s {\n\t\thook ingress priority 0\n\t\tdevices = { %s }\n\t\tcounter\n\t}\n\n", flowtableName, strings.Join(devices, ", "))
	}
	for _, s := range r.sets {
		s.write(&b)
	}
	for i, c := range r.chains {
		if i > 0 {
			b.WriteByte('\n')
		}
		c.write(&b)
	}
	b.WriteString("}\n")
	return b.String()
}

func (s *set) write(b *strings.Builder) {
	word := "set"
	if len(s.data) > 0 {
		word = "map"
	}
	fmt.Fprintf(b, "\t%s %s {\n\t\ttype %s", word, s.name, typeNames(s.key))
	if len(s.data) > 0 {
		fmt.Fprintf(b, " : %s", typeNames(s.data))
	}
	b.WriteByte('\n')
	if s.size > 0 {
		fmt.Fprintf(b, "\t\tsize %d\n", s.size)
	}
	if f := s.flagNames(); f != "" {
		fmt.Fprintf(b, "\t\tflags %s\n", f)
	}
	if s.comment != "" {
		fmt.Fprintf(b, "\t\tcomment %s\n", quote(s.comment))
	}
	if len(s.elems) > 0 {
		b.WriteString("\t\telements = {\n")
		for _, e := range s.elems {
			fmt.Fprintf(b, "\t\t\t%s,\n", e.text)
		}
		b.WriteString("\t\t}\n")
	}
	b.WriteString("\t}\n\n")
}

func (s *set) flagNames() string {
	var names []string
	for _, f := range []struct {
		on   bool
		name string
	}{{s.dynamic, "dynamic"}, {s.interval, "interval"}, {s.timeout, "timeout"}} {
		if f.on {
			names = append(names, f.name)
		}
	}
	return strings.Join(names, ",")
}

func (c *chain) write(b *strings.Builder) {
	fmt.Fprintf(b, "\tchain %s {\n", c.name)
	if h := c.hook; h != nil {
		policy := "accept"
		if h.policy == nftables.ChainPolicyDrop {
			policy = "drop"
		}
		fmt.Fprintf(b, "\t\ttype %s hook %s priority %d\n\t\tpolicy %s\n", h.typ, h.name, h.priority, policy)
	}
	for _, r := range c.rules {
		fmt.Fprintf(b, "\t\t%s\n", r)
	}
	b.WriteString("\t}\n")
}

func typeNames(types []nftables.SetDatatype) string {
	names := make([]string, len(types))
	for i, t := range types {
		names[i] = t.Name
		if t.Name == nftables.TypeICMP6Type.Name {
			names[i] = "icmpv6_type"
		}
	}
	return strings.Join(names, " . ")
}

// quote writes a string of nft's language. Names that hold a quotation mark
// or a control character never get here; see Build.
func quote(s string) string { return `"` + s + `"` }
