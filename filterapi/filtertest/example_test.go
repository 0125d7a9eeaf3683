package filtertest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"strconv"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// tutorial: filter

// Rendezvous is a filter for a protocol whose server says "DATA <port>" on a
// line of its own when the client shall open a second connection.
type Rendezvous struct{}

func (Rendezvous) Name() string { return "rendezvous" }
func (Rendezvous) Shutdown()    {}
func (Rendezvous) Init(filterapi.Firewall) (filterapi.Events, error) {
	return filterapi.Events{Types: filterapi.ConnectTCP}, nil
}
func (Rendezvous) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	return inSession{s}, filterapi.Events{Types: filterapi.ConnectTCP}, nil
}

type inSession struct{ session filterapi.Session }

func (inSession) Detach() {}
func (s inSession) HandleEvent(_ context.Context, ev filterapi.Event) error {
	connect, ok := ev.(*filterapi.ConnectEvent)
	if !ok {
		return filterapi.ErrNotSupported
	}
	return connect.Connection.AttachDataFilter(s, filterapi.PriorityNAT)
}

func (s inSession) Pump(_ context.Context, c filterapi.Connection, internal, external filterapi.Socket) error {
	up := make(chan error, 1)
	go func() { up <- relay(internal, external, func(line []byte) error { return nil }) }()
	var last filterapi.Action
	err := relay(external, internal, func(line []byte) error {
		digits, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("DATA "))
		port, bad := strconv.ParseUint(string(digits), 10, 16)
		if !ok || bad != nil || port < 1024 {
			return nil // not announced, or nothing that may be opened
		}
		if last != nil {
			_ = last.Cancel() // an error says that it was used
		}
		var err error
		last, err = s.session.AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: c, Proto: flow.TCP, Flags: filterapi.Timeout}, Target: netip.AddrPortFrom(c.Tuple().Dst.Addr(), uint16(port))})
		return err // the line leaves when this has returned
	})
	err = errors.Join(err, <-up)
	if last != nil {
		_ = last.Cancel()
	}
	return err
}

// relay passes whole lines on, each after look has seen it, until the end.
func relay(from, to filterapi.Socket, look func(line []byte) error) (err error) {
	defer func() {
		if err != nil { // wakes the other direction
			_ = errors.Join(from.Close(true), to.Close(true))
		}
	}()
	var held []byte
	for {
		buf, err := from.Recv()
		if err == io.EOF {
			return to.Shutdown(false)
		} else if err != nil {
			return err
		}
		held = append(held, buf.Data...)
		buf.Release()
		for end := bytes.IndexByte(held, '\n') + 1; end > 0; end = bytes.IndexByte(held, '\n') + 1 {
			if err := look(held[:end]); err != nil {
				return err
			}
			if err := to.Send(filterapi.NewBuffer(bytes.Clone(held[:end]), nil)); err != nil {
				return err
			}
			held = held[end:]
		}
		if len(held) > 512 {
			return errors.New("line of more than 512 bytes")
		}
	}
}

// tutorial: end
