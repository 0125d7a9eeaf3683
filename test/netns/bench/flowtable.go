package main

import (
	"fmt"
	"math"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Where the kernel has flowtables the gateway puts its flows there, and their
// packets meet none of its rules. The rows about it say so from outside: each
// turn looks for its flow in conntrack, where it must be marked as offloaded,
// and have counters that are right.

// notHere is why this kernel cannot have a row.
type notHere string

func (n notHere) Error() string { return "not measured: " + string(n) }

// flowtableCases are the rows of flows in a flowtable.
func (s *stand) flowtableCases(length time.Duration) []benchCase {
	stream := func(l *lane) (amount, error) {
		return s.offloaded(l, func() (amount, error) { return s.stream(l, length) })
	}
	packets := func(size int) func(*lane) (amount, error) {
		return func(l *lane) (amount, error) {
			return s.offloaded(l, func() (amount, error) { return s.packets(l, size, length) })
		}
	}
	const bare, name = "nft masquerade", "(a) kernel flow, in a flowtable: "
	return []benchCase{
		{name + "TCP", "Gbit/s", bits, 0.98, 0, bare, s.sluice, s.bare, stream},
		{name + "packets of 64 bytes", "1000/s", each, 0.98, 0, bare, s.sluice, s.bare, packets(smallPacket)},
		{name + "packets of 1400 bytes", "1000/s", each, 0.98, 0, bare, s.sluice, s.bare, packets(largePacket)},
	}
}

// offloaded runs a load where there are flowtables.
func (s *stand) offloaded(l *lane, load func() (amount, error)) (amount, error) {
	const table = "table inet bench { flowtable f { hook ingress priority 0; devices = { lan0, wan0 }; }; }\n"
	if err := commandInput(table, "ip", "netns", "exec", l.gw, "nft", "-c", "-f", "-"); err != nil {
		return amount{}, notHere("this kernel has no flowtables")
	}
	return load()
}

// stream is throughput of a kernel flow.
func (s *stand) stream(l *lane, length time.Duration) (amount, error) {
	return throughputUntil(l, decided, length, func(got float64) error {
		if l != s.sluice {
			return nil
		}
		c, err := l.carried("tcp", decided.port(bulk))
		// What came is what was counted; what is on its way comes to it, and
		// headers.
		if err == nil && (c.replyBytes < got || c.replyBytes > 1.1*got+16<<20) {
			err = fmt.Errorf("%.0f bytes of a flow came, and %.0f were counted", got, c.replyBytes)
		}
		return err
	})
}

// packets is the load of a known UDP flow.
func (s *stand) packets(l *lane, size int, length time.Duration) (amount, error) {
	a, err := datagrams(l, decided, math.MaxInt32, size, length, oneFlow)
	if err != nil || l != s.sluice {
		return a, err
	}
	c, err := l.carried("udp", decided.port(sink))
	if err == nil && c.packets != a.units {
		err = fmt.Errorf("%.0f packets of a flow came, and %.0f were counted", a.units, c.packets)
	}
	return a, err
}

// carried is what conntrack says of a flow in the flowtable.
type carriedFlow struct{ packets, replyBytes float64 }

// carried finds the only flow to a port. An error: it is not in the flowtable.
func (l *lane) carried(proto string, port uint16) (carriedFlow, error) {
	out, err := exec.Command("ip", "netns", "exec", l.gw, "conntrack", "-L", "-p", proto, "--orig-port-dst", strconv.Itoa(int(port))).Output()
	if err != nil {
		return carriedFlow{}, fmt.Errorf("list conntrack: %w", err)
	}
	return parseCarried(string(out))
}

func parseCarried(list string) (c carriedFlow, err error) {
	lines := strings.Split(strings.TrimSpace(list), "\n")
	if len(lines) != 1 || !strings.Contains(lines[0], "[OFFLOAD]") {
		return c, fmt.Errorf("conntrack has no flow alone that is offloaded: %q", list)
	}
	var packets, bytes []float64
	for _, field := range strings.Fields(lines[0]) {
		name, text, _ := strings.Cut(field, "=")
		if name != "packets" && name != "bytes" {
			continue
		}
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return c, fmt.Errorf("read conntrack: %q: %w", field, err)
		}
		if name == "packets" {
			packets = append(packets, v)
		} else {
			bytes = append(bytes, v)
		}
	}
	if len(packets) != 2 || len(bytes) != 2 {
		return c, fmt.Errorf("conntrack does not count: %q", lines[0])
	}
	return carriedFlow{packets[0], bytes[1]}, nil
}
