package kernelpath

import (
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// publishing is twoZones with servers: two at one port for different clients,
// one with shifted ports, one of both families that sees the gateway.
func publishing() Input {
	in := twoZones()
	addr := netip.MustParseAddr
	outside := []netip.Addr{addr("203.0.113.1")}
	in.Compiled.Publications = []policy.Published{
		{Rule: "friends", Publication: policy.Publication{Addresses: outside, Servers: []netip.Addr{addr("10.0.0.5")}}},
		{Rule: "www", Publication: policy.Publication{Addresses: outside, Servers: []netip.Addr{addr("10.0.0.6"), addr("fd00:a::6")}, FromGateway: true}},
		{Rule: "game", Publication: policy.Publication{Addresses: []netip.Addr{addr("203.0.113.2")}, Servers: []netip.Addr{addr("10.0.0.7")}, ServerPort: 9000},
			Ports: policy.PortRange{Lo: 5000, Hi: 5002}},
	}
	of := func(n int, b policy.Box) policy.Box { b.Publication = n; return b }
	any4, at, host := "0.0.0.0/0", "203.0.113.1/32", "203.0.113.2/32"
	in.Compiled.Publish = []policy.Table{{In: 2, Stages: []policy.Stage{
		ports4(box("198.51.100.66/32", any4, flow.TCP, flow.TCP, 80, 80, policy.ClassReject),
			of(1, box("198.51.100.0/26", at, flow.TCP, flow.TCP, 80, 80, policy.ClassAsk))),
		ports4(box(any4, any4, flow.TCP, flow.TCP, 22, 22, policy.ClassKernel),
			of(2, box(any4, at, flow.TCP, flow.TCP, 80, 80, policy.ClassKernel)),
			of(3, box(any4, host, flow.UDP, flow.UDP, 5000, 5002, policy.ClassKernel))),
	}}}
	in.Compiled.Forward = append(in.Compiled.Forward, policy.Table{In: 2, Out: 1, Stages: []policy.Stage{
		{Is6: true, Kind: policy.KindPorts, Boxes: []policy.Box{
			box("2001:db8:b::66/128", "::/0", flow.TCP, flow.UDP, 0, 65535, policy.ClassDrop)}},
		{Is6: true, Kind: policy.KindPorts, Boxes: []policy.Box{
			of(2, box("::/0", "fd00:a::6/128", flow.TCP, flow.TCP, 80, 80, policy.ClassKernel))}},
	}})
	return in
}

func TestPublicationThatIsNone(t *testing.T) {
	in := publishing()
	in.Compiled.Publications = in.Compiled.Publications[:2]
	if _, err := Build(in, testOptions(t)); err == nil {
		t.Error("a box of a third publication of two was taken")
	}
}

// A client that is to see the gateway sees the address that the route to it
// prefers, in both families, for one source and for all.
func TestPermitFromGateway(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		gateway := map[bool]netip.Addr{true: netip.MustParseAddr("10.0.0.1"), false: netip.MustParseAddr("fd00:a::1")}[e.client.Is4()]
		p := e.published(1, flow.TCP)
		p.FromGateway = true
		serve(t, j.client, p.Client.String())
		install(t, table, p)
		wantFrom(t, j.server, e.server, p.External, gateway)
		revoke(t, table, p)
		p.Sources, p.AnySource, p.Multiple = nil, true, true
		install(t, table, p)
		for range 2 {
			wantFrom(t, j.server, e.server, p.External, gateway)
		}
		revoke(t, table, p)
		if got := listed(t, table); len(got) != 0 {
			t.Errorf("the kernel still holds %q", got)
		}
	})
}
