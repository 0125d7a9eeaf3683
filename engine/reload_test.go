package engine

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// meanwhile is a user space in which something happens during a dial.
type meanwhile struct {
	*fakeUser
	happens func()
}

func (m meanwhile) Dial(ctx context.Context, p flow.Proto, from, to netip.AddrPort) (net.Conn, error) {
	m.happens()
	return m.fakeUser.Dial(ctx, p, from, to)
}

// reload puts rules in force as the gateway does.
func (b *bench) reload(t *testing.T, p *policy.Policy) {
	t.Helper()
	b.SetPolicy(p)
	if err := b.Recheck(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

// TestSocketsEndWithTheRuleOfTheirPermission: what a permission let a session
// dial ends when the rules no longer allow the permission, and so does what was
// being dialled then.
func TestSocketsEndWithTheRuleOfTheirPermission(t *testing.T) {
	p := attaching(&probe{})
	b, user := talkBench(t, p)
	tk := b.decide(t)
	private, err := p.fw.PrivateSession(netip.MustParseAddr("10.0.0.2"), "")
	if err != nil {
		t.Fatal(err)
	}
	primary := tk.flow.handle(b.filters[0])
	target := netip.MustParseAddrPort("203.0.113.10:2000")
	grant(t, private, primary, target)
	conn, err := private.Network().Dial(t.Context(), flow.TCP, netip.AddrPort{}, target)
	if err != nil {
		t.Fatal(err)
	}
	b.reload(t, talkPolicy(t))
	if _, ok := conn.(sessionConn); !ok || len(b.Permissions()) != 1 || b.Permissions()[0].Flows != 1 {
		t.Errorf("after a reload that changes nothing: %+v", b.Permissions())
	}
	b.reload(t, testPolicy(t, policy.Deny))
	if err := conn.SetDeadline(time.Time{}); err == nil {
		t.Error("the socket outlived the rule of its permission")
	}

	for name, to := range map[string]netip.AddrPort{"by a permission": target, "by the rules": netip.MustParseAddrPort(control)} {
		b.reload(t, talkPolicy(t))
		if to == target {
			grant(t, private, primary, target)
		}
		b.user = meanwhile{user, func() { b.reload(t, testPolicy(t, policy.Deny)) }}
		if _, err := private.Network().Dial(t.Context(), flow.TCP, netip.AddrPort{}, to); !errors.Is(err, filterapi.ErrPolicyDenied) {
			t.Errorf("%s, dialled while the rules changed: %v", name, err)
		}
		b.user = user
	}
}

// gatheringKernel answers when so many changes have come together.
type gatheringKernel struct {
	*fakeKernel
	want     int32
	come     atomic.Int32
	together chan struct{}
}

func (k *gatheringKernel) Remove(ctx context.Context, p nat.Permission) error {
	if k.come.Add(1) == k.want {
		close(k.together)
	}
	select {
	case <-k.together:
	case <-time.After(2 * time.Second):
		return errors.New("the kernel waits for more")
	}
	return k.fakeKernel.Remove(ctx, p)
}

// TestAReloadVoidsTogether: the kernel takes many changes at once, and one by
// one they would take too long.
func TestAReloadVoidsTogether(t *testing.T) {
	p := attaching(&probe{})
	b, _ := talkBench(t, p)
	tk := b.decide(t)
	k := &gatheringKernel{fakeKernel: b.kernel, want: 5, together: make(chan struct{})}
	b.Engine.kernel = k
	for range k.want {
		if _, err := tk.flow.session.bindForClient("", filterapi.Bind{
			Negotiated: filterapi.Negotiated{Primary: tk.flow.handle(b.filters[0]), Proto: flow.TCP},
			Clients:    []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:5000")},
		}); err != nil {
			t.Fatal(err)
		}
	}
	b.reload(t, testPolicy(t, policy.Deny))
	if !b.kernel.empty() {
		t.Errorf("after the reload the kernel holds %v", b.kernel.held)
	}
}
