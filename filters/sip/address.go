package sip

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	library "github.com/emiago/sipgo/sip"
)

// errAddress: an address that is not exactly what RFC 3261 says, or that two
// parsers read differently.
var errAddress = errors.New("malformed address")

// address is one element of a Contact, From or To field:
//
//	before uri after
//	"Alice" <sip:alice@10.0.0.2:5060;transport=udp>;expires=60
type address struct{ before, uri, after string }

func (a address) String() string { return a.before + a.uri + a.after }

// parseAddress splits one element. Its URI must not be empty.
func parseAddress(s string) (address, error) {
	quoted := false
	open := -1
	for i := 0; i < len(s) && open < 0; i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case !quoted && s[i] == '<':
			open = i
		}
	}
	if open >= 0 {
		end := strings.IndexByte(s[open:], '>')
		if end <= 1 {
			return address{}, fmt.Errorf("%w: %.80q", errAddress, s)
		}
		return address{s[:open+1], s[open+1 : open+end], s[open+end:]}, nil
	}
	uri, _, params := strings.Cut(s, ";")
	if quoted || uri == "" || strings.ContainsAny(uri, "\"<> \t,?") {
		return address{}, fmt.Errorf("%w: %.80q", errAddress, s)
	}
	if !params {
		return address{uri: uri}, nil
	}
	return address{"", uri, s[len(uri):]}, nil
}

// splitList splits at the commas outside of quotes and angle brackets.
func splitList(s string) []string {
	var out []string
	quoted, inside, from := false, false, 0
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"' && !inside:
			quoted = !quoted
		case quoted:
		case s[i] == '<':
			inside = true
		case s[i] == '>':
			inside = false
		case s[i] == ',' && !inside:
			out = append(out, strings.Trim(s[from:i], " \t"))
			from = i + 1
		}
	}
	return append(out, strings.Trim(s[from:], " \t"))
}

// uri is a SIP URI, taken apart around what the gateway changes.
type uri struct {
	scheme string // sip or sips, in lower case; of any other the rest is empty
	before string // scheme and user
	host   string // an IPv6 address without its brackets
	port   uint16 // 0: not given
	after  string // parameters and headers
}

// parseURI reads a URI. The library must read the same host and port.
func parseURI(s string) (uri, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	u := uri{scheme: strings.ToLower(scheme)}
	if !ok || scheme == "" {
		return uri{}, fmt.Errorf("%w: %.80q", errAddress, s)
	}
	if u.scheme != "sip" && u.scheme != "sips" {
		return u, nil
	}
	at := strings.IndexByte(rest, '@')
	if strings.IndexByte(rest[at+1:], '@') >= 0 || strings.ContainsAny(s, " \t<>\"") {
		return uri{}, fmt.Errorf("%w: %.80q", errAddress, s)
	}
	u.before = s[:len(scheme)+1+at+1]
	hostport := rest[at+1:]
	if end := strings.IndexAny(hostport, ";?"); end >= 0 {
		hostport, u.after = hostport[:end], hostport[end:]
	}
	var err error
	if u.host, u.port, err = parseHostPort(hostport); err != nil {
		return uri{}, err
	}
	var same library.Uri
	if err := library.ParseUri(s, &same); err != nil {
		return uri{}, fmt.Errorf("%w: %w", errAddress, err)
	}
	if strings.Trim(same.Host, "[]") != u.host || same.Port != int(u.port) {
		return uri{}, fmt.Errorf("%w: %.80q is read in two ways", errAddress, s)
	}
	return u, nil
}

// parseHostPort reads a host with an optional port and nothing else.
func parseHostPort(s string) (host string, port uint16, err error) {
	bad := fmt.Errorf("%w: host %.80q", errAddress, s)
	host, digits := s, ""
	colon := false
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", 0, bad
		}
		host = s[1:end]
		if a, err := netip.ParseAddr(host); err != nil || !a.Is6() || a.Zone() != "" {
			return "", 0, bad
		}
		digits, colon = strings.CutPrefix(s[end+1:], ":")
		if !colon && s[end+1:] != "" {
			return "", 0, bad
		}
	} else {
		host, digits, colon = strings.Cut(s, ":")
		for i := range len(host) {
			if !isLetter(host[i]) && !isDigit(host[i]) && host[i] != '.' && host[i] != '-' && host[i] != '_' {
				return "", 0, bad
			}
		}
	}
	if host == "" {
		return "", 0, bad
	}
	if colon {
		n, ok := parseNumber(digits, 65535)
		if !ok || n == 0 {
			return "", 0, bad
		}
		port = uint16(n)
	}
	return host, port, nil
}

