package filtertest_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// handle is a handler of several events.
func handle(ev filterapi.Event, scan filterapi.DataFilter) error {
	switch ev := ev.(type) {
	case *filterapi.ConnectEvent:
		if ev.Secondary || ev.Target.Port() == 25 {
			return nil // it passes without us
		}
		return ev.Connection.AttachDataFilter(scan, filterapi.PriorityMiddle)
	case *filterapi.UDPDestinationEvent:
		if ev.Peer.Port() < 1024 {
			return ev.Destination.Deny()
		}
	case *filterapi.TerminatingEvent:
		// Forget ev.Connection and all that came from it.
	}
	return filterapi.ErrNotSupported // not for us: it passes
}

// lines passes on what the client says, line by line, unless a line begins with
// a forbidden word. What the server says is not looked at.
func lines(internal, external filterapi.Socket, forbidden string) error {
	answers := make(chan error, 1)
	go func() { answers <- filterapi.Pass(external, internal) }()
	in, out := bufio.NewReaderSize(filterapi.NewStream(internal), 1024), filterapi.NewStream(external)
	for {
		line, err := in.ReadSlice('\n') // bufio.ErrBufferFull: a line of 1024 bytes is no line
		if word, _, _ := strings.Cut(strings.TrimSpace(string(line)), " "); err == nil && strings.EqualFold(word, forbidden) {
			err = fmt.Errorf("the client says %q", word)
		}
		if err == nil {
			_, err = out.Write(line)
		}
		switch {
		case err == io.EOF: // the answers go on
			return errors.Join(out.CloseWrite(), <-answers)
		case err != nil: // a reset wakes the other goroutine, too
			return errors.Join(err, internal.Close(true), external.Close(true), <-answers)
		}
	}
}

// after sends what is behind a mark to one socket and what is before it to
// another; no byte is copied.
func after(b *filterapi.Buffer, mark string, before, behind filterapi.Socket) error {
	at := bytes.Index(b.Data, []byte(mark))
	if at < 0 {
		return before.Send(b)
	}
	head := b.Split(at + len(mark))
	if err := before.Send(head); err != nil {
		b.Release()
		return err
	}
	return behind.Send(b)
}

// announce passes a line on that names a port of the server's, "DATA 5001",
// when the client may connect to it.
func announce(s filterapi.Session, c filterapi.Connection, to io.Writer, line string) (filterapi.Action, error) {
	port, err := strconv.ParseUint(strings.TrimPrefix(line, "DATA "), 10, 16)
	if err != nil || port < 1024 {
		return nil, fmt.Errorf("not a port to open: %q", line)
	}
	action, err := s.AllowFutureConnect(filterapi.FutureConnect{
		Negotiated: filterapi.Negotiated{Primary: c, Proto: flow.TCP, Flags: filterapi.Timeout},
		Target:     netip.AddrPortFrom(c.Tuple().Dst.Addr(), uint16(port)),
	})
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintln(to, line) // not before
	return action, err
}

// reserve takes an external address for a port of the client's that nobody may
// use yet; arm lets the server in when it has agreed.
func reserve(s filterapi.Session, c filterapi.Connection, port uint16) (filterapi.Connection, netip.AddrPort, error) {
	binds, err := s.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{Primary: c, Proto: flow.TCP, Flags: filterapi.Timeout},
		Clients:    []netip.AddrPort{netip.AddrPortFrom(s.ClientAddr(), port)},
		IPFilter:   filterapi.OnlyFrom(),
	})
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	name, err := binds[0].ExternalName() // write this into the message
	return binds[0], name, err
}

func arm(bind, c filterapi.Connection, agreed bool) error {
	if !agreed {
		bind.Kill()
		return nil
	}
	return bind.SetIPFilter(filterapi.OnlyFrom(c.Tuple().Dst.Addr())) // then pass the answer on
}

// media opens a pair of UDP ports, for RTP and RTCP, to whichever peer sends,
// and asks to be told when something arrives.
func media(s filterapi.Session, c filterapi.Connection, me filterapi.SessionFilter, rtp uint16) ([]filterapi.Connection, error) {
	return s.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{
			Primary: c, Proto: flow.UDP, Notify: me, Context: "media",
			Flags: filterapi.EvenPort | filterapi.Bidirectional | filterapi.AllowMultiple,
		},
		Clients: []netip.AddrPort{netip.AddrPortFrom(s.ClientAddr(), rtp), netip.AddrPortFrom(s.ClientAddr(), rtp+1)},
	})
}

// lend gives the client an address of the gateway's that leads to a server
// which it shall not know.
func lend(s filterapi.Session, c filterapi.Connection, hidden ...netip.AddrPort) (netip.AddrPort, []filterapi.Action, error) {
	return s.RedirectConnections(filterapi.Redirect{
		Negotiated: filterapi.Negotiated{Primary: c, Proto: flow.TCP, Flags: filterapi.Timeout},
		Targets:    hidden, // target i at the returned port + i
	})
}

// watch has a data filter put on everything that the client says to one server
// by UDP, without an event.
func watch(s filterapi.Session, server netip.AddrPort, scan filterapi.DataFilter) (filterapi.Action, error) {
	return s.SetDataFilterFactory(filterapi.DataFilterFactory{
		Event: filterapi.UDPDestination, Address: server, Priority: filterapi.PriorityMiddle,
		New: func(filterapi.Connection) (filterapi.DataFilter, error) { return scan, nil },
	})
}

// closed is a data filter that plays a server: it says one line and hangs up.
// In the handler of a ConnectEvent: ev.Connection.EmulateForConnect(closed{}).
type closed struct{}

func (closed) Pump(_ context.Context, c filterapi.Connection, internal, _ filterapi.Socket) error {
	n, err := io.WriteString(filterapi.NewStream(internal), "421 closed until Monday\r\n")
	return errors.Join(err, c.IncrementBytesSent(uint64(n)), internal.Close(false))
}

// relay serves one client that has connected to a socket of the filter's: the
// server is dialled if the rules let this client have it.
func relay(ctx context.Context, fw filterapi.Firewall, client net.Conn, server netip.AddrPort) error {
	defer client.Close()
	addr, err := netip.ParseAddrPort(client.RemoteAddr().String())
	if err != nil {
		return err
	}
	session, err := fw.PrivateSession(addr.Addr(), "")
	if err != nil {
		return err
	}
	defer session.Close()
	far, err := session.Network().Dial(ctx, flow.TCP, netip.AddrPort{}, server)
	if err != nil {
		return err
	}
	defer far.Close()
	_, err = io.Copy(far, client)
	return err
}

// tunnel serves one client that has connected to a socket of the filter's and
// has asked for a target: what the rules and filters say of it, the client is
// told, and then the gateway carries the flow.
func tunnel(ctx context.Context, session filterapi.Session, client net.Conn, target netip.AddrPort) error {
	from, err := netip.ParseAddrPort(client.RemoteAddr().String())
	if err != nil {
		return errors.Join(err, client.Close())
	}
	leg, err := session.ConnectForClient(ctx, filterapi.Connect{Client: from, Target: target})
	if err != nil {
		_, _ = io.WriteString(client, "no\n") // err says which no
		return errors.Join(err, client.Close())
	}
	if _, err := io.WriteString(client, "yes\n"); err != nil {
		leg.Close()
		return errors.Join(err, client.Close())
	}
	if err := leg.Carry(client); err != nil { // the connection is the gateway's now
		return err
	}
	<-leg.Done()
	return nil
}
