package sip

import (
	"net/netip"
	"strings"
	"testing"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

const twoStreams = "v=0\r\no=a 1 1 IN IP4 10.0.0.2\r\ns=-\r\nc=IN IP4 10.0.0.2\r\nt=0 0\r\na=ice-lite\r\na=group:BUNDLE 0 1\r\n" +
	"m=audio 4000 RTP/AVP 0 8\r\na=rtpmap:0 PCMU/8000\r\na=rtcp:4005 IN IP4 10.0.0.2\r\na=candidate:1 1 UDP 1 10.0.0.2 4000 typ host\r\na=sendrecv\r\n" +
	"m=video 4002/1 RTP/SAVPF 96\r\ni=a title\r\nc=IN IP4 10.0.0.3\r\na=ice-ufrag:x\r\n" +
	"m=image 4004 udptl t38\r\n" +
	"m=message 4006 TCP/MSRP *\r\n"

func TestSDPEndpoints(t *testing.T) {
	d, err := parseSDP([]byte(twoStreams))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		e   endpoints
		why string
	}{
		{endpoints{ap("10.0.0.2:4000"), ap("10.0.0.2:4005")}, ""},
		{endpoints{ap("10.0.0.3:4002"), ap("10.0.0.3:4003")}, ""},
		{endpoints{rtp: ap("10.0.0.2:4004")}, ""},
		{endpoints{}, noSuchTransport},
	} {
		if e, why := d.endpoints(d.media[i]); e != want.e || why != want.why {
			t.Errorf("media %d: %+v, %q", i, e, why)
		}
	}
}

func TestSDPRewriting(t *testing.T) {
	d, err := parseSDP([]byte(twoStreams))
	if err != nil {
		t.Fatal(err)
	}
	gw := netip.MustParseAddr("203.0.113.1")
	d.setPorts(d.media[0], endpoints{ap("203.0.113.1:40000"), ap("203.0.113.1:40001")})
	d.setPorts(d.media[1], endpoints{ap("203.0.113.1:40002"), ap("203.0.113.1:40005")})
	d.setAddress(d.media[1], gw)
	d.setPorts(d.media[2], endpoints{rtp: ap("203.0.113.2:40006")})
	d.setAddress(d.media[2], netip.MustParseAddr("203.0.113.2"))
	d.disable(d.media[3])
	d.hide(netip.MustParseAddr("10.0.0.2"), gw)
	want := "v=0\r\no=a 1 1 IN IP4 203.0.113.1\r\ns=-\r\nc=IN IP4 203.0.113.1\r\nt=0 0\r\n" +
		"m=audio 40000 RTP/AVP 0 8\r\na=rtpmap:0 PCMU/8000\r\na=rtcp:40001 IN IP4 203.0.113.1\r\na=sendrecv\r\n" +
		"m=video 40002 RTP/SAVPF 96\r\ni=a title\r\nc=IN IP4 203.0.113.1\r\na=rtcp:40005\r\n" +
		"m=image 40006 udptl t38\r\nc=IN IP4 203.0.113.2\r\n" +
		"m=message 0 TCP/MSRP *\r\n"
	if got := string(d.bytes()); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestSDPRefuses(t *testing.T) {
	base := sdp("10.0.0.2", "4000")
	for _, edit := range [][2]string{
		{"v=0\r\n", ""}, {"v=0", "v=1"}, {"v=0\r\n", "v=0\r\nv=0\r\n"}, {"o=a 1 1 IN IP4 10.0.0.2\r\n", ""}, {"o=a 1", "o=a"},
		{"s=-\r\n", "s=-\r\no=b 1 1 IN IP4 10.0.0.2\r\n"}, {"t=0", "c=IN IP4 10.0.0.3\r\nt=0"}, {"m=audio 4000", "m=audio 70000"},
		{"m=audio 4000", "m=audio -1"}, {"m=audio 4000", "m=audio 4000/0"}, {"m=audio 4000 RTP/AVP 0", "m=audio 4000"}, {"s=-", "S=-"}, {"s=-", "s"},
		{"m=audio 4000 RTP/AVP 0", "m=audio 4000 RTP/AVP 0\r\nc=IN IP4 10.0.0.2\r\nc=IN IP4 10.0.0.3"},
		{"m=audio 4000 RTP/AVP 0", "m=audio 4000 RTP/AVP 0\r\na=rtcp:1\r\na=rtcp:2"},
		{"m=audio 4000 RTP/AVP 0", strings.Repeat("m=audio 4000 RTP/AVP 0\r\n", maxMedia+1)}, {"s=-", "s=\r-"},
	} {
		if !strings.Contains(base, edit[0]) {
			t.Fatalf("no %q", edit[0])
		}
		text := strings.Replace(base, edit[0], edit[1], 1)
		if d, err := parseSDP([]byte(text)); err == nil {
			t.Errorf("%q is read: %+v", text, d)
		}
	}
	for _, conn := range []string{"IN IP4 host.example.org", "IN IP4 224.2.1.1/127", "IN IP4 fd00::1", "IN IP6 10.0.0.2", "IN IP4 ::ffff:10.0.0.2", "IN IP4 010.0.0.2", "IN IP6 fe80::1%eth0", "IN IP4"} {
		d, err := parseSDP([]byte(strings.Replace(base, "c=IN IP4 10.0.0.2", "c="+conn, 1)))
		if err != nil {
			t.Errorf("%q: %v", conn, err)
			continue
		}
		if e, why := d.endpoints(d.media[0]); why != noSuchAddress {
			t.Errorf("%q is read as %+v", conn, e)
		}
	}
}

// What is read of a description is in it, and it is read the same way after it
// was written.
func FuzzSDP(f *testing.F) {
	f.Add([]byte(twoStreams))
	f.Add([]byte(sdp("10.0.0.2", "4000")))
	f.Add([]byte(sdp("fd00:a::2", "4000", "a=rtcp:4009")))
	f.Fuzz(func(t *testing.T, in []byte) {
		d, err := parseSDP(in)
		if err != nil {
			return
		}
		again, err := parseSDP(d.bytes())
		if err != nil || len(again.media) != len(d.media) {
			t.Fatalf("%q is not read again: %v", d.bytes(), err)
		}
		for i, m := range d.media {
			e, why := d.endpoints(m)
			if e2, why2 := again.endpoints(again.media[i]); e2 != e || why2 != why {
				t.Fatalf("%q: %+v, %q, then %+v, %q", in, e, why, e2, why2)
			}
			if why != "" {
				continue
			}
			names := endpoints{rtp: ap("203.0.113.1:40000")}
			if e.rtcp.IsValid() {
				names.rtcp = ap("203.0.113.1:40001")
			}
			again.setPorts(again.media[i], names)
			again.setAddress(again.media[i], names.rtp.Addr())
			third, err := parseSDP(again.bytes())
			if err != nil {
				t.Fatalf("%q: %v", again.bytes(), err)
			}
			if got, why := third.endpoints(third.media[i]); got != names || why != "" {
				t.Fatalf("%q: %+v, %q", again.bytes(), got, why)
			}
		}
	})
}
