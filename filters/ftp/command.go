package ftp

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxLine bounds a line in either direction, in bytes with its end. RFC 959
// sets no limit; the longest path of a system is about this long.
const maxLine = 4096

// errNotFTP: the stream is not the protocol. What stands in the text names the
// reason.
var errNotFTP = errors.New("not FTP")

// command is one line of the client's.
type command struct {
	raw    []byte // as received, with the line's end
	telnet int    // bytes of Telnet controls at its beginning
	verb   string // upper case; empty: an empty line
	arg    string // after the first space
	crlf   bool   // ended by CR LF, not by LF alone
}

// line is what a server should see. The Telnet controls before an ABOR mean
// nothing without TCP's urgent pointer, and not every server skips them.
func (c command) line() []byte { return c.raw[c.telnet:] }

// cutCommand takes the first command off in and gives its length; 0: it is not
// complete yet. An error, which wraps errNotFTP, comes with the first byte that
// cannot be part of the protocol, whether or not the line is complete.
func cutCommand(in []byte, classOf func(verb string) class) (command, int, error) {
	end := bytes.IndexByte(in, '\n')
	complete := end >= 0
	text := in
	if complete {
		text = in[:end]
	}
	if len(text) >= maxLine {
		return command{}, 0, fmt.Errorf("%w: line of more than %d bytes", errNotFTP, maxLine)
	}
	cmd := command{}
	if complete {
		cmd.raw = in[: end+1 : end+1]
		text, cmd.crlf = bytes.CutSuffix(text, []byte("\r"))
	}
	for cmd.telnet < len(text) && text[cmd.telnet] >= telnetSE {
		cmd.telnet++
	}
	text = text[cmd.telnet:]
	verb, rest, closed := cutVerb(text, complete)
	if err := checkVerb(verb, closed, complete, cmd.telnet, classOf); err != nil {
		return command{}, 0, err
	}
	if len(verb) == 0 && len(bytes.TrimSuffix(rest, []byte("\r"))) > 0 {
		return command{}, 0, fmt.Errorf("%w: byte 0x%02x where a command should be", errNotFTP, rest[0])
	}
	if err := checkText(rest, complete); err != nil {
		return command{}, 0, err
	}
	if !complete {
		return command{}, 0, nil
	}
	cmd.verb = strings.ToUpper(string(verb))
	cmd.arg = strings.TrimPrefix(string(rest), " ")
	return cmd, end + 1, nil
}

// Telnet's commands (RFC 854) are the bytes from SE to IAC. Before ABOR, STAT
// and QUIT a client sends IAC IP, IAC DM (RFC 959, 4.1.3); one of these bytes
// is urgent data and may be missing from the stream.
const (
	telnetSE  = 0xf0
	telnetIAC = 0xff
	maxTelnet = 8
)

// cutVerb splits before the first byte that no verb has. closed: there is such
// a byte, or the line ends, so that the verb is whole.
func cutVerb(text []byte, complete bool) (verb, rest []byte, closed bool) {
	for i, b := range text {
		if !isLetter(b) && !isDigit(b) {
			return text[:i], text[i:], true
		}
	}
	return text, nil, complete
}

func checkVerb(verb []byte, closed, complete bool, telnet int, classOf func(string) class) error {
	up := strings.ToUpper(string(verb))
	switch {
	case telnet > maxTelnet:
		return fmt.Errorf("%w: more than %d Telnet controls", errNotFTP, maxTelnet)
	case len(verb) > maxVerb, len(verb) > 0 && !isLetter(verb[0]):
		return fmt.Errorf("%w: %.12q is no command", errNotFTP, verb)
	case !closed, complete && up == "" && telnet == 0:
		return nil
	case telnet > 0 && up != "ABOR" && up != "STAT" && up != "QUIT":
		return fmt.Errorf("%w: Telnet controls before %q", errNotFTP, verb)
	case up != "" && classOf(up) == unknown:
		return fmt.Errorf("%w: unknown command %q", errNotFTP, verb)
	}
	return nil
}

