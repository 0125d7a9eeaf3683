package kernelpath

import (
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// A UDP flow to a port that has a timer of its own gets it with its first
// packet, from a timeout object that is named after its seconds, so that it
// never changes. No object is ever deleted before the table is: packets that
// wait in a queue point to them (CVE-2026-23391, CVE-2026-43060).
//
// No other flow pays for that. What the policy's maps decide alone is told apart
// by the maps themselves: they lead to a chain that sets the timer. What comes
// from user space or by a permission looks its port up.
//
//	ct timeout udp_10 {
//		protocol udp
//		l3proto inet
//		policy = { unreplied : 10, replied : 10 }
//	}
//	set timed { type inet_service; elements = { 53 } }
//	map timers { type inet_service : verdict; elements = { 53 : jump timer_10 } }
//	chain timer_10 {
//		meta l4proto udp ct timeout set "udp_10"
//	}
//	chain carry_plain_10 {
//		jump timer_10
//		goto carry_plain
//	}
//	chain carry_first {
//		meta l4proto udp th dport vmap @timers
//		...
//	}
const (
	setTimed  = "timed"
	mapTimers = "timers"
)

func timerChain(seconds uint32) string { return fmt.Sprintf("timer_%d", seconds) }
func plainChain(seconds uint32) string { return fmt.Sprintf("%s_%d", chainCarryPlain, seconds) }

// timers adds the objects, sets and chains of the timers, after what leads to
// them.
func (b *builder) timers() error {
	if len(b.in.Timers) == 0 {
		return nil
	}
	types := []nftables.SetDatatype{nftables.TypeInetService}
	ranges := slices.ContainsFunc(b.in.Timers, func(t policy.Timer) bool { return t.Ports.Lo != t.Ports.Hi })
	timed := &set{name: setTimed, key: types, interval: ranges}
	timers := &set{name: mapTimers, key: types, data: []nftables.SetDatatype{nftables.TypeVerdict}, interval: ranges}
	seconds := map[uint32]bool{}
	last := -1
	for _, t := range b.in.Timers {
		if int(t.Ports.Lo) <= last || t.Ports.Lo > t.Ports.Hi || t.Seconds == 0 {
			return fmt.Errorf("timer of %d s for the ports %d-%d: not in its place", t.Seconds, t.Ports.Lo, t.Ports.Hi)
		}
		last = int(t.Ports.Hi)
		seconds[t.Seconds] = true
		e := portsElement(t.Ports, ranges)
		timed.elems = append(timed.elems, e)
		to := jump(timerChain(t.Seconds))
		e.text, e.verdict = e.text+" : "+to.text, verdictOf(to)
		timers.elems = append(timers.elems, e)
	}
	if len(b.Flowtable) > 0 {
		b.set(timed)
	}
	b.set(timers)
	for _, s := range slices.Sorted(maps.Keys(seconds)) {
		b.r.timers = append(b.r.timers, s)
		b.chain(timerChain(s)).add(is(fieldL4Proto, protoValue(flow.UDP)), setTimer(s))
		if b.plainTimers[s] {
			plain := b.chain(plainChain(s))
			plain.add(jump(timerChain(s)))
			plain.add(goTo(b.plain()))
		}
	}
	return nil
}

// portsElement is a range of ports in a plain set, which has ranges or none.
func portsElement(r policy.PortRange, ranges bool) element {
	e := element{text: fmt.Sprint(r.Lo), key: portValue(r.Lo).raw}
	if r.Lo != r.Hi {
		e.text = fmt.Sprintf("%d-%d", r.Lo, r.Hi)
	}
	if ranges && r.Hi < 65535 {
		e.end = portValue(r.Hi + 1).raw
	}
	return e
}

// setTimer gives a new flow the timer of an object.
func setTimer(seconds uint32) stmt {
	name := timerName(seconds)
	return stmt{fmt.Sprintf("ct timeout set %q", name), func(c *code) {
		c.add(&expr.Objref{Type: objectCtTimeout, Name: name})
	}}
}

func timerName(seconds uint32) string { return fmt.Sprintf("udp_%d", seconds) }

// lookTimersUp is the first rule of a chain that flows with and without a timer
// come to.
func (b *builder) lookTimersUp(c *chain) {
	if len(b.in.Timers) > 0 {
		c.add(is(fieldL4Proto, protoValue(flow.UDP)), vmap(mapTimers, fieldDport))
	}
}

// offloaded is where forward sends the packets of kernel flows. One that has a
// timer stays out of the flowtable, which knows one time for all.
//
//	chain unless_timed {
//		meta l4proto udp ct original proto-dst @timed accept
//		goto carry
//	}
func (b *builder) offloaded() stmt {
	switch {
	case len(b.Flowtable) == 0:
		return accept()
	case len(b.in.Timers) == 0:
		return goTo(chainCarry)
	}
	c := b.chain("unless_timed")
	c.add(is(fieldL4Proto, protoValue(flow.UDP)), in(setTimed, fieldAskedDport), accept())
	c.add(goTo(chainCarry))
	return goTo("unless_timed")
}

// judgedBox is a box, or a part of one whose flows have the same timer, and what
// becomes of them.
type judgedBox struct {
	policy.Box
	to stmt
}

// judge asks for the verdict on boxes, and takes those apart that lead to plain
// kernel flows with different timers.
func (b *builder) judge(k stageKind, boxes []policy.Box, verdict boxVerdict) ([]judgedBox, error) {
	list := make([]judgedBox, 0, len(boxes))
	for _, x := range boxes {
		to, err := verdict(x)
		if err != nil {
			return nil, err
		}
		if k.kind == policy.KindPorts && x.Protos[1] == flow.UDP && to.text == goTo(b.plain()).text {
			list = append(list, b.split(x)...)
			continue
		}
		list = append(list, judgedBox{x, to})
	}
	return list, nil
}

// split takes a box of plain kernel flows apart.
func (b *builder) split(x policy.Box) (list []judgedBox) {
	lo := int(x.Ports.Lo)
	part := func(from, to int, p [2]flow.Proto, chain string) {
		if from <= to {
			y := x
			y.Ports, y.Protos = policy.PortRange{Lo: uint16(from), Hi: uint16(to)}, p
			list = append(list, judgedBox{y, goTo(chain)})
		}
	}
	for _, t := range b.in.Timers {
		if t.Ports.Hi < x.Ports.Lo || t.Ports.Lo > x.Ports.Hi {
			continue
		}
		first, last := max(lo, int(t.Ports.Lo)), min(int(t.Ports.Hi), int(x.Ports.Hi))
		part(lo, first-1, x.Protos, b.plain())
		part(first, last, [2]flow.Proto{flow.UDP, flow.UDP}, plainChain(t.Seconds))
		b.plainTimers[t.Seconds] = true
		if x.Protos[0] != flow.UDP {
			part(first, last, [2]flow.Proto{x.Protos[0], flow.TCP}, b.plain())
		}
		lo = last + 1
	}
	part(lo, int(x.Ports.Hi), x.Protos, b.plain())
	return list
}
