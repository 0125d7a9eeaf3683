package pcp

import (
	"context"
	"net"
	"net/netip"
	"time"

	"go.uber.org/zap"
)

// The state of mappings is in memory. After a restart of the gateway it is
// gone, and so are the mappings: the epoch begins anew, and the hosts are told,
// so that they ask again (RFC 6887, sections 8.5 and 14.1.3, RFC 6886, section
// 3.2.1). They ask for what they had, and get it where nobody else has it.

const (
	// announcements is how often the same is told, since datagrams are lost.
	announcements = 10
	// firstPause is between the first two; each is twice the one before.
	firstPause = 250 * time.Millisecond
)

// Who listens for news.
var (
	allHosts4 = netip.AddrFrom4([4]byte{224, 0, 0, 1})
	allHosts6 = netip.MustParseAddr("ff02::1")
)

// renew has the news told, from now on.
func (k *keeper) renew() {
	k.news, k.next, k.pause = announcements, time.Now(), firstPause
}

// announce tells the news when it is time.
func (k *keeper) announce() {
	if k.news == 0 || time.Now().Before(k.next) {
		return
	}
	k.news--
	k.next, k.pause = k.next.Add(k.pause), 2*k.pause
	epoch := k.s.epoch()
	for _, x := range k.open {
		to := &net.UDPAddr{IP: allHosts4.AsSlice(), Port: clientPort}
		if x.at.Is6() {
			to = &net.UDPAddr{IP: allHosts6.AsSlice(), Port: clientPort, Zone: x.iface}
		}
		k.send(x, announcement(epoch), to)
		if external, known := k.external[x.at]; known && k.s.serving().NATPMP {
			k.send(x, pmpExternal(external, pmpSuccess, epoch), to)
		}
	}
}

func (k *keeper) send(x *socket, text []byte, to net.Addr) {
	if _, err := x.conn.WriteTo(text, to); err != nil {
		k.complain("announce", x.at, err)
	}
}

// watchExternal looks whether the gateway's external address is still the one
// of the mappings. When it has changed they lead nowhere.
func (k *keeper) watchExternal(ctx context.Context, places []place) {
	changed := false
	for _, p := range places {
		if !p.at.Is4() {
			continue
		}
		s, err := k.s.fw.PrivateSession(p.guest, "")
		if err != nil {
			continue
		}
		now, err := s.ExternalAddr(Name)
		s.Close()
		before, known := k.external[p.at]
		if err != nil || now == p.guest || now == before {
			continue
		}
		if known {
			k.s.log.Info("the external address has changed; mappings are made anew",
				zap.Stringer("was", before), zap.Stringer("is", now))
			changed = true
		}
		if k.external == nil {
			k.external = make(map[netip.Addr]netip.Addr)
		}
		k.external[p.at] = now
	}
	if changed {
		k.s.look(ctx, job{readdressed: true})
		k.s.begin()
		k.renew()
	}
}