// addr is the address that the host names; invalid: it is a name.
func (u uri) addr() netip.Addr {
	a, err := netip.ParseAddr(u.host)
	if err != nil {
		return netip.Addr{}
	}
	return a.Unmap()
}

// portOr is the port, or the default of SIP.
func (u uri) portOr(p uint16) uint16 {
	if u.port == 0 {
		return p
	}
	return u.port
}

// defaultPort is that of SIP without TLS.
const defaultPort = 5060

// at is the URI with another host and port.
func (u uri) at(a netip.AddrPort) string { return u.before + a.String() + u.after }

// transport is the transport parameter in lower case, or empty.
func (u uri) transport() string {
	params, _, _ := strings.Cut(u.after, "?")
	t, _ := findParam(params, "transport")
	return strings.ToLower(t)
}

// findParam gives a parameter's value out of ";name=value;...". Whatever stands
// before the first semicolon is skipped.
func findParam(s, name string) (value string, ok bool) {
	for _, p := range splitParams(s) {
		n, v, _ := strings.Cut(p, "=")
		if strings.EqualFold(strings.Trim(n, " \t"), name) {
			return strings.Trim(v, " \t"), true
		}
	}
	return "", false
}

// splitParams splits at the semicolons outside of quotes, without the first
// part.
func splitParams(s string) []string {
	var out []string
	quoted, from := false, -1
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ';' && !quoted:
			if from >= 0 {
				out = append(out, s[from:i])
			}
			from = i + 1
		}
	}
	if from >= 0 {
		out = append(out, s[from:])
	}
	return out
}

// via is the topmost element of the Via fields.
type via struct {
	protocol string // SIP/2.0/UDP
	host     string
	port     uint16
	params   []string
	rest     string // further elements of the same field, with the comma
}

// topVia reads the topmost Via.
func (m *message) topVia() (via, error) {
	h := m.find("via")
	if h == nil {
		return via{}, notSIP("no via")
	}
	first := splitList(h.value)[0]
	v := via{rest: strings.TrimLeft(strings.TrimPrefix(h.value, first), " \t")}
	head, _, _ := strings.Cut(first, ";")
	v.params = splitParams(first)
	parts := strings.SplitN(head, "/", 3)
	if len(parts) != 3 || strings.Trim(parts[0], " \t") != "SIP" || strings.Trim(parts[1], " \t") != "2.0" {
		return via{}, notSIP("Via %.80q", first)
	}
	f := strings.Fields(parts[2])
	if len(f) < 2 || !isToken(f[0]) {
		return via{}, notSIP("Via %.80q", first)
	}
	v.protocol = "SIP/2.0/" + f[0]
	host, port, err := parseHostPort(strings.Join(f[1:], ""))
	if err != nil {
		return via{}, notSIP("Via %.80q", first)
	}
	v.host, v.port = host, port
	if len(v.branch()) > maxID {
		return via{}, notSIP("branch of more than %d bytes", maxID)
	}
	return v, nil
}

func (v via) param(name string) (string, bool) {
	for _, p := range v.params {
		n, value, _ := strings.Cut(p, "=")
		if strings.EqualFold(strings.Trim(n, " \t"), name) {
			return strings.Trim(value, " \t"), true
		}
	}
	return "", false
}

func (v via) branch() string {
	b, _ := v.param("branch")
	return b
}

// setParam sets a parameter; an empty value takes it away.
func (v *via) setParam(name, value string) {
	out := make([]string, 0, len(v.params)+1)
	done := value == ""
	for _, p := range v.params {
		n, _, _ := strings.Cut(p, "=")
		switch {
		case !strings.EqualFold(strings.Trim(n, " \t"), name):
			out = append(out, p)
		case !done:
			out, done = append(out, name+"="+value), true
		}
	}
	if !done {
		out = append(out, name+"="+value)
	}
	v.params = out
}

func (v via) String() string {
	var b strings.Builder
	b.WriteString(v.protocol + " ")
	if strings.Contains(v.host, ":") {
		b.WriteString("[" + v.host + "]")
	} else {
		b.WriteString(v.host)
	}
	if v.port != 0 {
		b.WriteString(":" + strconv.Itoa(int(v.port)))
	}
	for _, p := range v.params {
		b.WriteString(";" + p)
	}
	return b.String() + v.rest
}

// setVia replaces the topmost Via.
func (m *message) setVia(v via) { m.find("via").set(v.String()) }
