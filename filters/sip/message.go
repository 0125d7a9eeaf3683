package sip

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// message is one SIP message. What is not changed leaves as it came, byte by
// byte.
type message struct {
	// method is set in a request, code in a response.
	method  string
	uri     string
	code    int
	reason  string
	headers []header
	body    []byte
}

type header struct {
	name    string // lower case, the long form
	written string
	value   string // unfolded
	raw     []byte // as received; nil: value was changed
}

func (m *message) isRequest() bool { return m.method != "" }

// parseStart reads the start line, which checkStart has looked at.
func (m *message) parseStart(line string) error {
	if rest, ok := strings.CutPrefix(line, "SIP/2.0 "); ok {
		code, err := strconv.Atoi(rest[:3])
		m.code, m.reason = code, strings.TrimPrefix(rest[3:], " ")
		return err
	}
	f := strings.Split(line, " ")
	if len(f) != 3 {
		return notSIP("%.40q is no start line", line)
	}
	m.method, m.uri = f[0], f[1]
	return nil
}

// single are the fields that may stand in a message once at most.
var single = map[string]bool{
	"from": true, "to": true, "call-id": true, "cseq": true, "content-length": true, "content-type": true,
	"content-encoding": true, "expires": true, "session-expires": true, "max-forwards": true,
}

// check refuses messages that two readers could understand differently.
func (m *message) check() error {
	seen := map[string]int{}
	for _, h := range m.headers {
		seen[h.name]++
		if seen[h.name] > 1 && single[h.name] {
			return notSIP("%s twice", h.name)
		}
	}
	for _, name := range []string{"via", "from", "to", "call-id", "cseq"} {
		if seen[name] == 0 {
			return notSIP("no %s", name)
		}
	}
	id := m.value("call-id")
	number, method, ok := strings.Cut(m.value("cseq"), " ")
	if _, valid := parseNumber(number, 1<<31-1); !valid || !ok || !isToken(strings.TrimLeft(method, " \t")) {
		return notSIP("CSeq %.40q", m.value("cseq"))
	}
	switch {
	case id == "" || strings.ContainsAny(id, " \t") || len(id) > maxID:
		return notSIP("Call-ID %.40q", id)
	case m.isRequest() && m.cseqMethod() != m.method:
		return notSIP("CSeq %.40q in a %s", m.value("cseq"), m.method)
	}
	for _, name := range []string{"from", "to"} {
		if _, err := parseAddress(m.value(name)); err != nil {
			return notSIP("%s %.40q", name, m.value(name))
		}
	}
	if _, err := m.topVia(); err != nil {
		return err
	}
	_, _, err := m.contentLength()
	return err
}

// maxID bounds a Call-ID and a branch, in bytes.
const maxID = 512

func (m *message) find(name string) *header {
	for i := range m.headers {
		if m.headers[i].name == name {
			return &m.headers[i]
		}
	}
	return nil
}

// value is the value of the first such field, or empty.
func (m *message) value(name string) string {
	if h := m.find(name); h != nil {
		return h.value
	}
	return ""
}

// values are those of all such fields.
func (m *message) values(name string) []string {
	var out []string
	for _, h := range m.headers {
		if h.name == name {
			out = append(out, h.value)
		}
	}
	return out
}

func (h *header) set(value string) {
	if h.value != value {
		h.value, h.raw = value, nil
	}
}

// cseqMethod is the method of the request that the message is or answers.
func (m *message) cseqMethod() string {
	_, method, _ := strings.Cut(m.value("cseq"), " ")
	return strings.TrimLeft(method, " \t")
}

func (m *message) cseq() string {
	number, _, _ := strings.Cut(m.value("cseq"), " ")
	return number
}

// contentLength is what the message says of its body.
func (m *message) contentLength() (n int, given bool, err error) {
	h := m.find("content-length")
	if h == nil {
		return 0, false, nil
	}
	size, ok := parseNumber(h.value, maxMessage)
	if !ok {
		return 0, false, notSIP("Content-Length %.40q", h.value)
	}
	return int(size), true, nil
}

// tag is the tag of a From or To field, or empty.
func (m *message) tag(name string) string {
	a, err := parseAddress(m.value(name))
	if err != nil {
		return ""
	}
	tag, _ := findParam(a.after, "tag")
	return tag
}

// setBody replaces the body.
func (m *message) setBody(body []byte) { m.body = body }

// bytes writes the message with the length that its body has.
func (m *message) bytes() []byte {
	var b bytes.Buffer
	if m.isRequest() {
		fmt.Fprintf(&b, "%s %s SIP/2.0\r\n", m.method, m.uri)
	} else {
		fmt.Fprintf(&b, "SIP/2.0 %03d %s\r\n", m.code, m.reason)
	}
	length := m.find("content-length")
	switch {
	case length != nil:
		if n, _, _ := m.contentLength(); n != len(m.body) {
			length.set(strconv.Itoa(len(m.body)))
		}
	case len(m.body) > 0:
		m.headers = append(m.headers, header{name: "content-length", written: "Content-Length", value: strconv.Itoa(len(m.body))})
	}
	for _, h := range m.headers {
		if h.raw != nil {
			b.Write(h.raw)
		} else {
			fmt.Fprintf(&b, "%s: %s\r\n", h.written, h.value)
		}
	}
	b.WriteString("\r\n")
	b.Write(m.body)
	return b.Bytes()
}
