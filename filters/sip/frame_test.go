package sip

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// options is a message that has everything that the parser looks at.
const plain = "OPTIONS sip:bob@203.0.113.10 SIP/2.0\r\n" +
	"v: SIP / 2.0 / UDP\r\n 10.0.0.2 : 5060 ;branch=z9hG4bK1;rport,\r\n SIP/2.0/UDP 10.0.0.9\r\n" +
	"f: \"A, B\" <sip:alice@10.0.0.2>;tag=a\r\n" +
	"t: <sip:bob@203.0.113.10>\r\n" +
	"i: 1@10.0.0.2\r\n" +
	"CSeq: 1 OPTIONS\r\n" +
	"m: <sip:alice@10.0.0.2;transport=udp>;q=0.5\r\n" +
	"l: 4\r\n\r\nbody"

func with(t *testing.T, from, to string) string {
	t.Helper()
	if !strings.Contains(plain, from) {
		t.Fatalf("no %q in the message", from)
	}
	return strings.Replace(plain, from, to, 1)
}

// A message that nobody changes leaves as it came, however it is cut.
func TestFrameKeepsWhatItReads(t *testing.T) {
	for _, text := range []string{plain, with(t, "l: 4\r\n\r\nbody", "Content-Length:0\r\n\r\n"), "SIP/2.0 200 \r\n" + plain[len("OPTIONS sip:bob@203.0.113.10 SIP/2.0\r\n"):]} {
		for i := range len(text) {
			if m, n, err := cutMessage([]byte(text[:i])); m != nil || n != 0 || err != nil {
				t.Fatalf("%d bytes of it: %v, %d, %v", i, m, n, err)
			}
		}
		m, n, err := cutMessage([]byte(text + plain))
		if err != nil || n != len(text) {
			t.Fatalf("%q: %d, %v", text, n, err)
		}
		if got := string(m.bytes()); got != text {
			t.Errorf("got  %q\nwant %q", got, text)
		}
		if m, err := readDatagram([]byte(text + "trailing")); err != nil || string(m.bytes()) != text {
			t.Errorf("datagram: %v", err)
		}
	}
	v, err := (&message{headers: []header{{name: "via", value: "SIP / 2.0 / UDP 10.0.0.2 : 5060 ;branch=z9hG4bK1;rport, SIP/2.0/UDP 10.0.0.9"}}}).topVia()
	if err != nil || v.host != "10.0.0.2" || v.port != 5060 || v.branch() != "z9hG4bK1" {
		t.Errorf("via %+v, %v", v, err)
	}
}

func TestFrameRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"HTTP":                        "POST / HTTP/1.1\r\nHost: x\r\n\r\n",
		"HTTP with a URI":             "POST http://x/ HTTP/1.1\r\nHost: x\r\n\r\n",
		"TLS":                         "\x16\x03\x01\x02\x00\x01",
		"a NUL":                       "\x00",
		"SIP/1.0":                     with(t, "SIP/2.0", "SIP/1.0"),
		"lower case":                  strings.ToLower(plain),
		"no version":                  with(t, " SIP/2.0", ""),
		"a second version":            with(t, " SIP/2.0", " SIP/2.0 SIP/2.0"),
		"no URI":                      with(t, "sip:bob@203.0.113.10 ", ""),
		"a line ended by LF":          with(t, "i: 1@10.0.0.2\r\n", "i: 1@10.0.0.2\n"),
		"a CR alone":                  with(t, "i: 1@10.0.0.2\r\n", "i: 1\r@10.0.0.2\r\n"),
		"a NUL in a line":             with(t, "q=0.5", "q=\x00"),
		"a field without a colon":     with(t, "i: ", "i "),
		"a field before the fields":   with(t, "v: ", " v: "),
		"a space in a name":           with(t, "CSeq:", "CS eq:"),
		"no Content-Length":           with(t, "l: 4\r\n", ""),
		"a negative Content-Length":   with(t, "l: 4", "l: -4"),
		"a signed Content-Length":     with(t, "l: 4", "l: +4"),
		"a hexadecimal one":           with(t, "l: 4", "l: 0x4"),
		"Content-Length above 2^31":   with(t, "l: 4", "l: 2147483652"),
		"Content-Length above 2^32":   with(t, "l: 4", "l: 4294967300"),
		"Content-Length above 2^64":   with(t, "l: 4", "l: 18446744073709551620"),
		"an empty Content-Length":     with(t, "l: 4", "l: "),
		"Content-Length twice":        with(t, "l: 4", "l: 4\r\nContent-Length: 4"),
		"two different ones":          with(t, "l: 4", "l: 4\r\nContent-Length: 400"),
		"a list of them":              with(t, "l: 4", "l: 4, 4"),
		"two From":                    with(t, "t: ", "f: <sip:x@y>\r\nt: "),
		"two To":                      with(t, "t: ", "To: <sip:x@y>\r\nt: "),
		"two Call-ID":                 with(t, "i: ", "Call-ID: 2\r\ni: "),
		"two CSeq":                    with(t, "CSeq:", "CSeq: 2 OPTIONS\r\nCSeq:"),
		"no Call-ID":                  with(t, "i: 1@10.0.0.2\r\n", ""),
		"no Via":                      with(t, "v: ", "x-v: "),
		"no From":                     with(t, "f: ", "x-f: "),
		"no To":                       with(t, "t: ", "x-t: "),
		"the CSeq of another method":  with(t, "1 OPTIONS", "1 REGISTER"),
		"a CSeq above 2^31":           with(t, "1 OPTIONS", "2147483648 OPTIONS"),
		"a Call-ID with a space":      with(t, "i: 1@10.0.0.2", "i: 1 @10.0.0.2"),
		"a Via of something else":     with(t, "SIP / 2.0", "HTTP / 2.0"),
		"a Via without a host":        with(t, "10.0.0.2 : 5060 ", ""),
		"a Via with a broken port":    with(t, " : 5060 ", " : 70000 "),
		"a message that is too large": with(t, "l: 4", "l: 65530"),
		"a header that has no end":    with(t, "l: 4", "x: "+strings.Repeat("x", maxMessage)),
		"very many fields":            with(t, "l: 4", strings.Repeat("x: y\r\n", maxHeaders)+"l: 4"),
	} {
		if _, _, err := cutMessage([]byte(text)); !errors.Is(err, errNotSIP) {
			t.Errorf("%s: %v", name, err)
		}
		if name == "a NUL" || name == "no Content-Length" || name == "a message that is too large" {
			continue
		}
		if m, err := readDatagram([]byte(text)); !errors.Is(err, errNotSIP) {
			t.Errorf("%s in a datagram: %v, %v", name, m != nil, err)
		}
	}
	if _, err := readDatagram([]byte(with(t, "l: 4", "l: 5"))); !errors.Is(err, errNotSIP) {
		t.Errorf("a Content-Length beyond the datagram: %v", err)
	}
	for _, ping := range []string{"\r\n\r\n", "\r\n", "\x00\x00\x00\x00"} {
		if m, err := readDatagram([]byte(ping)); m != nil || err != nil {
			t.Errorf("keep-alive %q: %v, %v", ping, m, err)
		}
	}
	if m, n, err := cutMessage([]byte("\r\n\r\n" + plain)); m != nil || n != 4 || err != nil {
		t.Errorf("keep-alive in a stream: %v, %d, %v", m, n, err)
	}
}