// checkText looks at what follows a verb. A complete text has lost its line
// end. Path names are UTF-8 (RFC 2640) or, from older clients, any bytes but
// controls.
func checkText(b []byte, complete bool) error {
	if !complete {
		b = bytes.TrimSuffix(b, []byte("\r"))
	}
	if len(b) > 0 && b[0] != ' ' {
		return fmt.Errorf("%w: byte 0x%02x where a space should be", errNotFTP, b[0])
	}
	for i := 0; i < len(b); {
		if !complete && !utf8.FullRune(b[i:]) {
			return nil
		}
		r, n := utf8.DecodeRune(b[i:])
		wide := n > 1
		switch {
		case wide && r < 0xa0, !wide && isControl(b[i]):
			return fmt.Errorf("%w: byte 0x%02x in a line", errNotFTP, b[i])
		case b[i] == telnetIAC:
			// Telnet's way to write the byte 255 is twice; anything else
			// would be a Telnet command, which a server might swallow
			// together with the line's end.
			if i+1 == len(b) && !complete {
				return nil
			}
			if i+1 == len(b) || b[i+1] != telnetIAC {
				return fmt.Errorf("%w: Telnet command inside a line", errNotFTP)
			}
			n = 2
		}
		i += n
	}
	return nil
}

func isControl(b byte) bool {
	return b < 0x20 && b != '\t' || 0x7f <= b && b < 0xa0
}

// errSyntax: the argument of a command or the address in a reply is not what
// its RFC says.
var errSyntax = errors.New("syntax error")

// errFamily: EPRT for the other address family, or for none that there is.
var errFamily = errors.New("network protocol not supported")

// parsePort reads h1,h2,h3,h4,p1,p2 (RFC 959, 4.1.2) and nothing else.
func parsePort(s string) (netip.AddrPort, error) {
	parts := strings.Split(s, ",")
	if len(parts) != 6 {
		return netip.AddrPort{}, errSyntax
	}
	var b [6]byte
	for i, p := range parts {
		n, err := parseNumber(p, 255)
		if err != nil {
			return netip.AddrPort{}, err
		}
		b[i] = byte(n)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), uint16(b[4])<<8|uint16(b[5])), nil
}

// parseNumber reads a decimal number without sign and leading zeros, which
// some servers take for octal.
func parseNumber(s string, most int) (int, error) {
	if s == "" || len(s) > 5 || len(s) > 1 && s[0] == '0' {
		return 0, errSyntax
	}
	n := 0
	for i := range len(s) {
		if !isDigit(s[i]) {
			return 0, errSyntax
		}
		n = n*10 + int(s[i]-'0')
	}
	if n > most {
		return 0, errSyntax
	}
	return n, nil
}

func formatPort(a netip.AddrPort) string {
	h, p := a.Addr().As4(), a.Port()
	return fmt.Sprintf("%d,%d,%d,%d,%d,%d", h[0], h[1], h[2], h[3], p>>8, p&0xff)
}

// parseEprt reads |family|address|port| (RFC 2428, 2) with any delimiter that
// cannot be part of the fields. is4 is the control connection's family.
func parseEprt(s string, is4 bool) (netip.AddrPort, error) {
	if len(s) < 2 || !isDelimiter(s[0]) {
		return netip.AddrPort{}, errSyntax
	}
	parts := strings.Split(s, s[:1])
	if len(parts) != 5 || parts[0] != "" || parts[4] != "" {
		return netip.AddrPort{}, errSyntax
	}
	family, err := parseNumber(parts[1], 65535)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if family != familyOf(is4) {
		return netip.AddrPort{}, errFamily
	}
	addr, err := netip.ParseAddr(parts[2])
	if err != nil || addr.Is4() != is4 || addr.Zone() != "" {
		return netip.AddrPort{}, errSyntax
	}
	port, err := parseNumber(parts[3], 65535)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(addr, uint16(port)), nil
}

// familyOf gives the number of RFC 2428.
func familyOf(is4 bool) int {
	if is4 {
		return 1
	}
	return 2
}

func formatEprt(a netip.AddrPort) string {
	return "|" + strconv.Itoa(familyOf(a.Addr().Is4())) + "|" + a.Addr().String() + "|" + strconv.Itoa(int(a.Port())) + "|"
}

func isDelimiter(b byte) bool {
	return 33 <= b && b <= 126 && !isLetter(b) && !isDigit(b) && b != '.' && b != ':' && b != '%'
}
