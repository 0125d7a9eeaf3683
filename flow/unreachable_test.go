package flow

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	// SYNs of 10.0.0.2:4000 and fd00:a::2:4000 to port 7.
	quoted4 = "4500003c 00004000 40060000 0a000002 cb007163 0fa00007 00000001 00000000 a0020000 00000000"
	quoted6 = "60000000 00280640 fd00000a000000000000000000000002 20010db8000b00000000000000000099 0fa00007 00000001 00000000 a0020000 00000000"
	outer4  = "45c00058 00000000 40010000 0a000001 0a000002 "
	outer6  = "60000000 00503a40 fd00000a000000000000000000000001 fd00000a000000000000000000000002 "
)

func TestParseUnreachable(t *testing.T) {
	for _, c := range []struct {
		name, packet string
		dst          string
		told         Path
		ok           bool
	}{
		{"host", outer4 + "0301000000000000" + quoted4, "203.0.113.99:7", HostUnreachable, true},
		{"net", outer4 + "0300000000000000" + quoted4, "203.0.113.99:7", NetUnreachable, true},
		{"prohibited", outer4 + "030d000000000000" + quoted4, "203.0.113.99:7", Reject, true},
		{"time exceeded", outer4 + "0b00000000000000" + quoted4, "", Drop, false},
		{"address", outer6 + "0103000000000000" + quoted6, "[2001:db8:b::99]:7", HostUnreachable, true},
		{"no route", outer6 + "0100000000000000" + quoted6, "[2001:db8:b::99]:7", NetUnreachable, true},
		{"echo", outer6 + "8000000000000000" + quoted6, "", Drop, false},
		{"cut short", outer6 + "0103000000000000 6000", "", HostUnreachable, false},
		{"not ICMP", quoted4, "", Drop, false},
	} {
		got, told, ok := ParseUnreachable(unhex(t, c.packet))
		if ok != c.ok || told != c.told || ok && got.Dst != netip.MustParseAddrPort(c.dst) {
			t.Errorf("%s: %v %v %v", c.name, got, told, ok)
		}
	}
}

func FuzzParseUnreachable(f *testing.F) {
	f.Add(unhex(f, outer4+"0301000000000000"+quoted4))
	f.Add(unhex(f, outer6+"0103000000000000"+quoted6))
	f.Fuzz(func(t *testing.T, b []byte) {
		if q, told, ok := ParseUnreachable(b); ok && (told == Drop || told.Carries() || !q.Src.IsValid()) {
			t.Fatalf("%v %v", q, told)
		}
	})
}
