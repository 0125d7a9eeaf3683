package sip

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// errSDP: a session description that is not exactly what RFC 8866 says.
var errSDP = errors.New("malformed session description")

// maxMedia bounds the media lines of one description.
const maxMedia = 16

// description is a session description, line by line. What is not changed
// leaves as it came, so that the gateway needs to know no codec and no
// attribute but those that name addresses.
type description struct {
	lines  []sdpLine
	origin int // index of o=
	conn   int // index of the session's c=, or -1
	media  []*mediaLine
}

type sdpLine struct {
	text   string
	gone   bool
	insert []string // lines to follow
}

// mediaLine is one m= and what belongs to it.
type mediaLine struct {
	at     int // index of m=
	conn   int // index of its own c=, or -1
	rtcp   int // index of a=rtcp, or -1
	fields []string
	port   uint16
	ranged bool // port/n
}

// parseSDP reads a description.
func parseSDP(body []byte) (*description, error) {
	text := strings.TrimRight(string(body), "\r\n")
	d := &description{origin: -1, conn: -1}
	var m *mediaLine
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSuffix(line, "\r")
		if len(line) < 2 || line[1] != '=' || line[0] < 'a' || line[0] > 'z' || strings.ContainsAny(line, "\r\x00") {
			return nil, fmt.Errorf("%w: line %.40q", errSDP, line)
		}
		if (i == 0) != (line[0] == 'v') || i == 0 && line != "v=0" {
			return nil, fmt.Errorf("%w: line %.40q", errSDP, line)
		}
		d.lines = append(d.lines, sdpLine{text: line})
		var err error
		if m, err = d.note(i, line, m); err != nil {
			return nil, err
		}
	}
	if d.origin < 0 || len(d.media) > maxMedia {
		return nil, fmt.Errorf("%w: no origin, or more than %d media", errSDP, maxMedia)
	}
	return d, nil
}

// note remembers a line that may name an address. m is the media that the line
// belongs to, or nil.
func (d *description) note(i int, line string, m *mediaLine) (*mediaLine, error) {
	twice := fmt.Errorf("%w: %.40q twice", errSDP, line)
	switch {
	case line[0] == 'm':
		m, err := parseMedia(i, line[2:])
		if err != nil {
			return nil, err
		}
		d.media = append(d.media, m)
		return m, nil
	case line[0] == 'o':
		if d.origin >= 0 || m != nil || len(strings.Fields(line[2:])) != 6 {
			return nil, twice
		}
		d.origin = i
	case line[0] == 'c' && m == nil:
		if d.conn >= 0 {
			return nil, twice
		}
		d.conn = i
	case line[0] == 'c':
		if m.conn >= 0 {
			return nil, twice
		}
		m.conn = i
	case strings.HasPrefix(line, "a=rtcp:") && m != nil:
		if m.rtcp >= 0 {
			return nil, twice
		}
		m.rtcp = i
	case hidden(line):
		d.lines[i].gone = true
	}
	return m, nil
}

// hidden are attributes that name further addresses, or join streams so that
// other ports than those of the media lines are used: nothing is opened for
// them, so nobody shall try.
func hidden(line string) bool {
	for _, name := range []string{
		"candidate:", "remote-candidates:", "end-of-candidates", "ice-ufrag:", "ice-pwd:", "ice-options:", "ice-lite",
		"ice-mismatch", "ice-pacing:", "group:BUNDLE", "altc:",
	} {
		if strings.HasPrefix(line, "a="+name) {
			return true
		}
	}
	return false
}

func parseMedia(i int, text string) (*mediaLine, error) {
	f := strings.Split(text, " ")
	bad := fmt.Errorf("%w: m=%.40q", errSDP, text)
	if len(f) < 4 || slices.Contains(f[:3], "") {
		return nil, bad
	}
	port, count, ranged := strings.Cut(f[1], "/")
	n, ok := parseNumber(port, 65535)
	if !ok {
		return nil, bad
	}
	if ranged {
		c, ok := parseNumber(count, 65535)
		if !ok || c == 0 {
			return nil, bad
		}
		ranged = c > 1
	}
	return &mediaLine{at: i, conn: -1, rtcp: -1, fields: f, port: uint16(n), ranged: ranged}, nil
}

// endpoints are the addresses of one media stream. rtcp is invalid for a stream
// of one port.
type endpoints struct{ rtp, rtcp netip.AddrPort }

// Reasons why a media line cannot be opened; empty: it can.
const (
	noSuchTransport = "its transport is not UDP"
	noSuchPorts     = "it names several ports"
	noSuchAddress   = "it names no plain address"
)

