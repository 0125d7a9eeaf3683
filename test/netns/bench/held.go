package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"path/filepath"
	"time"
)

// fresh is one more lane with a gateway, whose daemon has done nothing yet: what
// another load has left of a heap would hide what is measured.
func (s *stand) fresh(ctx context.Context, o options, name, config string) (*lane, error) {
	l := s.lane(name, func(l *lane) error { return s.startSluice(ctx, l, o.gateway, config) })
	return l, l.up()
}

// Of connections that are held: filteredShare of those that are idle have a data
// filter, slowReaders do not read.
const (
	filteredShare = 2
	slowReaders   = 2000
	slowFor       = 5 * time.Second
)

// heldConnections are connections that cost the daemon memory for as long as they
// stand: those that say nothing and have a data filter, and those whose client
// does not read what its server sends all the time. connections is how many idle
// ones without a filter there were.
func (s *stand) heldConnections(ctx context.Context, o options, connections int) (rows []sizeRow, err error) {
	for _, c := range []struct {
		what string
		p    path
		k    kind
		n    int
	}{
		{"idle connections with a data filter", filtered, idle, connections / filteredShare},
		{"connections whose client does not read, spliced", carried, flooding, min(slowReaders, connections/2)},
		{"connections whose client does not read, with a data filter", filtered, flooding, min(slowReaders, connections/2)},
	} {
		each, more, err := s.holding(ctx, o, c.p, c.k, c.n)
		if err != nil {
			return nil, fmt.Errorf("%d %s: %w", c.n, c.what, err)
		}
		row := sizeRow{fmt.Sprintf("memory of the daemon for each of %d %s", c.n, c.what), each / 1024, "KiB", 20}
		if c.k == flooding && c.p == filtered {
			row.most = 0 // the filter holds a buffer
		}
		rows = append(rows, row)
		if c.k == flooding {
			rows = append(rows, sizeRow{fmt.Sprintf("the same %v later: more than that", slowFor), more / 1024, "KiB", 1})
		}
	}
	return rows, nil
}

// holding is what each of n connections takes of the daemon's memory, and where
// their servers flood them how much more it is after a while.
func (s *stand) holding(ctx context.Context, o options, p path, k kind, n int) (each, more float64, err error) {
	l, err := s.fresh(ctx, o, fmt.Sprintf("sluice, %d:%d held", p, k), gatewayConfig)
	if err != nil {
		return 0, 0, err
	}
	// What is under way is in the sockets' buffers, of which the machine has as
	// much as these let it.
	for _, ns := range []string{l.client, l.gw, l.srv} {
		for _, side := range []string{"rmem", "wmem"} {
			if err := command("ip", "netns", "exec", ns, "sysctl", "-qw", "net.ipv4.tcp_"+side+"=4096 65536 262144"); err != nil {
				return 0, 0, err
			}
		}
	}
	before, err := l.daemon.memory()
	if err != nil {
		return 0, 0, err
	}
	release, err := l.hold(p, k, n)
	defer release()
	if err != nil {
		return 0, 0, err
	}
	if k == flooding {
		time.Sleep(slowFor) // of load
	} else if err := l.daemon.settle(); err != nil {
		return 0, 0, err
	}
	after, err := l.daemon.memory()
	if err != nil || k != flooding {
		return math.Max(0, after-before) / float64(n), 0, err
	}
	time.Sleep(slowFor) // of load
	later, err := l.daemon.memory()
	return math.Max(0, after-before) / float64(n), math.Max(0, later-after) / float64(n), err
}

// permissionSizes are of how many permissions of a kind each takes how much, and
// how long a call takes beside them. Redirections and binds have a port of one
// address each.
var permissionSizes = []struct {
	kind, what string
	sizes      []int
}{
	{"future", "connections to come", []int{1000, 10_000, 100_000}},
	{"redirect", "redirections", []int{1000, 20_000}},
	{"bind", "binds", []int{1000, 20_000}},
}

// manyPorts has room for them.
const manyPorts = "ports: {kernel: 1024-4999, leases: 5000-32767}\n"

// permissionBytes is what a permission may take.
const permissionBytes = 300

// heldPermissions have the probe ask for very many permissions and hold them: the
// figures are those of the daemon's own heap, with everything that it keeps for a
// permission, be it the engine's, the kernel path's, the allocator's or what the
// filter holds.
func (s *stand) heldPermissions(ctx context.Context, o options) (rows []sizeRow, err error) {
	for _, p := range permissionSizes {
		l, err := s.fresh(ctx, o, "sluice, many "+p.what, gatewayConfig+manyPorts)
		if err != nil {
			return nil, err
		}
		before, err := l.daemon.memory()
		if err != nil {
			return nil, err
		}
		for i, n := range p.sizes {
			r, err := s.probe(l, map[string]any{
				"kind": p.kind, "proto": "tcp", "protocol": "decided", "local": "10.64.0.1", "remote": "198.18.0.1:20000", "bytes": n,
			})
			if err != nil {
				return nil, fmt.Errorf("%d %s: %w", n, p.what, err)
			}
			most := 0.0 // few share the sessions and the parts of tables less well
			if i == len(p.sizes)-1 {
				most = permissionBytes
			}
			rows = append(rows,
				sizeRow{fmt.Sprintf("the daemon's heap for each of %d permissions, %s", n, p.what), r.Heap, "B", most},
				sizeRow{fmt.Sprintf("a call beside those %d: p50", n), r.P50, "µs", 0},
				sizeRow{"the same: p99", r.P99, "µs", 1000})
		}
		after, err := l.daemon.memory()
		if err != nil {
			return nil, err
		}
		n := p.sizes[len(p.sizes)-1]
		rows = append(rows, sizeRow{fmt.Sprintf("memory of the daemon for each of %d permissions, %s", n, p.what), (after - before) / float64(n), "B", 0})
	}
	return rows, nil
}

// probed is what the probe says of very many permissions.
type probed struct {
	ID    uint64  `json:"id"`
	Error string  `json:"error"`
	Heap  float64 `json:"heap"`
	P50   float64 `json:"p50"`
	P99   float64 `json:"p99"`
}

// probe gives the probe of a lane's gateway the order "many".
func (s *stand) probe(l *lane, args map[string]any) (r probed, err error) {
	c, err := net.Dial("unix", filepath.Join(s.dir, l.gw+".probe"))
	if err != nil {
		return r, fmt.Errorf("the probe: %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return r, fmt.Errorf("the probe: %w", err)
	}
	if err := json.NewEncoder(c).Encode(map[string]any{"id": 1, "op": "many", "args": args}); err != nil {
		return r, fmt.Errorf("the probe: %w", err)
	}
	for in := json.NewDecoder(c); r.ID == 0; { // events have none
		if err := in.Decode(&r); err != nil {
			return r, fmt.Errorf("the probe: %w", err)
		}
	}
	if r.Error != "" {
		return r, errors.New(r.Error)
	}
	return r, nil
}
