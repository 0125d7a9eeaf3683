package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/sluicegw/sluice/flow"
)

// simulate looks a flow up as the kernel does, and says where a published one is
// sent. It reports a stage in which two boxes hold it.
func simulate(t testing.TB, c Compiled, q Question) (Class, netip.AddrPort) {
	if q.ToGateway && q.Is4() {
		b, hit := lookUp(t, c, c.Publish, q)
		if hit && (b.Publication != 0 || b.Class != ClassKernel) {
			return b.Class, c.leads(b, q)
		}
	}
	tables := c.Forward
	if q.ToGateway {
		tables = c.Input
	}
	b, _ := lookUp(t, c, tables, q)
	return b.Class, c.leads(b, q)
}

func (c *Compiled) leads(b Box, q Question) netip.AddrPort {
	if b.Publication == 0 {
		return netip.AddrPort{}
	}
	p, port := &c.Publications[b.Publication-1], q.Dst.Port()
	if p.ServerPort != 0 && q.Is4() {
		port = port - p.Ports.Lo + p.ServerPort
	}
	return netip.AddrPortFrom(p.Server(!q.Is4()), port)
}

// lookUp gives the box that holds a flow. The zero value drops.
func lookUp(t testing.TB, c Compiled, tables []Table, q Question) (box Box, hit bool) {
	zone := func(iface string) int {
		for _, z := range c.Zones[1:] {
			if slices.Contains(z.Interfaces, iface) {
				return z.ID
			}
		}
		return 0
	}
	out := zone(q.OutIface)
	if q.ToGateway {
		out = 0
	}
	i := slices.IndexFunc(tables, func(x Table) bool { return x.In == zone(q.InIface) && x.Out == out })
	if i < 0 {
		return Box{}, false
	}
	kind := KindOther
	switch {
	case q.Proto == flow.TCP || q.Proto == flow.UDP:
		kind = KindPorts
	case q.Proto == flow.ICMP && q.Is4(), q.Proto == flow.ICMPv6 && !q.Is4():
		kind = KindICMP
	}
	for _, s := range tables[i].Stages {
		if s.Is6 == q.Is4() || s.Kind != kind {
			continue
		}
		hits := 0
		for _, b := range s.Boxes {
			if b.Src.Contains(q.Src.Addr()) && b.Dst.Contains(q.Dst.Addr()) && b.Protos[0] <= q.Proto && q.Proto <= b.Protos[1] &&
				(kind == KindOther && b.Ports == PortRange{0, 65535} || kind != KindOther && b.Ports.Lo <= q.Dst.Port() && q.Dst.Port() <= b.Ports.Hi) {
				hits, box = hits+1, b
			}
		}
		if hits > 1 {
			t.Fatalf("%d boxes of one stage hold %v", hits, q)
		}
		if hits == 1 {
			return box, true
		}
	}
	return Box{}, false
}