// endpoints reads where the media of a line is to be sent. why says that it
// cannot be opened.
func (d *description) endpoints(m *mediaLine) (e endpoints, why string) {
	proto := strings.ToUpper(m.fields[2])
	pair := strings.Contains(proto, "RTP/") && !strings.HasPrefix(proto, "TCP")
	switch {
	case !pair && !strings.HasPrefix(proto, "UDP") && proto != "DTLS/SCTP":
		return e, noSuchTransport
	case m.ranged:
		return e, noSuchPorts
	}
	at := d.conn
	if m.conn >= 0 {
		at = m.conn
	}
	if at < 0 {
		return e, noSuchAddress
	}
	a, ok := parseConn(d.lines[at].text[2:])
	if !ok {
		return e, noSuchAddress
	}
	e.rtp = netip.AddrPortFrom(a, m.port)
	if !pair {
		return e, ""
	}
	e.rtcp = netip.AddrPortFrom(a, m.port+1)
	if m.rtcp >= 0 {
		port, where, named := strings.Cut(strings.TrimPrefix(d.lines[m.rtcp].text, "a=rtcp:"), " ")
		n, ok := parseNumber(port, 65535)
		if ok && named {
			a, ok = parseConn(where)
		}
		if !ok {
			return e, noSuchAddress
		}
		e.rtcp = netip.AddrPortFrom(a, uint16(n))
	}
	if e.rtcp.Port() == 0 {
		return e, noSuchPorts
	}
	return e, ""
}

// parseConn reads "IN IP4 address" and nothing else.
func parseConn(s string) (netip.Addr, bool) {
	f := strings.Split(strings.TrimRight(s, " "), " ")
	if len(f) != 3 || f[0] != "IN" {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(f[2])
	if err != nil || a.Zone() != "" || a.Is4In6() || a.Is4() != (f[1] == "IP4") || a.Is6() != (f[1] == "IP6") {
		return netip.Addr{}, false
	}
	return a, true
}

func formatConn(a netip.Addr) string {
	if a.Is4() {
		return "IN IP4 " + a.String()
	}
	return "IN IP6 " + a.String()
}

// setPorts writes other ports into a media line.
func (d *description) setPorts(m *mediaLine, e endpoints) {
	m.port = e.rtp.Port()
	m.fields[1] = strconv.Itoa(int(m.port))
	d.lines[m.at].text = "m=" + strings.Join(m.fields, " ")
	if !e.rtcp.IsValid() {
		return
	}
	want := fmt.Sprintf("a=rtcp:%d", e.rtcp.Port())
	switch {
	case m.rtcp >= 0:
		if strings.Contains(d.lines[m.rtcp].text, " ") {
			want += " " + formatConn(e.rtcp.Addr())
		}
		d.lines[m.rtcp].text = want
	case e.rtcp.Port() != e.rtp.Port()+1:
		last := &d.lines[d.end(m)]
		last.insert = append(last.insert, want)
	}
}

// end is the index of the last line that belongs to a media line.
func (d *description) end(m *mediaLine) int {
	for i, x := range d.media {
		if x == m && i+1 < len(d.media) {
			return d.media[i+1].at - 1
		}
	}
	return len(d.lines) - 1
}

// setAddress writes another address for a media line.
func (d *description) setAddress(m *mediaLine, a netip.Addr) {
	if m.conn >= 0 {
		d.lines[m.conn].text = "c=" + formatConn(a)
		return
	}
	// It stands behind m= and i= and before all others.
	at := m.at
	for at < d.end(m) && d.lines[at+1].text[0] == 'i' {
		at++
	}
	d.lines[at].insert = append([]string{"c=" + formatConn(a)}, d.lines[at].insert...)
}

// disable refuses the stream of a media line (RFC 3264, 6).
func (d *description) disable(m *mediaLine) {
	m.port = 0
	m.fields[1] = "0"
	d.lines[m.at].text = "m=" + strings.Join(m.fields, " ")
	if m.rtcp >= 0 {
		d.lines[m.rtcp].gone = true
	}
}

// hide writes another address where the session as a whole names one: that of
// the origin, and of the streams without an address of their own.
func (d *description) hide(from, to netip.Addr) {
	f := strings.Fields(d.lines[d.origin].text[2:])
	if f[5] == from.String() {
		f[5] = to.String()
		d.lines[d.origin].text = "o=" + strings.Join(f, " ")
	}
	if d.conn < 0 {
		return
	}
	if a, ok := parseConn(d.lines[d.conn].text[2:]); ok && a == from {
		d.lines[d.conn].text = "c=" + formatConn(to)
	}
}

func (d *description) bytes() []byte {
	var b strings.Builder
	for _, l := range d.lines {
		if !l.gone {
			b.WriteString(l.text + "\r\n")
		}
		for _, text := range l.insert {
			b.WriteString(text + "\r\n")
		}
	}
	return []byte(b.String())
}
