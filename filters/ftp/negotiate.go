package ftp

import (
	"errors"
	"fmt"
	"net/netip"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// negotiation is one agreed or proposed data connection:
//
//	PORT, EPRT   reserved --2xx--> armed for the server ----\
//	                 \--any other-> void                     > used, or void:
//	PASV, EPSV   asked ---227/229-> allowed for the client -/  next negotiation,
//	                                                           REIN, end, 60 s
//
// For a published server it is the mirror image: PORT is allowed for the server
// when it hears it, and void with any answer but 2xx; PASV is armed for the
// client with the server's 227 or 229.
type negotiation struct {
	bind   filterapi.Connection // the external address, once it is there
	action filterapi.Action     // the permission, once it is there
	active bool                 // action is a published server's, for PORT
}

// cancel voids negotiations; nil ones and those that were used are no error.
func cancel(all ...*negotiation) {
	for _, n := range all {
		if n == nil {
			continue
		}
		if n.bind != nil {
			n.bind.Kill()
		}
		if n.action != nil {
			// ErrTerminating says that it was used or has expired.
			_ = n.action.Cancel()
		}
	}
}

// takeAll takes every negotiation away from the connection. mu is held.
func (c *control) takeAll() []*negotiation {
	all := []*negotiation{c.current}
	c.current = nil
	for _, x := range c.queue {
		all = append(all, x.neg)
		x.neg = nil
	}
	return all
}

// lowestPort is the first that a data connection may go to: no service of the
// system's listens there (RFC 2577, 3).
const lowestPort = 1024

// is4 is the family of the control connection.
func (c *control) is4() bool { return c.conn.Tuple().Is4() }

// negotiateActive handles PORT and EPRT.
func (c *control) negotiateActive(cmd command) {
	if !cmd.crlf {
		c.refuse(cmd, "501 "+cmd.verb+" refused by the gateway: the line does not end with CR LF.")
		return
	}
	if c.onlyEPSV() {
		c.refuse(cmd, "503 "+cmd.verb+" refused by the gateway: EPSV ALL is in force.")
		return
	}
	want, format := netip.AddrPort{}, formatPort
	var err error
	if cmd.verb == "PORT" {
		want, err = parsePort(cmd.arg)
	} else {
		format = formatEprt
		want, err = parseEprt(cmd.arg, c.is4())
	}
	switch {
	case errors.Is(err, errFamily):
		c.refuse(cmd, fmt.Sprintf("522 Network protocol not supported, use (%d)", familyOf(c.is4())))
	case err != nil:
		c.refuse(cmd, "501 "+cmd.verb+" refused by the gateway: syntax error in the address.")
	case c.atGateway(want.Addr()) && want.Port() >= lowestPort:
		c.approve(cmd, want)
	case want.Addr() != c.conn.Tuple().Src.Addr():
		c.refuse(cmd, "504 "+cmd.verb+" refused by the gateway: the address is not the client's own.")
	case want.Port() < lowestPort:
		c.refuse(cmd, "504 "+cmd.verb+" refused by the gateway: ports below 1024 are not allowed.")
	case c.published:
		c.promise(cmd, want, format)
	default:
		c.reserve(cmd, want, format)
	}
}

// atGateway says whether an address is the one that the server sees of a client
// that asks the gateway for its connections, by SOCKS for instance: it may have
// asked for an address to listen at, and announces that.
func (c *control) atGateway(a netip.Addr) bool {
	name, err := c.conn.ExternalName()
	return err == nil && name.Addr() == a && c.session.Flags()&filterapi.SessionPrivate != 0
}

// approve lets the server in at an address that the client has asked the gateway
// for, and sends the command on as it is. The address lasts as long as the
// client wants: it is not for the filter to close it.
func (c *control) approve(cmd command, want netip.AddrPort) {
	peer, err := c.conn.ExternalPeer()
	if err == nil {
		_, err = c.session.RetroactiveAllowBind(filterapi.AllowBind{
			Proto: flow.TCP, Address: want, Protocol: c.protocol, IPFilter: filterapi.OnlyFrom(peer.Addr()),
		})
	}
	switch {
	case errors.Is(err, filterapi.ErrNotFound), errors.Is(err, filterapi.ErrTerminating):
		c.refuse(cmd, "504 "+cmd.verb+" refused by the gateway: nobody listens at the address.")
	case err != nil:
		c.log.Info("data connection refused", zap.Stringer("flow", c.conn.Tuple()), zap.String("command", cmd.verb), zap.Error(err))
		c.answer(cmd.raw, unavailable(err))
	default:
		c.forward(&exchange{verb: cmd.verb, neg: &negotiation{}}, cmd.raw, cmd.line())
	}
}

// reserve chooses the external address and sends the command on with it. The
// address lets nobody in yet.
func (c *control) reserve(cmd command, want netip.AddrPort, format func(netip.AddrPort) string) {
	x := &exchange{verb: cmd.verb, neg: &negotiation{}}
	c.lockSuperseded(x)
	c.mu.Unlock()
	binds, err := c.session.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{Primary: c.conn, Proto: flow.TCP, Flags: filterapi.Timeout},
		Clients:    []netip.AddrPort{want}, IPFilter: filterapi.OnlyFrom(),
	})
	if err != nil {
		c.log.Info("data connection refused", zap.Stringer("flow", c.conn.Tuple()), zap.String("command", cmd.verb), zap.Error(err))
		c.answer(cmd.raw, unavailable(err))
		return
	}
	x.neg.bind = binds[0]
	name, err := binds[0].ExternalName()
	if err != nil || name.Addr().Is4() != c.is4() {
		cancel(x.neg)
		c.answer(cmd.raw, unavailable(err))
		return
	}
	line := cmd.line()
	if name != want {
		line = []byte(cmd.verb + " " + format(name) + "\r\n")
	}
	c.forward(x, cmd.raw, line)
}

