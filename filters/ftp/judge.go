package ftp

import (
	"strings"

	"go.uber.org/zap"
)

// command decides on one command: the gateway answers it, or the server does.
func (c *control) command(cmd command) {
	if cmd.verb == "" {
		c.refuse(cmd, "500 Empty command.")
		return
	}
	kind := c.opts.classOf(cmd.verb)
	if text := c.opts.refusal(kind, cmd); text != "" {
		c.refuse(cmd, text)
		return
	}
	switch kind {
	case active:
		c.negotiateActive(cmd)
	case passive:
		c.negotiatePassive(cmd)
	default:
		c.forward(&exchange{verb: cmd.verb, secures: kind == secures}, cmd.raw, cmd.line())
	}
}

// refuse is answer with a record in the log.
func (c *control) refuse(cmd command, text string) {
	c.log.Info("command refused", zap.Stringer("flow", c.conn.Tuple()), zap.String("command", cmd.verb), zap.String("reply", text))
	c.answer(cmd.raw, text)
}

// refusal is the reply to a command that the rule does not let through, or
// empty.
//
// AUTH: 534 is RFC 2228's "request denied for policy reasons"; 502 would say
// that the command is not known, 504 that another mechanism might do.
func (o *options) refusal(kind class, cmd command) string {
	switch {
	case kind == unhandled:
		return "502 " + cmd.verb + " refused by the gateway: use PORT, EPRT, PASV or EPSV."
	case kind == secures && !o.passAuth:
		return "534 " + cmd.verb + " refused by the gateway's rules: encrypted control connections are not allowed."
	case kind == secured && !o.passAuth:
		return "533 " + cmd.verb + " refused by the gateway's rules: protected commands are not allowed."
	case o.readOnly && (kind == writes || setsTime(cmd)):
		return "550 " + cmd.verb + " refused by the gateway: this rule is read-only."
	}
	return ""
}

// setsTime recognises the form of MDTM that some servers take for a change of
// the file's time: MDTM 20250101120000 name.
func setsTime(cmd command) bool {
	if cmd.verb != "MDTM" {
		return false
	}
	stamp, _, more := strings.Cut(strings.TrimLeft(cmd.arg, " "), " ")
	if !more || len(stamp) < 14 {
		return false
	}
	for i := range 14 {
		if !isDigit(stamp[i]) {
			return false
		}
	}
	return true
}