// draw makes a small policy from a seed, without the mistakes that New finds.
func draw(r *rand.Rand) *model {
	pick := func(n int) int { return r.IntN(n) }
	m := &model{}
	ifaces := []string{"a", "b", "c", "d"}
	prefixes := []string{"0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32", "10.2.0.0/16", "192.0.2.0/24", "::/0", "fd00::/8", "fd00:1::/32", "fd00:1::1/128"}
	names := []string{Any}
	for i := range 1 + pick(5) {
		n := Network{Name: fmt.Sprint("n", i)}
		for _, name := range ifaces {
			if pick(4) == 0 {
				n.Interfaces = append(n.Interfaces, name)
			}
		}
		for _, p := range prefixes {
			if pick(4) == 0 {
				n.Prefixes = append(n.Prefixes, netip.MustParsePrefix(p))
			}
		}
		if n.Interfaces == nil && n.Prefixes == nil {
			n.Interfaces = []string{"a"}
		}
		m.networks, names = append(m.networks, n), append(names, n.Name)
	}
	some := func(from []string) []string {
		out := []string{from[pick(len(from))]}
		for _, n := range from {
			if pick(6) == 0 && !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
		return out
	}
	for i := range 1 + pick(4) {
		j := NetworkRule{Name: fmt.Sprint("j", i), From: names[pick(len(names))], To: names[pick(len(names))], Relation: Relation(1 + pick(2))}
		if j.Relation == NAT && j.From != Any {
			j.Mapping = Mapping(min(1, pick(4)))
		}
		m.netRules = append(m.netRules, j)
	}
	protos := []string{AnyProtocol}
	for i := range 1 + pick(6) {
		d := Protocol{Name: fmt.Sprint("p", i)}
		for range 1 + pick(3) {
			p := []flow.Proto{flow.TCP, flow.UDP, flow.TCP, flow.UDP, flow.ICMP, flow.ICMPv6, 47, 48}[pick(8)]
			lo := uint16(pick(20))
			rng := PortRange{lo, lo + uint16(pick(6))}
			if !p.HasPorts() && p != flow.ICMP && p != flow.ICMPv6 {
				rng = PortRange{0, 65535}
			}
			d.Matches = append(d.Matches, Match{p, rng})
			if p.HasPorts() && pick(3) == 0 {
				d.Filter = fmt.Sprint("f", pick(2))
			}
		}
		m.protocols, protos = append(m.protocols, d), append(protos, d.Name)
	}
	for i := range pick(9) {
		x := Rule{Name: fmt.Sprint("r", i), From: some(names), To: some(append(names, Gateway)), Protocols: some(protos), Action: Action(pick(2))}
		if x.Action == Deny {
			x.Refusal = Refusal(pick(3))
		} else if !slices.Contains(x.To, Gateway) {
			x.NoKernelMode, x.FailOpen = pick(4) == 0, pick(3) > 0
			for _, d := range m.protocols {
				if d.Filter != "" && slices.Contains(x.Protocols, d.Name) && !slices.ContainsFunc(x.Filters, func(u FilterUse) bool { return u.Name == d.Filter }) {
					x.Filters = append(x.Filters, FilterUse{Name: d.Filter})
				}
			}
		}
		if pick(2) == 0 {
			m.publish(r, &x)
		} else if pick(4) == 0 {
			x.Users = some([]string{AnyUser, "alice", "bob"})
		}
		m.rules = append(m.rules, x)
	}
	return m
}

// publish makes a rule one that publishes, if its protocols can be.
func (m *model) publish(r *rand.Rand, x *Rule) {
	pub := &Publication{FromGateway: r.IntN(3) == 0}
	var matches []Match
	var protos []string
	for _, d := range m.protocols {
		unfit := slices.ContainsFunc(d.Matches, func(y Match) bool {
			return y.Proto == flow.ICMP || y.Proto == flow.ICMPv6 || pub.FromGateway && !y.Proto.HasPorts()
		})
		if slices.Contains(x.Protocols, d.Name) && !unfit {
			matches, protos = append(matches, d.Matches...), append(protos, d.Name)
		}
	}
	if len(protos) == 0 || len(protos) < len(x.Protocols) && x.Filters != nil {
		return
	}
	x.Protocols = protos
	if r.IntN(3) > 0 {
		pub.Servers = append(pub.Servers, netip.MustParseAddr([]string{"10.1.1.2", "10.2.0.1"}[r.IntN(2)]))
		for _, a := range []string{"10.1.1.1", "192.0.2.7"} {
			if r.IntN(3) == 0 {
				pub.Addresses = append(pub.Addresses, netip.MustParseAddr(a))
			}
		}
	}
	if pub.Servers == nil || r.IntN(2) == 0 {
		pub.Servers = append(pub.Servers, netip.MustParseAddr([]string{"fd00:1::1", "fd00:2::1"}[r.IntN(2)]))
	} else if _, one := oneRange(spansOf(matches)); one && r.IntN(2) == 0 {
		pub.ServerPort = uint16(1 + r.IntN(40))
	}
	x.Action, x.Publication, x.To, x.Refusal = Publish, pub, nil, RefuseAuto
}

func drawQuestion(r *rand.Rand) Question {
	v4 := []string{"10.1.1.1", "10.1.1.2", "10.1.2.1", "10.2.0.1", "10.9.0.1", "192.0.2.7", "8.8.8.8"}
	v6 := []string{"fd00:1::1", "fd00:1::2", "fd00:2::1", "2001:db8::1"}
	from := v4
	if r.IntN(3) == 0 {
		from = v6
	}
	ifaces := []string{"a", "b", "c", "d", "other", ""}
	addr := func() netip.Addr { return netip.MustParseAddr(from[r.IntN(len(from))]) }
	p := []flow.Proto{flow.TCP, flow.TCP, flow.UDP, flow.ICMP, flow.ICMPv6, 47, 48, 132}[r.IntN(8)]
	return Question{
		Tuple:   flow.Tuple{Proto: p, Src: netip.AddrPortFrom(addr(), 40000), Dst: netip.AddrPortFrom(addr(), uint16(r.IntN(28)))},
		InIface: ifaces[r.IntN(6)], OutIface: ifaces[r.IntN(6)], ToGateway: r.IntN(5) == 0,
	}
}

// Judge, the plain model and the compiled policy say the same.
func TestRandomPolicies(t *testing.T) {
	classes, published := map[Class]int{}, 0
	for seed := range uint64(4000) {
		r := rand.New(rand.NewPCG(seed, 1))
		m := draw(r)
		p, err := New(m.networks, m.netRules, m.protocols, m.rules)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		c, err := p.Compile()
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		checkStages(t, c)
		for range 150 {
			q := drawQuestion(r)
			want, got := m.judge(q), p.Judge(q)
			leads := m.server(want, q)
			if plain(got) != want || got.Server != leads {
				t.Fatalf("seed %d: %+v:\n got %+v\nwant %+v\n%+v", seed, q, plain(got), want, m)
			}
			if q.User = []string{"", "alice", "bob", "carol"}[r.IntN(4)]; q.User != "" {
				if want, got := m.judge(q), p.Judge(q); plain(got) != want || got.Server != m.server(want, q) {
					t.Fatalf("seed %d: %+v:\n got %+v\nwant %+v\n%+v", seed, q, plain(got), want, m)
				}
				q.User = ""
			}
			class, server := simulate(t, c, q)
			if class == ClassMap || class == ClassMapOpen {
				if b, _ := lookUp(t, c, c.Forward, q); m.netRules[b.NetworkRule].Name != want.network {
					t.Fatalf("seed %d: %+v: the mapping is of %s, want %+v\n%+v\n%+v", seed, q, m.netRules[b.NetworkRule].Name, want, m, c)
				}
			}
			if class != want.class || server != leads {
				t.Fatalf("seed %d: %+v: compiled to %d %v, want %+v\n%+v\n%+v", seed, q, class, server, want, m, c)
			}
			classes[want.class]++
			if leads.IsValid() {
				published++
				checkDeciding(t, c, q, leads)
			}
		}
	}
	if published < 500 {
		t.Errorf("%d published flows were met only", published)
	}
	for class := ClassDrop; class <= ClassMapOpen; class++ {
		if classes[class] < 500 {
			t.Errorf("class %d was met %d times only", class, classes[class])
		}
	}
}

// checkDeciding proves that what is left of the tables still tells where a
// published flow is sent.
func checkDeciding(t *testing.T, c Compiled, q Question, server netip.AddrPort) {
	t.Helper()
	tables := c.Forward
	if q.Is4() {
		tables = c.Publish
	}
	var left []Table
	for _, x := range tables {
		left = append(left, x.Deciding(func(b *Box) bool { return b.Publication != 0 }))
	}
	if b, hit := lookUp(t, c, left, q); !hit || c.leads(b, q) != server {
		t.Fatalf("%+v leads to %v of what is left, want %v", q, c.leads(b, q), server)
	}
}

// checkStages proves that no two boxes of a stage overlap, and that a box has
// a reason to stand where it stands: one of the stage before overlaps with it.
func checkStages(t *testing.T, c Compiled) {
	t.Helper()
	for _, tables := range [][]Table{c.Forward, c.Input, c.Publish} {
		for _, table := range tables {
			for k, s := range table.Stages {
				later := k > 0 && table.Stages[k-1].Is6 == s.Is6 && table.Stages[k-1].Kind == s.Kind
				for i := range s.Boxes {
					b := &s.Boxes[i]
					if b.Src.Addr().Is4() == s.Is6 || b.Dst.Addr().Is4() == s.Is6 || kindOf(b.Protos[0], family(b.Src.Addr())) != s.Kind {
						t.Fatalf("%+v in a stage of another family or kind", b)
					}
					for j := range i {
						if overlap(b, &s.Boxes[j]) {
							t.Fatalf("%+v and %+v overlap in one stage", *b, s.Boxes[j])
						}
					}
					for _, before := range table.Stages[:k] {
						if slices.ContainsFunc(before.Boxes, func(x Box) bool { return contains(&x, b) }) {
							t.Fatalf("%+v can never be hit", *b)
						}
					}
					if later && !slices.ContainsFunc(table.Stages[k-1].Boxes, func(x Box) bool { return overlap(b, &x) }) {
						t.Fatalf("%+v could stand a stage earlier", *b)
					}
				}
			}
		}
	}
}
