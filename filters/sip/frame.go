package sip

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// maxMessage bounds a message, in bytes: what a UDP datagram can carry.
const maxMessage = 65535

// maxMethod bounds the name of a method, in bytes.
const maxMethod = 32

// errNotSIP: the stream or the datagram is not the protocol. What stands in
// the text names the reason.
var errNotSIP = errors.New("not SIP")

func notSIP(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errNotSIP}, args...)...)
}

// cutMessage takes the first message off a stream and gives its length; 0: it
// is not complete yet. A nil message with a length is a keep-alive (RFC 5626,
// 3.5.1). An error, which wraps errNotSIP, comes as soon as the beginning of a
// message cannot become one.
func cutMessage(in []byte) (*message, int, error) {
	if n := leadingLines(in); n > 0 {
		return nil, n, nil
	}
	if err := checkStart(in); err != nil {
		return nil, 0, err
	}
	end := bytes.Index(in, []byte("\r\n\r\n"))
	if end < 0 {
		if len(in) >= maxMessage {
			return nil, 0, notSIP("header of more than %d bytes", maxMessage)
		}
		return nil, 0, nil
	}
	m, err := parseHead(in[:end+2])
	if err != nil {
		return nil, 0, err
	}
	size, given, err := m.contentLength()
	switch {
	case err != nil:
		return nil, 0, err
	case !given:
		return nil, 0, notSIP("no Content-Length in a stream")
	case end+4+size > maxMessage:
		return nil, 0, notSIP("message of more than %d bytes", maxMessage)
	case len(in) < end+4+size:
		return nil, 0, nil
	}
	m.body = in[end+4 : end+4+size : end+4+size]
	return m, end + 4 + size, nil
}

// readDatagram reads a datagram, which is one message. nil without an error: a
// keep-alive. What stands behind the body is not part of it (RFC 3261, 18.3)
// and goes no further.
func readDatagram(in []byte) (*message, error) {
	if len(bytes.Trim(in, "\r\n\x00")) == 0 && len(in) <= maxPing {
		return nil, nil
	}
	if err := checkStart(in); err != nil {
		return nil, err
	}
	end := bytes.Index(in, []byte("\r\n\r\n"))
	if end < 0 || len(in) > maxMessage {
		return nil, notSIP("header without an end")
	}
	m, err := parseHead(in[:end+2])
	if err != nil {
		return nil, err
	}
	size, given, err := m.contentLength()
	rest := in[end+4:]
	switch {
	case err != nil:
		return nil, err
	case !given:
		size = len(rest)
	case size > len(rest):
		return nil, notSIP("Content-Length %d, but %d bytes follow", size, len(rest))
	}
	m.body = rest[:size:size]
	return m, nil
}

// maxPing bounds a keep-alive datagram: empty lines, or the zero bytes that
// some telephones send.
const maxPing = 8

// leadingLines is the length of the empty lines at the beginning.
func leadingLines(in []byte) int {
	n := 0
	for n+1 < len(in) && in[n] == '\r' && in[n+1] == '\n' {
		n += 2
	}
	return n
}

// checkStart refuses what cannot become a start line, as early as it shows.
func checkStart(in []byte) error {
	if len(in) == 1 && in[0] == '\r' {
		return nil
	}
	line, _, complete := bytes.Cut(in, []byte("\r\n"))
	if !complete {
		line = bytes.TrimSuffix(line, []byte("\r")) // its end may be cut in two
	}
	first, rest, spaced := bytes.Cut(line, []byte(" "))
	const version = "SIP/2.0"
	if n := min(len(first), len(version)); n > 3 && strings.EqualFold(string(first[:4]), "SIP/") {
		if string(first[:n]) != version[:n] || len(first) > len(version) || (spaced || complete) && len(first) < len(version) {
			return notSIP("version %.16q", first)
		}
		return checkStatus(rest, complete)
	}
	if len(first) > maxMethod {
		return notSIP("%.40q is no method", first)
	}
	for _, b := range first {
		if !isUpper(b) && b != '-' && b != '_' && b != '.' {
			return notSIP("%.40q is no method", first)
		}
	}
	switch {
	case len(first) == 0 && (spaced || complete), complete && !spaced:
		return notSIP("%.40q is no request", line)
	case !spaced:
		return nil
	}
	return checkRequestLine(rest, complete)
}

// checkStatus looks at what follows the version in a status line.
func checkStatus(rest []byte, complete bool) error {
	for i := range min(len(rest), 3) {
		if !isDigit(rest[i]) || i == 0 && (rest[0] < '1' || rest[0] > '6') {
			return notSIP("%.8q is no status", rest)
		}
	}
	if len(rest) > 3 && rest[3] != ' ' || complete && len(rest) < 3 {
		return notSIP("%.8q is no status", rest)
	}
	return checkLine(rest)
}

