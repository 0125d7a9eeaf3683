package userpath

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// An upstream socket lends its address to those who speak in its name, and to
// nobody else.
func TestUDPLend(t *testing.T) {
	any4 := netip.MustParseAddrPort("127.0.0.1:0")
	upstream, err := udpOpen(udpSpec{local: any4, lend: true})
	if err != nil {
		t.Fatal(err)
	}
	defer upstream.close()
	reply, err := udpOpen(udpSpec{local: upstream.local, reuse: true, remote: netip.MustParseAddrPort("127.0.0.1:9")})
	if err != nil {
		t.Fatalf("in its name: %v", err)
	}
	defer reply.close()
	if other, err := udpOpen(udpSpec{local: upstream.local, lend: true}); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("another upstream socket: %v", err)
		if err == nil {
			other.close()
		}
	}
}
