package kernelpath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/nat"
)

// is matches a field that has exactly this value:  iifname "lan0"
func is(f field, v value) stmt { return compare(f, v, expr.CmpOpEq, f.text+" "+v.text) }

// isNot is the opposite:  ct state != new
func isNot(f field, v value) stmt { return compare(f, v, expr.CmpOpNeq, f.text+" != "+v.text) }

func compare(f field, v value, op expr.CmpOp, text string) stmt {
	return stmt{text, func(c *code) {
		c.add(f.load(1), &expr.Cmp{Op: op, Register: 1, Data: v.raw})
	}}
}

// masked matches some bits of a mark:  ct mark and 0x07000000 == 0x05000000
func masked(f field, mask, want uint32) stmt { return maskCompare(f, mask, want, expr.CmpOpEq, "==") }

func maskedNot(f field, mask, want uint32) stmt {
	return maskCompare(f, mask, want, expr.CmpOpNeq, "!=")
}

func maskCompare(f field, mask, want uint32, op expr.CmpOp, word string) stmt {
	text := fmt.Sprintf("%s and 0x%08x %s 0x%08x", f.text, mask, word, want)
	return stmt{text, func(c *code) {
		c.add(f.load(1), bits(mask), &expr.Cmp{Op: op, Register: 1, Data: markValue(want).raw})
	}}
}

// within matches an IPv4 address in a prefix:  ip saddr and 255.255.255.0 == 10.0.0.0
func within(f field, p netip.Prefix) stmt {
	key := firstBits(f, ipv4, p.Bits())
	return stmt{fmt.Sprintf("%s == %s", key.text, p.Addr()), func(c *code) {
		c.load([]field{key})
		c.add(&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()})
	}}
}

// bits keeps the bits of a mask in register 1.
func bits(mask uint32) expr.Any { return maskAndSet(mask, 0) }

func maskAndSet(mask, set uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: markValue(mask).raw, Xor: markValue(set).raw}
}

// ctStates matches one of several states:  ct state established,related
func ctStates(states ...value) stmt {
	var mask uint32
	names := make([]string, len(states))
	for i, s := range states {
		mask |= binary.NativeEndian.Uint32(s.raw)
		names[i] = s.text
	}
	return stmt{"ct state " + strings.Join(names, ","), func(c *code) {
		c.add(fieldCtState.load(1), bits(mask), &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)})
	}}
}

var (
	stateEstablished = host32("established", expr.CtStateBitESTABLISHED)
	stateRelated     = host32("related", expr.CtStateBitRELATED)
	stateNew         = host32("new", expr.CtStateBitNEW)
	stateUntracked   = host32("untracked", expr.CtStateBitUNTRACKED)
)

// ctTranslated matches a flow whose destination was translated.
func ctTranslated() stmt {
	const dstNAT = 1 << 5 // IPS_DST_NAT, nf_conntrack_common.h
	return stmt{"ct status dnat", func(c *code) {
		c.add(fieldCtStatus.load(1), bits(dstNAT), &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)})
	}}
}

// TCP flags, RFC 9293 section 3.1.
const (
	tcpFIN = 1 << iota
	tcpSYN
	tcpRST
	_
	tcpACK
)

// notOpening matches a TCP segment that does not open a connection.
func notOpening() stmt {
	return tcpFlags("tcp flags & (fin|syn|rst|ack) != syn", tcpFIN|tcpSYN|tcpRST|tcpACK, expr.CmpOpNeq, tcpSYN)
}

// closing matches a TCP segment that ends its direction.
func closing() stmt { return tcpFlags("tcp flags & fin == fin", tcpFIN, expr.CmpOpEq, tcpFIN) }

func tcpFlags(text string, mask byte, op expr.CmpOp, want byte) stmt {
	return stmt{text, func(c *code) {
		c.add(fieldTCPFlags.load(1),
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{mask}, Xor: []byte{0}},
			&expr.Cmp{Op: op, Register: 1, Data: []byte{want}})
	}}
}

// noRoute matches a source address that no route leads back to; strict: that
// no route leads back to through the interface the packet came from.
func noRoute(strict bool) stmt {
	text := "fib saddr oif missing"
	if strict {
		text = "fib saddr . iif oif missing"
	}
	return stmt{text, func(c *code) {
		c.add(&expr.Fib{Register: 1, ResultOIF: true, FlagPRESENT: true, FlagSADDR: true, FlagIIF: strict},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)})
	}}
}

// oneOf matches a field against an anonymous set:  meta l4proto { tcp, udp }
func oneOf(f field, values ...value) stmt {
	s := &set{key: []nftables.SetDatatype{f.typ}}
	names := make([]string, len(values))
	for i, v := range values {
		s.elems = append(s.elems, element{text: v.text, key: v.raw})
		names[i] = v.text
	}
	return stmt{fmt.Sprintf("%s { %s }", f.text, strings.Join(names, ", ")), func(c *code) {
		name, id := c.anonymous(s)
		c.add(f.load(1), &expr.Lookup{SourceRegister: 1, SetName: name, SetID: id})
	}}
}

