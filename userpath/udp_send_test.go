package userpath

import (
	"bytes"
	"fmt"
	"testing"
	"time"
)

// A burst arrives as it was sent, whatever its datagrams have in common: many
// of one length, shorter ones between them, empty ones, and ones that have to
// be fragmented.
func TestUDPBurstArrivesAsItWas(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		lengths := map[string]func(i int) int{
			"of one length":     func(int) int { return 100 },
			"now and then less": func(i int) int { return 200 - i%9/8*150 },
			"of all lengths":    func(i int) int { return 1 + i*7%1400 },
			"now and then none": func(i int) int { return 50 * min(1, i%7) },
			"full":              func(int) int { return 1472 },
			"fragmented":        func(int) int { return 3000 },
		}
		port := 4000
		for name, length := range lengths {
			for _, source := range []string{"203.0.113.1:0", ""} {
				port++
				client, server := fmt.Sprintf("10.0.0.2:%d", port), fmt.Sprintf("203.0.113.10:%d", port)
				if source == "" {
					source = client // routed: the upstream socket has the client's own address
				}
				f := l.take(client, server, source)
				c, s := l.client.dial(client, server), l.server.listen(server)
				const n = 150
				want := make([][]byte, n)
				sum := 0
				for i := range want {
					want[i] = bytes.Repeat([]byte{byte(i)}, length(i))
					sum += len(want[i])
				}
				for _, w := range want {
					if _, err := c.Write(w); err != nil {
						l.Fatal(err)
					}
				}
				buf := make([]byte, 4096)
				for i := range want {
					_ = s.SetReadDeadline(time.Now().Add(5 * time.Second))
					got, err := s.Read(buf)
					if err != nil || !bytes.Equal(buf[:got], want[i]) {
						l.Fatalf("%s by %s: datagram %d has %d bytes, %v; want %d", name, source, i, got, err, len(want[i]))
					}
				}
				close(f.kill)
				if e := f.end(); e.counts.OutPackets != n || e.counts.OutBytes != uint64(sum) {
					l.Errorf("%s by %s: counted %+v, want %d datagrams of %d bytes together", name, source, e.counts, n, sum)
				}
			}
		}
	})
}

// What goes together: one flow, one length, and a shorter one at most as the
// last.
func TestAlikeDatagrams(t *testing.T) {
	a, b := new(udpFlow), new(udpFlow)
	for _, c := range []struct {
		lengths []int
		other   int // the first of another flow
		want    int
	}{
		{[]int{10, 10, 10, 10}, 9, 4}, {[]int{10, 10, 10, 10}, 2, 2}, {[]int{10, 10, 4, 4}, 9, 3}, {[]int{10, 10, 11}, 9, 2},
		{[]int{10, 10, 0, 10}, 9, 2}, {[]int{0, 0, 0}, 9, 1}, {[]int{10}, 9, 1}, {[]int{40000, 40000}, 9, 1},
	} {
		o := newUDPOut(nil)
		for i, n := range c.lengths {
			o.iov[i].SetLen(n)
			o.flows[i] = a
			if i >= c.other {
				o.flows[i] = b
			}
		}
		o.n = len(c.lengths)
		if got := o.alike(0); got != c.want {
			t.Errorf("%v, another flow from %d on: %d, want %d", c.lengths, c.other, got, c.want)
		}
	}
}
