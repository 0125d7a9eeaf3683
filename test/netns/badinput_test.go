package netns_test

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// refusesToRun waits until the gateway has given up, wants every word in what
// it said, and nothing left behind.
func refusesToRun(t testing.TB, l *lab.Lab, g *lab.Gateway, before lab.Snapshot, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), lab.Patience(10*time.Second))
	defer cancel()
	status, err := g.Wait(ctx)
	if err != nil || status == 0 {
		t.Errorf("status %d, %v; want a failure", status, err)
	}
	for _, w := range words {
		if !strings.Contains(g.Output.String(), w) {
			t.Errorf("what it says does not name %q:\n%s", w, g.Output)
		}
	}
	if d := before.Diff(l.GW.Snapshot()); d != "" {
		t.Errorf("it left something:\n%s", d)
	}
}

// B58: each queue form works where the kernel has it, and is refused by the
// name of the kernel's option where it has not.
func TestB58QueueForms(t *testing.T) {
	t.Parallel()
	for _, form := range []string{"native", "xt"} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Srv.EchoTCP(7)
			_, status, err := l.GW.Try(5*time.Second, "nft", "add table inet try; add chain inet try c { type filter hook input priority 0; }; add rule inet try c queue num 9")
			if err != nil {
				t.Fatal(err)
			}
			if status == 0 {
				l.GW.Run("nft", "delete", "table", "inet", "try")
			}
			before := l.GW.Snapshot()
			c := userConfig()
			c.Form = form
			if form == "native" && status != 0 {
				refusesToRun(t, l, l.StartGateway(l.Text(c)), before, "CONFIG_NFT_QUEUE")
				return
			}
			l.Gateway(c)
			if got := strings.Contains(l.GW.Ruleset(), "NFQUEUE"); got != (form == "xt") {
				t.Errorf("xt NFQUEUE in the ruleset: %v", got)
			}
			for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
				echo(t, l.Client.MustDial("tcp", netip.AddrPortFrom(srv, 7).String(), 5*time.Second), "through the queue")
			}
		})
	}
}

func TestNoRoot(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	before := l.GW.Snapshot()
	path, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	out, status, err := l.GW.Try(10*time.Second, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all",
		path, "run", "-c", l.File("gateway.yaml", l.Text(lab.Config{})))
	if err != nil || status == 0 || !strings.Contains(out, "root") && !strings.Contains(out, "CAP_NET_ADMIN") {
		t.Errorf("status %d, %v, %q", status, err, out)
	}
	if d := before.Diff(l.GW.Snapshot()); d != "" {
		t.Errorf("it left something:\n%s", d)
	}
	if out, status, err := l.GW.Try(10*time.Second, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", path, "check", l.Dir()+"/gateway.yaml"); err != nil || status != 0 {
		t.Errorf("check needs no root: status %d, %v, %q", status, err, out)
	}
}

// An interface of a network that vanishes and comes back: the gateway lives,
// other flows go on.
func TestVanishedInterface(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	l.GW.Run("ip", "link", "add", "dmz0", "type", "veth", "peer", "name", "dmz1")
	c := userConfig()
	c.Networks = "  dmz: {interfaces: [dmz0]}\n"
	c.Rules += "  - {name: dmz, action: allow, from: lan, to: dmz, protocols: [echo]}\n"
	g := l.Gateway(c)
	l.GW.Run("ip", "link", "delete", "dmz0")
	for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
		echo(t, l.Client.MustDial("tcp", netip.AddrPortFrom(srv, 7).String(), 5*time.Second), "others go on")
	}
	g.Reload(c)
	for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
		echo(t, l.Client.MustDial("tcp", netip.AddrPortFrom(srv, 7).String(), 5*time.Second), "after a reload without it")
	}
}