// checkRequestLine looks at what follows the method.
func checkRequestLine(rest []byte, complete bool) error {
	uri, version, spaced := bytes.Cut(rest, []byte(" "))
	scheme, _, colon := bytes.Cut(uri, []byte(":"))
	for i, b := range scheme {
		if !isLetter(b) && (i == 0 || !isDigit(b) && b != '+' && b != '-' && b != '.') {
			return notSIP("%.40q is no request URI", uri)
		}
	}
	if (spaced || complete) && (!colon || len(scheme) == 0) {
		return notSIP("%.40q is no request URI", uri)
	}
	const want = "SIP/2.0"
	if complete && !spaced || spaced && (len(version) > len(want) || string(version) != want[:len(version)] || complete && len(version) < len(want)) {
		return notSIP("version %.16q", version)
	}
	return checkLine(uri)
}

// checkLine refuses control characters: a CR or LF alone among them.
func checkLine(b []byte) error {
	for _, c := range b {
		if c < 0x20 && c != '\t' || c == 0x7f {
			return notSIP("byte 0x%02x in a line", c)
		}
	}
	return nil
}

// parseHead reads the start line and the header fields; head ends with the
// CR LF of the last one.
func parseHead(head []byte) (*message, error) {
	line, rest, _ := bytes.Cut(head, []byte("\r\n"))
	m := &message{}
	if err := m.parseStart(string(line)); err != nil {
		return nil, err
	}
	for len(rest) > 0 {
		n, err := fieldLength(rest)
		if err != nil {
			return nil, err
		}
		h, err := parseField(rest[:n])
		if err != nil {
			return nil, err
		}
		m.headers = append(m.headers, h)
		rest = rest[n:]
	}
	if len(m.headers) > maxHeaders {
		return nil, notSIP("more than %d header fields", maxHeaders)
	}
	return m, m.check()
}

const maxHeaders = 256

// fieldLength is the length of the first field with its continuation lines.
func fieldLength(in []byte) (int, error) {
	n := 0
	for {
		i := bytes.Index(in[n:], []byte("\r\n"))
		if i < 0 {
			return 0, notSIP("line without an end")
		}
		line := in[n : n+i]
		if err := checkLine(line); err != nil {
			return 0, err
		}
		n += i + 2
		if n == len(in) || in[n] != ' ' && in[n] != '\t' {
			return n, nil
		}
	}
}

func parseField(raw []byte) (header, error) {
	name, value, ok := strings.Cut(string(raw), ":")
	written := strings.TrimRight(name, " \t")
	if !ok || written == "" || !isToken(written) {
		return header{}, notSIP("%.40q is no header field", raw)
	}
	var b strings.Builder
	for line := range strings.SplitSeq(strings.TrimSuffix(value, "\r\n"), "\r\n") {
		if line = strings.Trim(line, " \t"); line != "" {
			if b.Len() > 0 {
				b.WriteByte(' ')
			}
			b.WriteString(line)
		}
	}
	long := strings.ToLower(written)
	if full, ok := compact[long]; ok {
		long = full
	}
	return header{name: long, written: written, value: b.String(), raw: raw}, nil
}

// compact are the short forms of header names.
var compact = map[string]string{
	"a": "accept-contact", "b": "referred-by", "c": "content-type", "d": "request-disposition", "e": "content-encoding",
	"f": "from", "i": "call-id", "j": "reject-contact", "k": "supported", "l": "content-length", "m": "contact",
	"n": "identity-info", "o": "event", "r": "refer-to", "s": "subject", "t": "to", "u": "allow-events", "v": "via",
	"x": "session-expires", "y": "identity",
}

// parseNumber reads a decimal number of at most ten digits without a sign.
func parseNumber(s string, most int64) (int64, bool) {
	if s == "" || len(s) > 10 {
		return 0, false
	}
	for i := range len(s) {
		if !isDigit(s[i]) {
			return 0, false
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n <= most
}

func isToken(s string) bool {
	for i := range len(s) {
		if !isLetter(s[i]) && !isDigit(s[i]) && strings.IndexByte("-.!%*_+`'~", s[i]) < 0 {
			return false
		}
	}
	return s != ""
}

func isUpper(b byte) bool  { return 'A' <= b && b <= 'Z' }
func isLetter(b byte) bool { return 'A' <= b&^0x20 && b&^0x20 <= 'Z' }
func isDigit(b byte) bool  { return '0' <= b && b <= '9' }
