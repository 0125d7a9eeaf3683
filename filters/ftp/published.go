package ftp

import (
	"net/netip"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// A control connection that came from outside to a server of the inside has the
// server where the gateway's client is. Its data connections are the mirror
// images: PASV opens an external address for the server, PORT lets the server
// out to whoever owns the control connection. published says that this is one.

// serverAddr is the address of the control connection's server.
func (c *control) serverAddr() netip.Addr {
	if c.published {
		return c.session.ClientAddr()
	}
	return c.conn.Tuple().Dst.Addr()
}

// promise lets the server connect to the client, once, before it hears the
// command: it may do so as soon as it has. A server that sees the gateway's
// address instead of the client's is given an address of the gateway, for many
// servers take no other than their peer's. That is another one each time, so that
// a client which names the same port again would meet the rest of the last
// connection if its source were the same, too.
func (c *control) promise(cmd command, client netip.AddrPort, format func(netip.AddrPort) string) {
	x := &exchange{verb: cmd.verb, neg: &negotiation{active: true}}
	c.lockSuperseded(x)
	c.mu.Unlock()
	line := cmd.line()
	n := filterapi.Negotiated{Primary: c.conn, Proto: flow.TCP, Flags: filterapi.Timeout}
	var err error
	if c.conn.Flags()&filterapi.InternalAddressTranslation != 0 {
		var inside netip.AddrPort
		var actions []filterapi.Action
		inside, actions, err = c.session.RedirectConnections(filterapi.Redirect{
			Negotiated: n, Targets: []netip.AddrPort{client}, External: c.dataName(false),
		})
		if err == nil {
			x.neg.action = actions[0]
			line = []byte(cmd.verb + " " + format(inside) + "\r\n")
		}
	} else {
		x.neg.action, err = c.session.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: client, External: c.dataName(true)})
	}
	if err != nil {
		x.neg.action = nil
		c.log.Info("data connection refused", zap.Stringer("flow", c.conn.Tuple()), zap.String("command", cmd.verb), zap.Error(err))
		c.answer(cmd.raw, unavailable(err))
		return
	}
	c.forward(x, cmd.raw, line)
}

// dataName is where the server's data connections are seen to come from: the
// address that stands for it, and its usual port, the one before that of the
// control connection (RFC 959, 3.2), or any. The zero value: nothing stands for
// it.
func (c *control) dataName(usual bool) netip.AddrPort {
	at := c.conn.Tuple().Dst
	switch {
	case at.Addr() == c.serverAddr():
		return netip.AddrPort{}
	case usual:
		return netip.AddrPortFrom(at.Addr(), at.Port()-1)
	}
	return netip.AddrPortFrom(at.Addr(), 0)
}

// publish opens an external address for the port that the server's reply to PASV
// or EPSV names, to the owner of the control connection and once, and gives the
// reply with that address.
func (c *control) publish(x *exchange, line replyLine) string {
	server, at := c.serverAddr(), c.conn.Tuple()
	said, foreign, err := passiveTarget(line, server)
	if text := c.refusePassive(line, said, err); text != "" {
		return text
	}
	if foreign != "" && said.Addr() != at.Dst.Addr() {
		c.log.Warn("passive reply names another host", zap.Stringer("flow", at), zap.Stringer("target", said))
	}
	binds, err := c.session.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{Primary: c.conn, Proto: flow.TCP, Flags: filterapi.Timeout},
		Clients:    []netip.AddrPort{netip.AddrPortFrom(server, said.Port())}, IPFilter: filterapi.OnlyFrom(at.Src.Addr()),
	})
	if err != nil {
		c.log.Info("data connection refused", zap.Stringer("flow", at), zap.Stringer("target", said), zap.Error(err))
		return unavailable(err)
	}
	name, err := binds[0].ExternalName()
	if err != nil || name.Addr().Is4() != c.is4() || !c.holds(x, func(n *negotiation) { n.bind = binds[0] }) {
		binds[0].Kill()
		return unavailable(err)
	}
	if name == netip.AddrPortFrom(server, said.Port()) && foreign == "" {
		return ""
	}
	return withPassive(line, name)
}

// refusePassive is the reply instead of one that opens nothing, or empty.
func (c *control) refusePassive(line replyLine, said netip.AddrPort, err error) string {
	switch {
	case err != nil:
		c.log.Warn("passive reply refused", zap.Stringer("flow", c.conn.Tuple()), zap.ByteString("reply", line.raw))
		return "425 Can't open data connection: the gateway does not understand the server's reply."
	case said.Port() < lowestPort:
		c.log.Warn("passive reply refused: low port", zap.Stringer("flow", c.conn.Tuple()), zap.Stringer("target", said))
		return "425 Can't open data connection: the gateway allows no ports below 1024."
	}
	return ""
}

// withPassive is a 227 or 229 reply with another address. The line has one.
func withPassive(line replyLine, name netip.AddrPort) string {
	text := line.text()
	if line.code == 227 {
		_, from, to, err := findAddress(text)
		if err != nil || !name.Addr().Is4() {
			return "" // 0.0.0.0 of an IPv6 server: "where I am"
		}
		return "227 " + text[:from] + formatPort(name) + text[to:]
	}
	before, inner, _ := strings.Cut(text, "(")
	inner, after, _ := strings.Cut(inner, ")")
	d := inner[:1]
	return "229 " + before + "(" + d + d + d + strconv.Itoa(int(name.Port())) + d + ")" + after
}
