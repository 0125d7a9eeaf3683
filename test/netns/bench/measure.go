package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// benchCase is one row of the table.
type benchCase struct {
	name     string
	unit     string
	scale    float64 // units of the row to one of the load
	expect   float64 // least median ratio; 0: for information
	most     float64 // instead: greatest ratio of the load's time, or without a scale of the daemons'; -1: for information
	baseline string
	of, than *lane // the gateway, the baseline
	load     func(*lane) (amount, error)
}

// The scales of the rows: bytes to Gbit, one to a thousand.
const (
	bits = 8e-9
	each = 1e-3
)

// cases in the order of the table.
func (s *stand) cases(length time.Duration) []benchCase {
	length /= turns
	rate := func(p path) func(*lane) (amount, error) {
		return func(l *lane) (amount, error) { return throughput(l, p, length) }
	}
	tcp := func(p path, k kind) func(*lane) (amount, error) {
		return func(l *lane) (amount, error) { return connect(l, p, k, length) }
	}
	udp := func(p path) func(*lane) (amount, error) {
		return func(l *lane) (amount, error) { return datagrams(l, p, burstFlows, smallPacket, length, newFlows) }
	}
	packets := func(p path, size int) func(*lane) (amount, error) {
		return func(l *lane) (amount, error) { return datagrams(l, p, math.MaxInt32, size, length, oneFlow) }
	}
	passed := func(l *lane) (amount, error) {
		return datagrams(l, carried, math.MaxInt32, smallPacket, length, oneKnownFlow)
	}
	endpoint := func(l *lane) (amount, error) {
		return datagrams(l, decided, burstFlows, smallPacket, length, oneEndpoint)
	}
	endpoints := func(l *lane) (amount, error) {
		return datagrams(l, decided, burstEndpoints, smallPacket, length, newEndpoints)
	}
	waiting := func(percent int) func(*lane) (amount, error) {
		return func(l *lane) (amount, error) { return latency(l, judged, percent, length) }
	}
	const bare, proxy, c, callback = "nft masquerade", "HAProxy", "C, libnetfilter_queue", "go-nfqueue's callbacks"
	flows, conns, first := udp(judged), tcp(judged, silent), "(c) first packet queued: "
	list := []benchCase{
		{"(a) kernel flow: TCP", "Gbit/s", bits, 0.98, 0, bare, s.sluice, s.bare, rate(decided)},
		{"(a) kernel flow: packets of 64 bytes", "1000/s", each, 0.98, 0, bare, s.sluice, s.bare, packets(decided, smallPacket)},
		{"(a) kernel flow: packets of 1400 bytes", "1000/s", each, 0.98, 0, bare, s.sluice, s.bare, packets(decided, largePacket)},
		{"(b) decided by the kernel: TCP connections", "1000/s", each, 0.95, 0, bare, s.sluice, s.bare, tcp(decided, silent)},
		{"(b) decided by the kernel: UDP flows", "1000/s", each, 0.95, 0, bare, s.sluice, s.bare, udp(decided)},
		{"(b) the same among 10,000 rules: TCP connections", "1000/s", each, 0.95, 0, bare, s.many, s.bare, tcp(decided, silent)},
		{"(b) the same among 10,000 rules: UDP flows", "1000/s", each, 0.95, 0, bare, s.many, s.bare, udp(decided)},
		{first + "UDP flows", "1000/s", each, 0.5, 0, bare, s.sluice, s.bare, flows},
		{first + "UDP flows", "1000/s", each, 1, 0, c, s.sluice, s.c, flows},
		{first + "UDP flows", "1000/s", each, 0, 0, "C, verdicts in batches", s.sluice, s.batches, flows},
		{first + "UDP flows", "1000/s", each, 2, 0, callback, s.sluice, s.callback, flows},
		{first + "TCP connections", "1000/s", each, 0, 0, bare, s.sluice, s.bare, conns},
		{first + "TCP connections", "1000/s", each, 0, 0, c, s.sluice, s.c, conns},
		{first + "daemon's time for a UDP flow", "µs", 0, 0, 1.2, c, s.sluice, s.c, flows},
		{first + "daemon's time for a TCP connection", "µs", 0, 0, 1.2, c, s.sluice, s.c, conns},
		{"(c) a filter hears of the first packet: UDP flows", "1000/s", each, 0, 0, bare, s.sluice, s.bare, udp(heard)},
		{"(c) a filter hears of the first packet: TCP connections", "1000/s", each, 0, 0, bare, s.sluice, s.bare, tcp(heard, silent)},
		{"(c) time until a connection stands: p50", "µs", each, 0, 1.2, c, s.sluice, s.c, waiting(50)},
		{"(c) time until a connection stands: p99", "µs", each, 0, 1.2, c, s.sluice, s.c, waiting(99)},
		{"(c) every packet queued: TCP", "Gbit/s", bits, 0.8, 0, "not queued", s.loop, s.bare, rate(judged)},
		{"(c) every packet queued: packets of 64 bytes", "1000/s", each, 0, 0, "not queued", s.loop, s.bare, packets(judged, smallPacket)},
		{"(c) every packet queued: TCP", "Gbit/s", bits, 0, 0, c, s.loop, s.everyC, rate(judged)},
		{"(c) every packet queued: packets of 64 bytes", "1000/s", each, 0, 0, c, s.loop, s.everyC, packets(judged, smallPacket)},
		{"(d) user path: throughput", "Gbit/s", bits, 1, 0, proxy, s.sluice, s.proxy, rate(carried)},
		{"(d) user path: throughput, with one data filter", "Gbit/s", bits, 0.8, 0, proxy, s.sluice, s.proxy, rate(filtered)},
		{"(d) user path: TCP connections", "1000/s", each, 1, 0, proxy, s.sluice, s.proxy, tcp(carried, greet)},
		{"(d) user path: UDP packets of one flow", "1000/s", each, 0.8, 0, "recvmmsg and sendmmsg", s.sluice, s.relay, passed},
		{"(e) endpoint-independent mapping: new UDP flows, same endpoint", "1000/s", each, 0, 0, bare, s.mapped, s.bare, endpoint},
		{"(e) endpoint-independent mapping: new UDP flows, new endpoints", "1000/s", each, 0, 0, bare, s.mapped, s.bare, endpoints},
	}
	list = slices.Insert(list, 3, s.flowtableCases(length)...)
	list = append(list, s.ftpCases(length)...)
	if s.sluice != nil {
		return list
	}
	// A self-check has nothing that is queued, mapped or read.
	list = slices.DeleteFunc(list, func(c benchCase) bool { return strings.Contains("(c) (e) (f)", c.name[:3]) })
	for i := range list {
		list[i].expect = selfCheckLeast
		list[i].of = s.otherBare
		if list[i].baseline == proxy {
			list[i].of = s.otherProxy
		}
	}
	return list
}

