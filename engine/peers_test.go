package engine

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// peerPerEvent puts a data filter on each new UDP peer while fresh says so.
func peerPerEvent(t *testing.T, fresh *bool) *probe {
	p := &probe{events: filterapi.Events{Types: filterapi.UDPDestination | filterapi.ConnectTCP, Secondary: true}}
	p.handle = func(ev filterapi.Event) error {
		switch e := ev.(type) {
		case *filterapi.ConnectEvent:
			return e.Connection.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
		case *filterapi.UDPDestinationEvent:
			if !*fresh {
				return nil
			}
			if err := e.Connection.AttachDataFilterWithDestination(tagged{tag: "peer"}, filterapi.PriorityNAT, e.Peer); err != nil {
				t.Errorf("%v: %v", e.Peer, err)
			}
		}
		return nil
	}
	return p
}

// TestAClientThatTalksToMorePeersThanAreRemembered goes on to get its data
// filters. What is forgotten is first that of sockets that are silent, and
// then the oldest.
func TestAClientThatTalksToMorePeersThanAreRemembered(t *testing.T) {
	fresh := true
	b, _ := talkBench(t, peerPerEvent(t, &fresh))
	b.decide(t) // keeps the session
	const living = "10.0.0.2:5000"
	peer := func(i int) string { return fmt.Sprintf("203.0.%d.%d:5060", 114+i/200, 1+i%200) }
	talk := func(src, dst string) []string {
		d := b.Decide(t.Context(), udp(src, dst))
		got := tags(d.Takeover)
		if d.Takeover != nil {
			d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
		}
		return got
	}
	hold := b.Decide(t.Context(), udp(living, phone)) // its socket lives
	for i := range 2 * maxRemembered {
		if got := talk(fmt.Sprintf("10.0.0.2:%d", 10000+i), peer(i)); !slices.Equal(got, []string{"peer"}) {
			t.Fatalf("peer %d: %v", i, got)
		}
	}
	fresh = false
	hold.Takeover.Ended(flow.Counts{}, flow.Closed, "")
	keep := b.Decide(t.Context(), udp(living, phone))
	if got := tags(keep.Takeover); !slices.Equal(got, []string{"peer"}) {
		t.Errorf("the peer of a socket that lived: %v", got)
	}
	fresh = true
	for i := range maxRemembered + 5 {
		if got := talk(living, peer(i)); !slices.Equal(got, []string{"peer"}) {
			t.Fatalf("peer %d of one socket: %v", i, got)
		}
	}
	fresh = false
	for i, want := range map[int][]string{0: nil, maxRemembered + 4: {"peer"}, maxRemembered / 2: {"peer"}} {
		if got := talk(living, peer(i)); !slices.Equal(got, want) {
			t.Errorf("peer %d comes back: %v, want %v", i, got, want)
		}
	}
	if n := len(keep.Takeover.flow.session.peers); n > maxRemembered {
		t.Errorf("%d are remembered", n)
	}
}

// TestABindWithMorePeersThanAreRemembered is the same for those who come to a
// bind.
func TestABindWithMorePeersThanAreRemembered(t *testing.T) {
	fresh := true
	b, _ := talkBench(t, peerPerEvent(t, &fresh))
	tk := b.decide(t)
	n := filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.UDP, Flags: filterapi.AllowMultiple | filterapi.Bidirectional}
	binds, err := tk.Conn().Session().BindForClient(filterapi.Bind{Negotiated: n, Clients: []netip.AddrPort{ap("10.0.0.2:6000")}})
	if err != nil {
		t.Fatal(err)
	}
	come := func(src string) Decision {
		in := udp(src, binds[0].Tuple().Dst.String())
		in.InIface = "wan0"
		return b.Decide(t.Context(), in)
	}
	first := come(phone) // goes on
	for i := range 2 * maxRemembered {
		d := come(fmt.Sprintf("203.0.113.11:%d", 10000+i))
		if got := tags(d.Takeover); !slices.Equal(got, []string{"peer"}) {
			t.Fatalf("peer %d: %v", i, got)
		}
		d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
	}
	fresh = false
	first.Takeover.Ended(flow.Counts{}, flow.Closed, "")
	for src, want := range map[string][]string{phone: {"peer"}, "203.0.113.11:10000": nil, fmt.Sprintf("203.0.113.11:%d", 10000+2*maxRemembered-1): {"peer"}} {
		if got := tags(come(src).Takeover); !slices.Equal(got, want) {
			t.Errorf("%s comes back: %v, want %v", src, got, want)
		}
	}
}
