package filtertest

import (
	"errors"
	"io"
	"net/netip"
	"strings"
	"time"
)

// End is the client or the server of a flow, played by the test. Its methods
// fail the test when the flow does not do its part in time.
type End struct {
	flow *Flow
	name string
	leg  *leg
	addr netip.AddrPort // its own
	far  netip.AddrPort // whom it sends to
	got  string         // received and not yet expected
}

// Send sends each argument as one segment.
func (e *End) Send(segments ...string) {
	e.flow.gateway.tb.Helper()
	for _, s := range segments {
		if err := e.Offer(s); err != nil {
			e.flow.gateway.tb.Fatalf("filtertest: %s sends %q: %v", e.name, s, err)
		}
	}
}

// Offer sends one segment and returns the error that an end sees which was
// reset.
func (e *End) Offer(text string) error {
	if e.flow.deaf && e == e.flow.Client {
		return nil // the gateway loses it, and nobody is told
	}
	return e.leg.fromEnd.put(segment{[]byte(text), e.far})
}

// Expect receives exactly this text, in any segments. More that comes with it
// waits for the next Expect.
func (e *End) Expect(want string) {
	e.flow.gateway.tb.Helper()
	for len(e.got) < len(want) && strings.HasPrefix(want, e.got) {
		text, err := e.receive()
		if err != nil {
			e.flow.gateway.tb.Fatalf("filtertest: %s waits for %q, has %q: %v", e.name, want, e.got, err)
		}
		e.got += text
	}
	if !strings.HasPrefix(e.got, want) {
		e.flow.gateway.tb.Fatalf("filtertest: %s\nhas  %q\nwant %q", e.name, e.got, want)
	}
	e.got = e.got[len(want):]
}

// Exchange sends one segment and expects an answer from the gateway or the far
// end.
func (e *End) Exchange(send, want string) {
	e.flow.gateway.tb.Helper()
	e.Send(send)
	e.Expect(want)
}

// ReadAll receives until the stream ends or is reset, and says which.
func (e *End) ReadAll() (string, error) {
	for {
		text, err := e.receive()
		if err != nil {
			all := e.got
			e.got = ""
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return all, err
		}
		e.got += text
	}
}

// ExpectEOF waits for an orderly end with nothing before it.
func (e *End) ExpectEOF() {
	e.flow.gateway.tb.Helper()
	if rest, err := e.ReadAll(); rest != "" || err != nil {
		e.flow.gateway.tb.Fatalf("filtertest: %s waits for the end, has %q, %v", e.name, rest, err)
	}
}

// ExpectReset waits for a reset.
func (e *End) ExpectReset() {
	e.flow.gateway.tb.Helper()
	if rest, err := e.ReadAll(); !errors.Is(err, ErrReset) {
		e.flow.gateway.tb.Fatalf("filtertest: %s waits for a reset, has %q, %v", e.name, rest, err)
	}
}

// Waiting is what has arrived and was not yet expected. It does not wait; in a
// synctest bubble, after synctest.Wait, it is all that will come.
func (e *End) Waiting() string {
	l := e.leg.toEnd
	l.mu.Lock()
	defer l.mu.Unlock()
	text := e.got
	for _, s := range l.segs {
		text += string(s.data)
	}
	return text
}

// Addr is the address of this end with another port.
func (e *End) Addr(port uint16) netip.AddrPort { return netip.AddrPortFrom(e.addr.Addr(), port) }

// Name is the address and port of this end.
func (e *End) Name() netip.AddrPort { return e.addr }

// CloseWrite sends a FIN; the end can still receive.
func (e *End) CloseWrite() { e.leg.fromEnd.end() }

// Reset resets the connection.
func (e *End) Reset() { e.leg.reset(ErrReset) }

func (e *End) receive() (string, error) {
	late := errors.New("nothing came in time")
	timer := time.AfterFunc(patience, func() { e.leg.toEnd.fail(late) })
	defer timer.Stop()
	seg, err := e.leg.toEnd.take(1<<20, false, nil)
	return string(seg.data), err
}