// unavailable is the reply of a gateway that cannot open a data connection.
func unavailable(err error) string {
	switch {
	case errors.Is(err, filterapi.ErrQuota):
		return "425 Can't open data connection: too many are pending at the gateway."
	case errors.Is(err, filterapi.ErrNoPorts):
		return "425 Can't open data connection: no port is free at the gateway."
	case errors.Is(err, filterapi.ErrPolicyDenied), errors.Is(err, filterapi.ErrNetworkDenied):
		return "425 Can't open data connection: the gateway's rules do not allow it."
	case errors.Is(err, filterapi.ErrTerminating):
		return "421 Service not available, the gateway is closing the connection."
	}
	return "425 Can't open data connection at the gateway."
}

// negotiatePassive handles PASV and EPSV.
func (c *control) negotiatePassive(cmd command) {
	x := &exchange{verb: cmd.verb, neg: &negotiation{}}
	switch {
	case cmd.verb == "PASV" && c.onlyEPSV():
		c.refuse(cmd, "503 PASV refused by the gateway: EPSV ALL is in force.")
		return
	case cmd.verb == "PASV", cmd.arg == "":
	case isAll(cmd.arg):
		x.neg, x.epsvAll = nil, true
	default:
		family, err := parseNumber(cmd.arg, 65535)
		if err != nil {
			c.refuse(cmd, "501 EPSV refused by the gateway: syntax error in the argument.")
			return
		}
		if family != familyOf(c.is4()) {
			c.refuse(cmd, fmt.Sprintf("522 Network protocol not supported, use (%d)", familyOf(c.is4())))
			return
		}
	}
	c.forward(x, cmd.raw, cmd.line())
}

func isAll(arg string) bool {
	return len(arg) == 3 && arg[0]&^0x20 == 'A' && arg[1]&^0x20 == 'L' && arg[2]&^0x20 == 'L'
}

