package tftp

import (
	"errors"
	"strings"
	"testing"
)

// req is a request as a client writes it.
func req(op string, fields ...string) string {
	return "\x00" + op + strings.Join(fields, "\x00") + "\x00"
}

const (
	rrq = "\x01"
	wrq = "\x02"
)

func TestParseRequest(t *testing.T) {
	long := strings.Repeat("f", 512-len(req(rrq, "", "octet")))
	for _, c := range []struct {
		name, in string
		code     int // -1: it is a request
	}{
		{"read", req(rrq, "file", "octet"), -1},
		{"write", req(wrq, "file", "netascii"), -1},
		{"mode in any case", req(rrq, "file", "OcTeT"), -1},
		{"a path with spaces", req(rrq, "/a dir/..\\file", "octet"), -1},
		{"UTF-8", req(rrq, "caf\xc3\xa9", "octet"), -1},
		{"ISO 8859", req(rrq, "caf\xe9", "octet"), -1},
		{"512 bytes", req(rrq, long, "octet"), -1},
		{"all options", req(rrq, "f", "octet", "blksize", "65464", "timeout", "255", "tsize", "0", "windowsize", "65535"), -1},
		{"least values", req(wrq, "f", "octet", "BLKSIZE", "8", "TimeOut", "1", "tsize", "9223372036854775807", "windowsize", "1"), -1},
		{"an option of one's own", req(rrq, "f", "octet", "password", "with space", "blksize2", "1024"), -1},
		{"multicast has no value", req(rrq, "f", "octet", "multicast", ""), -1},

		{"nothing", "", 4},
		{"one byte", "\x00", 4},
		{"an opcode alone", "\x00\x01", 4},
		{"another opcode", req("\x07", "file", "octet"), 4},
		{"opcode in one byte", "\x01file\x00octet\x00", 4},
		{"513 bytes", req(rrq, long+"f", "octet"), 4},
		{"no file", req(rrq, "", "octet"), 4},
		{"no mode", "\x00\x01file\x00", 4},
		{"an empty mode", req(rrq, "file", ""), 4},
		{"mail", req(rrq, "user", "mail"), 4},
		{"a mode with more", req(rrq, "file", "octets"), 4},
		{"no end", "\x00\x01file\x00octet", 4},
		{"a zero more", req(rrq, "file", "octet") + "\x00", 4},
		{"a zero in the name", req(rrq, "fi\x00le", "octet"), 4},
		{"text behind", req(rrq, "file", "octet") + "x", 4},
		{"an option without a value", req(rrq, "file", "octet", "blksize"), 4},
		{"a line end in the name", req(rrq, "fi\r\nle", "octet"), 4},
		{"a control character of ISO 8859", req(rrq, "fi\x9ble", "octet"), 4},
		{"the same in UTF-8", req(rrq, "fi\xc2\x9ble", "octet"), 4},
		{"a delete", req(rrq, "fi\x7fle", "octet"), 4},
		{"STUN", "\x00\x01\x00\x08\x21\x12\xa4\x42abcdefghijkl", 4},

		{"blksize 7", req(rrq, "f", "octet", "blksize", "7"), 8},
		{"blksize 65465", req(rrq, "f", "octet", "blksize", "65465"), 8},
		{"timeout 0", req(rrq, "f", "octet", "timeout", "0"), 8},
		{"timeout 256", req(rrq, "f", "octet", "timeout", "256"), 8},
		{"windowsize 0", req(rrq, "f", "octet", "windowsize", "0"), 8},
		{"windowsize 65536", req(rrq, "f", "octet", "windowsize", "65536"), 8},
		{"tsize is negative", req(rrq, "f", "octet", "tsize", "-1"), 8},
		{"tsize is too large", req(rrq, "f", "octet", "tsize", "99999999999999999999"), 8},
		{"no number", req(rrq, "f", "octet", "blksize", ""), 8},
		{"a number with a sign", req(rrq, "f", "octet", "blksize", "+512"), 8},
		{"a number with a leading zero", req(rrq, "f", "octet", "blksize", "0512"), 8},
		{"a number with a space", req(rrq, "f", "octet", "blksize", "512 "), 8},
		{"twice", req(rrq, "f", "octet", "blksize", "512", "BlkSize", "512"), 8},
		{"an unknown one twice", req(rrq, "f", "octet", "x", "1", "x", "1"), 8},
		{"an option without a name", req(rrq, "f", "octet", "", "1"), 8},
		{"an option that is no text", req(rrq, "f", "octet", "x\x01", "1"), 8},
		{"a value that is no text", req(rrq, "f", "octet", "x", "\xff"), 8},
	} {
		r, err := parseRequest([]byte(c.in))
		var why *refusal
		switch {
		case c.code < 0 && err != nil, c.code >= 0 && (!errors.As(err, &why) || int(why.code) != c.code):
			t.Errorf("%s: %v, want %d", c.name, err, c.code)
		case c.code < 0 && !strings.Contains(c.in, "multicast") && string(r.message()) != c.in:
			t.Errorf("%s: %q becomes %q", c.name, c.in, r.message())
		}
	}
}

func TestMulticastIsTakenOut(t *testing.T) {
	in := req(rrq, "f", "octet", "blksize", "1024", "MultiCast", "", "tsize", "0")
	r, err := parseRequest([]byte(in))
	if want := req(rrq, "f", "octet", "blksize", "1024", "tsize", "0"); err != nil || string(r.message()) != want {
		t.Errorf("%q, %v, want %q", r.message(), err, want)
	}
}

func TestIsError(t *testing.T) {
	for in, want := range map[string]bool{
		"\x00\x05\x00\x01no\x00": true, "\x00\x05\x00\x00\x00": true,
		"\x00\x05\x00\x01" + strings.Repeat("x", 507) + "\x00": true,

		"": false, "\x00\x05": false, "\x00\x05\x00\x01": false, "\x00\x05\x00\x01no": false, "\x00\x05\x00\x01no\x00\x00": false,
		"\x00\x05\x00\x01n\x00o\x00": false, "\x00\x05\x00\x01\x00more": false,
		"\x00\x03\x00\x01no\x00": false, "\x00\x05\x00\x01" + strings.Repeat("x", 508) + "\x00": false,
	} {
		if isError([]byte(in)) != want {
			t.Errorf("%q: %v", in, !want)
		}
	}
}

func TestRefusalIsAnError(t *testing.T) {
	got := refuse(codeAccess, "no %s", "way").message()
	if want := "\x00\x05\x00\x02refused by the gateway: no way\x00"; string(got) != want || !isError(got) {
		t.Errorf("%q, want %q", got, want)
	}
}
