package tftp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// opcode is the first field of every message (RFC 1350, 5; RFC 2347).
type opcode uint16

const (
	opRead opcode = iota + 1
	opWrite
	opData
	opAck
	opError
	opOptions
)

// The error codes that the gateway uses (RFC 1350, appendix; RFC 2347).
const (
	codeUndefined = 0
	codeAccess    = 2
	codeIllegal   = 4
	codeTransfer  = 5
	codeOption    = 8
)

// maxMessage is the size of the largest request (RFC 2347), and of the largest
// message that is no data without options (RFC 1350).
const maxMessage = 512

// refusal is a TFTP error as the gateway tells it.
type refusal struct {
	code uint16
	text string
}

func (r *refusal) Error() string { return r.text }

func refuse(code uint16, format string, args ...any) *refusal {
	return &refusal{code, fmt.Sprintf(format, args...)}
}

// message is the datagram that tells the client.
func (r *refusal) message() []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(opError))
	b = binary.BigEndian.AppendUint16(b, r.code)
	return append(append(b, "refused by the gateway: "+r.text...), 0)
}

// request is a read or write request. It shares the memory of its datagram.
type request struct {
	op      opcode
	file    string
	mode    string // netascii or octet, as it was written
	options []option
}

type option struct{ name, value string }

func (o opcode) String() string {
	switch o {
	case opRead:
		return "read"
	case opWrite:
		return "write"
	}
	return "opcode " + strconv.Itoa(int(o))
}

// opcodeOf is the opcode of a datagram; false: it is too short to have one.
func opcodeOf(b []byte) (opcode, bool) {
	if len(b) < 2 {
		return 0, false
	}
	return opcode(binary.BigEndian.Uint16(b)), true
}

// parseRequest reads a request, which is to be exactly one:
//
//	opcode 1 or 2 | file | 0 | mode | 0 | option | 0 | value | 0 ...
//
// The error is a *refusal.
func parseRequest(b []byte) (request, error) {
	op, ok := opcodeOf(b)
	switch {
	case !ok || op != opRead && op != opWrite:
		return request{}, refuse(codeIllegal, "not a request")
	case len(b) > maxMessage:
		return request{}, refuse(codeIllegal, "the request has more than %d bytes", maxMessage)
	case b[len(b)-1] != 0:
		return request{}, refuse(codeIllegal, "the request does not end with a zero byte")
	}
	fields := strings.Split(string(b[2:len(b)-1]), "\x00")
	if len(fields) < 2 || len(fields)%2 != 0 {
		return request{}, refuse(codeIllegal, "the request is not a name, a mode, and pairs of options and values")
	}
	r := request{op: op, file: fields[0], mode: fields[1]}
	if !isFile(r.file) {
		return request{}, refuse(codeIllegal, "the file name is empty or has control characters")
	}
	if m := strings.ToLower(r.mode); m != "netascii" && m != "octet" {
		return request{}, refuse(codeIllegal, "the mode is neither netascii nor octet")
	}
	for f := fields[2:]; len(f) > 0; f = f[2:] {
		r.options = append(r.options, option{f[0], f[1]})
	}
	return r, r.checkOptions()
}

// isFile says whether a file name is text: in UTF-8, or in an encoding of its
// own that has no control characters.
func isFile(s string) bool {
	for rest := s; rest != ""; {
		c, n := utf8.DecodeRuneInString(rest)
		if c == utf8.RuneError && n == 1 {
			c = rune(rest[0])
		}
		if c < 0x20 || c >= 0x7f && c < 0xa0 {
			return false
		}
		rest = rest[n:]
	}
	return s != ""
}

// bounds are those of the numbers that options have (RFC 2348, 2349, 7440).
var bounds = map[string]struct{ min, max uint64 }{
	"blksize":    {8, 65464},
	"timeout":    {1, 255},
	"tsize":      {0, 1<<63 - 1},
	"windowsize": {1, 65535},
}

// checkOptions refuses what no server could read as it was meant. Options that
// are not known here pass if they are text: a server passes over those that it
// does not know (RFC 2347).
func (r *request) checkOptions() error {
	seen := map[string]bool{}
	for _, o := range r.options {
		name := strings.ToLower(o.name)
		if name == "" || !isText(o.name) || !isText(o.value) {
			return refuse(codeOption, "an option is not text")
		}
		if seen[name] {
			return refuse(codeOption, "option %s comes twice", name)
		}
		seen[name] = true
		limit, ok := bounds[name]
		if !ok {
			continue
		}
		n, ok := number(o.value)
		if !ok || n < limit.min || n > limit.max {
			return refuse(codeOption, "the value of option %s is not from %d to %d", name, limit.min, limit.max)
		}
	}
	return nil
}

func isText(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < 0x20 || c > 0x7e })
}

// number reads what has one way to be written.
func number(s string) (uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil && strconv.FormatUint(n, 10) == s
}

// multicast is the option that would have the server send to a group
// (RFC 2090). A server that does not know it answers as if it was not there,
// and so does the client go on.
const multicast = "multicast"

// message is the request as it goes to the server: without multicast, else as
// it came.
func (r *request) message() []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(r.op))
	add := func(s string) { b = append(append(b, s...), 0) }
	add(r.file)
	add(r.mode)
	for _, o := range r.options {
		if !strings.EqualFold(o.name, multicast) {
			add(o.name)
			add(o.value)
		}
	}
	return b
}

// isError says whether a server's datagram is a whole error message.
func isError(b []byte) bool {
	op, _ := opcodeOf(b)
	return op == opError && len(b) >= 5 && len(b) <= maxMessage && bytes.IndexByte(b[4:], 0) == len(b)-5
}