func (c *control) onlyEPSV() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.epsvOnly
}

// settle does what the final reply to a negotiation says, and returns when the
// kernel has done it. It gives the reply that the client gets instead, or nil.
func (c *control) settle(x *exchange, line replyLine) []byte {
	c.mu.Lock()
	n := x.neg
	c.mu.Unlock()
	if n == nil {
		return nil // nothing was negotiated, or it was released meanwhile
	}
	var text string
	switch {
	case n.bind != nil && line.code < 300:
		text = c.arm(n)
	case n.bind != nil:
		n.bind.Kill()
	case n.active:
		if line.code >= 300 {
			_ = n.action.Cancel() // ErrTerminating: it was used, or has expired
		}
	case c.published && (line.code == 227 && x.verb == "PASV" || line.code == 229 && x.verb == "EPSV"):
		text = c.publish(x, line)
	case line.code == 227 && x.verb == "PASV", line.code == 229 && x.verb == "EPSV":
		text = c.allow(x, line)
	}
	if text == "" {
		return nil
	}
	return []byte(text + "\r\n")
}

// arm lets the server in.
func (c *control) arm(n *negotiation) string {
	peer, err := c.conn.ExternalPeer()
	if err == nil {
		err = n.bind.SetIPFilter(filterapi.OnlyFrom(peer.Addr()))
	}
	if err == nil {
		return ""
	}
	c.log.Info("data connection refused", zap.Stringer("flow", c.conn.Tuple()), zap.Error(err))
	n.bind.Kill()
	if errors.Is(err, filterapi.ErrTerminating) {
		return "425 Can't open data connection: the gateway's port has expired."
	}
	return unavailable(err)
}

// allow lets the client go where the reply to its PASV or EPSV says, and only
// to its own server.
func (c *control) allow(x *exchange, line replyLine) string {
	server := c.serverAddr()
	said, rewritten, err := passiveTarget(line, server)
	if text := c.refusePassive(line, said, err); text != "" {
		return text
	}
	if rewritten != "" {
		c.log.Warn("passive reply names another host", zap.Stringer("flow", c.conn.Tuple()), zap.Stringer("target", said))
	}
	action, err := c.session.AllowFutureConnect(filterapi.FutureConnect{
		Negotiated: filterapi.Negotiated{Primary: c.conn, Proto: flow.TCP, Flags: filterapi.Timeout},
		Target:     netip.AddrPortFrom(server, said.Port()),
	})
	if err != nil {
		c.log.Info("data connection refused", zap.Stringer("flow", c.conn.Tuple()), zap.Stringer("target", said), zap.Error(err))
		return unavailable(err)
	}
	if !c.holds(x, func(n *negotiation) { n.action = action }) {
		// ErrTerminating says that it is void already.
		_ = action.Cancel()
	}
	return rewritten
}

// holds hands what was opened over to the connection. false: filtering has ended
// meanwhile.
func (c *control) holds(x *exchange, take func(*negotiation)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.released || x.neg == nil {
		return false
	}
	take(x.neg)
	return true
}

// passiveTarget reads the address out of a 227 or 229 reply. rewritten is the
// reply that names the control connection's own server instead of another
// host, empty if it did so already.
func passiveTarget(line replyLine, server netip.Addr) (said netip.AddrPort, rewritten string, err error) {
	text := line.text()
	if line.code == 229 {
		port, err := findPort(text)
		return netip.AddrPortFrom(server, port), "", err
	}
	said, from, to, err := findAddress(text)
	switch {
	case err != nil, said.Addr() == server:
		return said, "", err
	case server.Is4():
		own := formatPort(netip.AddrPortFrom(server, said.Port()))
		return said, "227 " + text[:from] + own + text[to:], nil
	case said.Addr().IsUnspecified():
		// An IPv6 server that answers PASV says 0.0.0.0: "where I am".
		return said, "", nil
	}
	return said, "", errSyntax
}
