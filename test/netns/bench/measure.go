package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"
)

// benchCase is one row of the table.
type benchCase struct {
	name     string
	unit     string
	scale    float64 // units of the row to one of the load
	expect   float64 // least median ratio; 0: for information
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
		return func(l *lane) (amount, error) { return datagrams(l, p, burstFlows, length, newFlows) }
	}
	packets := func(l *lane) (amount, error) { return datagrams(l, decided, math.MaxInt32, length, oneFlow) }
	passed := func(l *lane) (amount, error) { return datagrams(l, carried, math.MaxInt32, length, oneKnownFlow) }
	endpoint := func(l *lane) (amount, error) { return datagrams(l, decided, burstFlows, length, oneEndpoint) }
	endpoints := func(l *lane) (amount, error) { return datagrams(l, decided, burstEndpoints, length, newEndpoints) }
	const bare, proxy = "nft masquerade", "HAProxy"
	list := []benchCase{
		{"(a) kernel flow: throughput", "Gbit/s", bits, 0.95, bare, s.sluice, s.bare, rate(decided)},
		{"(a) kernel flow: small packets", "1000/s", each, 0, bare, s.sluice, s.bare, packets},
		{"(b) decided by the kernel: TCP connections", "1000/s", each, 0.95, bare, s.sluice, s.bare, tcp(decided, silent)},
		{"(b) decided by the kernel: UDP flows", "1000/s", each, 0.95, bare, s.sluice, s.bare, udp(decided)},
		{"(c) queued: TCP connections", "1000/s", each, 0, bare, s.sluice, s.bare, tcp(judged, silent)},
		{"(c) queued: UDP flows", "1000/s", each, 0.35, bare, s.sluice, s.bare, udp(judged)},
		{"(d) user path: throughput", "Gbit/s", bits, 1, proxy, s.sluice, s.proxy, rate(carried)},
		{"(d) user path: throughput, with one data filter", "Gbit/s", bits, 0.8, proxy, s.sluice, s.proxy, rate(filtered)},
		{"(d) user path: TCP connections", "1000/s", each, 1, proxy, s.sluice, s.proxy, tcp(carried, greet)},
		{"(d) user path: UDP packets of one flow", "1000/s", each, 0.8, "recvmmsg and sendmmsg", s.sluice, s.relay, passed},
		{"(e) endpoint-independent mapping: new UDP flows, same endpoint", "1000/s", each, 0, bare, s.mapped, s.bare, endpoint},
		{"(e) endpoint-independent mapping: new UDP flows, new endpoints", "1000/s", each, 0, bare, s.mapped, s.bare, endpoints},
	}
	if s.sluice != nil {
		return list
	}
	// A self-check has nothing that is queued or mapped.
	list = slices.DeleteFunc(list, func(c benchCase) bool { return c.name[:3] == "(c)" || c.name[:3] == "(e)" })
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
	// CPU is the daemon's processor time in microseconds, until it has come to
	// rest, so that the end of the flows is in it: for each connection, flow,
	// packet, or megabyte.
	CPU float64 `json:"daemon_cpu_us"`
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
		r.Ratios = append(r.Ratios, of.rate()/than.rate())
	}
	return r, nil
}

// total is what the turns of a lane in one round add up to.
type total struct {
	amount
	cpu time.Duration
}

func (t *total) sample(c benchCase) sample {
	units := t.units
	if c.scale == bits {
		units /= 1e6
	}
	return sample{Rate: t.rate() * c.scale, CPU: float64(t.cpu.Microseconds()) / units}
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
	if err := l.forget(); err != nil {
		return err
	}
	after, err := l.cpu()
	t.units += a.units
	t.time += a.time
	t.cpu += after - before
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

func rates(list []sample) []float64 {
	out := make([]float64, len(list))
	for i, s := range list {
		out[i] = s.Rate
	}
	return out
}