func TestURI(t *testing.T) {
	at := "sip:203.0.113.1:61000"
	for text, want := range map[string]string{
		"sip:10.0.0.2": at, "sip:10.0.0.2:5070": at, "sip:a@10.0.0.2": "sip:a@203.0.113.1:61000",
		"sip:a:secret@10.0.0.2:5060;transport=tcp?x=y": "sip:a:secret@203.0.113.1:61000;transport=tcp?x=y",
		"SIP:a;b=c@10.0.0.2;lr":                        "SIP:a;b=c@203.0.113.1:61000;lr",
		"sip:[fd00:a::2]:5060":                         at,
		"sip:a@[fd00:a::2];x":                          "sip:a@203.0.113.1:61000;x",
	} {
		u, err := parseURI(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if got := u.at(ap("203.0.113.1:61000")); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	for _, text := range []string{
		"", "sip:", "sip", ":x", "sip:a@b@10.0.0.2", "sip:10.0.0.2:0", "sip:10.0.0.2:99999", "sip:10.0.0.2:5060x",
		"sip:[fd00::2", "sip:[10.0.0.2]", "sip:[fd00::2]x", "sip:fd00::2", "sip:a b@10.0.0.2", "sip:<10.0.0.2>", "sip:10.0.0.2:", "sip:[fe80::1%eth0]",
		"sip://10.0.0.2",
	} {
		if u, err := parseURI(text); err == nil {
			t.Errorf("%q is read as %+v", text, u)
		}
	}
}

func TestAddresses(t *testing.T) {
	list := splitList(`"a, \"<b" <sip:a,b@10.0.0.2>;x="1,2" , sip:c@10.0.0.3;expires=5,*`)
	want := []string{`"a, \"<b" <sip:a,b@10.0.0.2>;x="1,2"`, "sip:c@10.0.0.3;expires=5", "*"}
	if strings.Join(list, "|") != strings.Join(want, "|") {
		t.Fatalf("%q", list)
	}
	for i, uri := range []string{"sip:a,b@10.0.0.2", "sip:c@10.0.0.3"} {
		if a, err := parseAddress(list[i]); err != nil || a.uri != uri || a.String() != list[i] {
			t.Errorf("%q: %+v, %v", list[i], a, err)
		}
	}
	for _, bad := range []string{"", "<>", "<sip:a", `"a`, "sip:a b", `"a" b`, "sip:a?x"} {
		if a, err := parseAddress(bad); err == nil {
			t.Errorf("%q is read as %+v", bad, a)
		}
	}
}

// Cutting a message off never depends on what follows it, a beginning of it is
// never refused, and what was read is what is sent.
func FuzzMessage(f *testing.F) {
	for _, s := range []string{plain, "SIP/2.0 200 OK\r\n\r\n", "\r\n\r\n", "POST / HTTP/1.1\r\n\r\n", sdp("10.0.0.2", "4000")} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if m, err := readDatagram(in); err != nil && !errors.Is(err, errNotSIP) || m != nil && len(m.bytes()) > len(in)+64 {
			t.Fatalf("datagram %q: %v", in, err)
		}
		m, n, err := cutMessage(in)
		if err != nil {
			if n != 0 || !errors.Is(err, errNotSIP) {
				t.Fatalf("%q: %d, %v", in, n, err)
			}
			return
		}
		if m == nil {
			return
		}
		if !bytes.Equal(m.bytes(), in[:n]) && !bytes.Contains(in[:n], []byte("\r\n\r\n")) {
			t.Fatalf("%q\nis sent as\n%q", in[:n], m.bytes())
		}
		for i := range n {
			if m, k, err := cutMessage(in[:i]); err != nil || m != nil || k != 0 {
				t.Fatalf("%q is refused at byte %d: %v", in[:n], i, err)
			}
		}
		again, k, err := cutMessage(m.bytes())
		if err != nil || k != len(m.bytes()) || !bytes.Equal(again.body, m.body) {
			t.Fatalf("%q is not read again: %v", m.bytes(), err)
		}
	})
}

// What is changed in a URI is its host and port alone.
func FuzzURI(f *testing.F) {
	for _, s := range []string{"sip:a@10.0.0.2:5060;x?y", "sip:[::1]", "sips:a", "tel:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		u, err := parseURI(text)
		if err != nil || u.scheme != "sip" {
			return
		}
		again, err := parseURI(u.at(ap("203.0.113.1:61000")))
		if err != nil || again.before != u.before || again.after != u.after || again.host != "203.0.113.1" || again.port != 61000 {
			t.Fatalf("%q: %+v, again %+v, %v", text, u, again, err)
		}
	})
}
