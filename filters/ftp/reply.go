package ftp

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
)

// replyLine is one line of the server's.
type replyLine struct {
	raw  []byte // as received, with the line's end
	code int    // 100-599; inside a multi-line reply that of its first line
	last bool   // the reply ends with this line
}

// text is what follows the code, without the line's end.
func (l replyLine) text() string {
	s := strings.TrimRight(string(l.raw), "\r\n")
	if len(s) < 4 {
		return ""
	}
	return s[4:]
}

// cutReply takes the first line of a reply off in and gives its length; 0: it
// is not complete yet. open is the code of the multi-line reply that the line
// belongs to (RFC 959, 4.2), 0 if a new reply begins. An error, which wraps
// errNotFTP, comes with the first byte that cannot be part of a reply.
func cutReply(in []byte, open int) (replyLine, int, error) {
	end := bytes.IndexByte(in, '\n')
	complete := end >= 0
	text := in
	if complete {
		text = in[:end]
	}
	if len(text) >= maxLine {
		return replyLine{}, 0, fmt.Errorf("%w: reply line of more than %d bytes", errNotFTP, maxLine)
	}
	// Some servers end a line with CR CR LF.
	text = bytes.TrimRight(text, "\r")
	if open == 0 {
		if err := checkReply(text, complete); err != nil {
			return replyLine{}, 0, err
		}
	} else if bytes.IndexByte(text, 0) >= 0 {
		// A line inside a reply may be anything: a listing, a licence.
		return replyLine{}, 0, fmt.Errorf("%w: byte 0x00 in a reply", errNotFTP)
	}
	if !complete {
		return replyLine{}, 0, nil
	}
	line := replyLine{raw: in[: end+1 : end+1], code: open}
	if open == 0 {
		line.code = replyCode(text)
		line.last = len(text) == 3 || text[3] == ' '
	} else {
		line.last = len(text) >= 3 && replyCode(text) == open && (len(text) == 3 || text[3] == ' ')
	}
	return line, end + 1, nil
}

// replyCode reads three digits; 0 if they are none.
func replyCode(text []byte) int {
	if len(text) < 3 || !isDigit(text[0]) || !isDigit(text[1]) || !isDigit(text[2]) {
		return 0
	}
	return int(text[0]-'0')*100 + int(text[1]-'0')*10 + int(text[2]-'0')
}

// checkReply looks at the first line of a reply, or at its beginning. The code
// may stand alone.
func checkReply(text []byte, complete bool) error {
	for i := range min(len(text), 3) {
		if !isDigit(text[i]) || i == 0 && (text[0] < '1' || text[0] > '5') {
			return fmt.Errorf("%w: %.12q is no reply", errNotFTP, text)
		}
	}
	switch {
	case len(text) < 3 && complete:
		return fmt.Errorf("%w: %q is no reply", errNotFTP, text)
	case len(text) <= 3:
		return nil
	}
	rest := text[3:]
	if rest[0] == '-' {
		rest = append([]byte{' '}, rest[1:]...)
	}
	return checkText(rest, complete)
}

// findAddress finds h1,h2,h3,h4,p1,p2 in the text of a 227 reply. RFC 1123,
// 4.1.2.6: whatever stands around it, the address begins with the first digit.
// There must be no other digits, so that no client can read another address.
// from and to are its place.
func findAddress(text string) (a netip.AddrPort, from, to int, err error) {
	from = strings.IndexFunc(text, func(r rune) bool { return '0' <= r && r <= '9' })
	if from < 0 {
		return a, 0, 0, errSyntax
	}
	to = from
	for to < len(text) && (isDigit(text[to]) || text[to] == ',') {
		to++
	}
	if from > 0 && strings.IndexByte("+-.,", text[from-1]) >= 0 || strings.ContainsAny(text[to:], "0123456789") {
		return a, 0, 0, errSyntax
	}
	a, err = parsePort(text[from:to])
	return a, from, to, err
}

// findPort finds (|||port|) in the text of a 229 reply (RFC 2428, 3).
func findPort(text string) (uint16, error) {
	_, inner, ok := strings.Cut(text, "(")
	inner, after, closed := strings.Cut(inner, ")")
	if !ok || !closed || strings.Contains(after, "(") || len(inner) < 5 || !isDelimiter(inner[0]) {
		return 0, errSyntax
	}
	d := inner[:1]
	parts := strings.Split(inner, d)
	if len(parts) != 5 || parts[0]+parts[1]+parts[2]+parts[4] != "" {
		return 0, errSyntax
	}
	port, err := parseNumber(parts[3], 65535)
	return uint16(port), err
}
