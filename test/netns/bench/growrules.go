package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// ruleCounts are how many rules of a policy there are beside those of the bench,
// as the square of what manyRules is told; the last one only when many are asked
// for.
var ruleCounts = []int{0, 32, 100, 316}

// growingRules has a gateway for each number of rules, one after the other, and
// times new UDP flows that the kernel decides, against the bare ruleset at the
// same time; how long it takes until the gateway is ready; and how long a reload
// of the same rules takes, which replaces them all.
func growingRules(ctx context.Context, s *stand, o options) ([]sizeRow, error) {
	var rows []sizeRow
	counts := ruleCounts
	if !o.many {
		counts = counts[:len(counts)-1]
	}
	for _, n := range counts {
		more, err := s.amongRules(ctx, o, n)
		if err != nil {
			return nil, fmt.Errorf("among %d rules: %w", n*n, err)
		}
		rows = append(rows, more...)
	}
	return rows, nil
}

// amongRules measures among n*n rules.
func (s *stand) amongRules(ctx context.Context, o options, n int) ([]sizeRow, error) {
	text := gatewayConfig
	if n > 0 {
		text = manyRules(gatewayConfig, n)
	}
	var ready time.Duration
	l := &lane{name: "sluice among rules", start: func(l *lane) error {
		begun := time.Now()
		err := s.startSluice(ctx, l, o.gateway, text)
		ready = time.Since(begun)
		return err
	}}
	defer l.close()
	if err := l.up(); err != nil {
		return nil, err
	}
	ratio, err := beside(ctx, l, s.bare)
	if err != nil {
		return nil, err
	}
	took, err := s.reload(l, o.gateway)
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("among %d rules more than the bench's: ", n*n)
	return []sizeRow{
		{what + "new UDP flows in the kernel, ratio to the bare ruleset", ratio, "", 0},
		{what + "until the gateway is ready", ready.Seconds(), "s", 0},
		{what + "until a reload is over", took.Seconds(), "s", 0},
	}, nil
}

// beside is the median ratio of new UDP flows in two lanes that take turns, as
// in a case of the table.
func beside(ctx context.Context, of, than *lane) (float64, error) {
	c := benchCase{scale: each, of: of, than: than, load: func(l *lane) (amount, error) {
		return datagrams(l, decided, burstFlows, smallPacket, time.Second/turns, newFlows)
	}}
	r, err := measure(ctx, c, options{rounds: 5})
	if err != nil {
		return 0, err
	}
	return median(r.Ratios), nil
}

// reload has the lane's gateway read its configuration again; the command
// returns when the new rules are in the kernel.
func (s *stand) reload(l *lane, program string) (time.Duration, error) {
	begun := time.Now()
	out, err := exec.Command(program, "reload", "--socket", filepath.Join(s.dir, l.gw+".control")).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("reload: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return time.Since(begun), nil
}