// sample is one measurement of one lane.
type sample struct {
	Rate float64 `json:"rate"`
	// Time is the load's for each unit, in microseconds.
	Time float64 `json:"us"`
	// CPU is the daemon's processor time in microseconds for each connection,
	// flow, packet, or megabyte, while they went on, and what the kernel did for
	// a packet that it released in it.
	CPU float64 `json:"daemon_cpu_us"`
	// Rest is the time from then on until the daemon had come to rest: the end
	// of the flows, and their log.
	Rest float64 `json:"daemon_rest_us"`
}

// result is a case's rounds.
type result struct {
	Of     []sample  `json:"sluice"`
	Than   []sample  `json:"baseline"`
	Ratios []float64 `json:"ratios"`
}

// turns is how many times each lane is measured in a round. Short turns stand
// close to those of the other lane: what else the machine does hits both.
const turns = 4

// measure runs the rounds of a case. The lanes change by turns, and who begins
// changes with each: A B B A, next round B A A B.
func measure(ctx context.Context, c benchCase, o options) (result, error) {
	var r result
	for _, l := range []*lane{c.of, c.than} {
		if err := l.up(); err != nil {
			return r, err
		}
	}
	for round := range o.rounds {
		var of, than total
		for turn := range turns {
			first, second := &of, &than
			if (round+turn)%2 == 1 {
				first, second = second, first
			}
			for _, t := range []*total{first, second} {
				l := c.than
				if t == &of {
					l = c.of
				}
				if err := ctx.Err(); err != nil {
					return r, fmt.Errorf("interrupted: %w", err)
				}
				if err := t.take(c, l); err != nil {
					return r, fmt.Errorf("round %d, %s: %w", round+1, l.name, err)
				}
			}
		}
		r.Of = append(r.Of, of.sample(c))
		r.Than = append(r.Than, than.sample(c))
		r.Ratios = append(r.Ratios, c.ratio(of.sample(c), than.sample(c)))
	}
	return r, nil
}

// ratio of what the case compares.
func (c benchCase) ratio(of, than sample) float64 { return c.figure(of) / c.figure(than) }

// figure is what the case compares: the rate, the load's time, or the daemon's.
func (c benchCase) figure(s sample) float64 {
	switch {
	case c.most != 0 && c.scale > 0:
		return s.Time
	case c.most != 0:
		return s.CPU
	}
	return s.Rate
}

// total is what the turns of a lane in one round add up to.
type total struct {
	amount
	cpu, rest time.Duration
}

func (t *total) sample(c benchCase) sample {
	units := t.units
	if c.scale == bits {
		units /= 1e6
	}
	return sample{Rate: t.rate() * c.scale, Time: 1e6 / t.rate(), CPU: float64(t.cpu.Microseconds()) / units, Rest: float64(t.rest.Microseconds()) / units}
}

// take measures one turn.
func (t *total) take(c benchCase, l *lane) error {
	before, err := l.cpu()
	if err != nil {
		return err
	}
	a, err := c.load(l)
	if err != nil {
		if l.daemon != nil {
			err = fmt.Errorf("%w; the daemon's last words: %s", err, tail(l.daemon.log))
		}
		return err
	}
	after, err := l.cpu()
	if err != nil {
		return err
	}
	if err := l.forget(); err != nil {
		return err
	}
	rested, err := l.cpu()
	t.units += a.units
	t.time += a.time
	t.cpu += after - before
	t.rest += rested - after
	return err
}

// median of a list that is not empty; the list is left as it is.
func median(list []float64) float64 {
	s := slices.Sorted(slices.Values(list))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// figures are what the case compares.
func (c benchCase) figures(list []sample) []float64 {
	out := make([]float64, len(list))
	for i, s := range list {
		out[i] = c.figure(s)
	}
	return out
}