// in matches a key against a named set:  ip saddr . th dport @once4
func in(name string, key ...field) stmt {
	return stmt{fieldText(key) + " @" + name, func(c *code) {
		c.load(key)
		c.add(&expr.Lookup{SourceRegister: 1, SetName: name})
	}}
}

// ports matches a range of ports:  th dport 40000-49999
func ports(f field, r nat.Range) stmt {
	return stmt{fmt.Sprintf("%s %s", f.text, r), func(c *code) {
		c.add(f.load(1), &expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: portValue(r.Lo).raw},
			&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: portValue(r.Hi).raw})
	}}
}

// fromTo matches both ports of TCP or UDP:  th sport 67 th dport 68
func fromTo(sport, dport uint16) stmt {
	return stmt{fmt.Sprintf("th sport %d th dport %d", sport, dport), func(c *code) {
		c.add(&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 4},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append(portValue(sport).raw, portValue(dport).raw...)})
	}}
}

// load puts a key into the registers from 1 on.
func (c *code) load(key []field) {
	for i, r := range registers(fieldTypes(key)) {
		c.add(key[i].load(r))
		if m := key[i].mask; m != nil {
			c.add(&expr.Bitwise{SourceRegister: r, DestRegister: r, Len: uint32(len(m)), Mask: m, Xor: make([]byte, len(m))})
		}
	}
}

// vmap goes where a named verdict map says:  iifname vmap @zones
func vmap(name string, key ...field) stmt {
	return stmt{fieldText(key) + " vmap @" + name, func(c *code) {
		c.load(key)
		c.add(&expr.Lookup{SourceRegister: 1, SetName: name, IsDestRegSet: true})
	}}
}

// branch is one entry of an anonymous verdict map.
type branch struct {
	key []value
	to  stmt
}

// switchOn goes where an anonymous verdict map says:
//
//	meta nfproto . meta l4proto vmap { ipv4 . tcp : goto a, ipv6 . udp : accept }
func switchOn(key []field, branches []branch) stmt {
	s := verdictSet(key, branches)
	return stmt{fmt.Sprintf("%s vmap { %s }", fieldText(key), branchText(s)), func(c *code) {
		name, id := c.anonymous(s)
		c.load(key)
		c.add(&expr.Lookup{SourceRegister: 1, SetName: name, SetID: id, IsDestRegSet: true})
	}}
}

// switchMark does the same with some bits of a mark:
//
//	ct mark and 0x0f000000 vmap { 0x05000000 : accept }
func switchMark(f field, mask uint32, branches []branch) stmt {
	s := verdictSet([]field{f}, branches)
	return stmt{fmt.Sprintf("%s and 0x%08x vmap { %s }", f.text, mask, branchText(s)), func(c *code) {
		name, id := c.anonymous(s)
		c.add(f.load(1), bits(mask), &expr.Lookup{SourceRegister: 1, SetName: name, SetID: id, IsDestRegSet: true})
	}}
}

func verdictSet(key []field, branches []branch) *set {
	s := &set{key: fieldTypes(key), data: []nftables.SetDatatype{nftables.TypeVerdict}}
	for _, b := range branches {
		s.elems = append(s.elems, verdictElement(b.key, b.to))
	}
	return s
}

// verdictElement is an element of a verdict map; to is a bare verdict.
func verdictElement(key []value, to stmt) element {
	raw := make([][]byte, len(key))
	names := make([]string, len(key))
	for i, v := range key {
		raw[i], names[i] = v.raw, v.text
	}
	return element{
		text: strings.Join(names, " . ") + " : " + to.text,
		key:  pack(raw...), verdict: verdictOf(to),
	}
}

func verdictOf(s stmt) *expr.Verdict {
	c := rule{s}.compile(new(uint32))
	return c.exprs[0].(*expr.Verdict)
}

func branchText(s *set) string {
	texts := make([]string, len(s.elems))
	for i, e := range s.elems {
		texts[i] = e.text
	}
	return strings.Join(texts, ", ")
}

// dynsetDelete is NFT_DYNSET_OP_DELETE of linux/netfilter/nf_tables.h.
const dynsetDelete = 2

// remove takes the packet's key out of a set:  delete @once4 { ip saddr ... }
func remove(name string, key ...field) stmt {
	return dynset(fmt.Sprintf("delete @%s { %s }", name, fieldText(key)), name, dynsetDelete, 0, key)
}

// insert puts the packet's key into a set:  add @peer4 { ip saddr ... }
func insert(name string, key ...field) stmt {
	return dynset(fmt.Sprintf("add @%s { %s }", name, fieldText(key)), name, unix.NFT_DYNSET_OP_ADD, 0, key)
}

// refresh puts the packet's key into a set, or starts its time anew.
func refresh(name string, timeout time.Duration, key ...field) stmt {
	text := fmt.Sprintf("update @%s { %s timeout %ds }", name, fieldText(key), int(timeout/time.Second))
	return dynset(text, name, unix.NFT_DYNSET_OP_UPDATE, timeout, key)
}

func dynset(text, name string, op uint32, timeout time.Duration, key []field) stmt {
	return stmt{text, func(c *code) {
		c.load(key)
		c.add(&expr.Dynset{SrcRegKey: 1, SetName: name, Operation: op, Timeout: timeout})
	}}
}
