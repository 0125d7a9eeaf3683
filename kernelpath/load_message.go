package kernelpath

import (
	"encoding/binary"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The messages of nfnetlink's nf_tables subsystem, as far as the table needs
// them (linux/netfilter/nf_tables.h). Expressions are encoded by
// google/nftables; transactions are our own, because an answer that carries
// the number of its message can be traced to what was asked for, and because
// one acknowledgement for a whole transaction cannot overrun the socket.

// Constants of linux/netfilter/nf_tables.h that no package has.
const (
	msgNewFlowtable  = 0x16
	msgGetFlowtable  = 0x17
	msgDelFlowtable  = 0x18
	setFlagConcat    = 0x80
	attrDescConcat   = 2
	attrElemKeyEnd   = 10
	attrListElem     = 1
	udataByteOrder   = 0
	udataComment     = 7
	attrFlowTable    = 1
	attrFlowName     = 2
	attrFlowHook     = 3
	attrFlowFlags    = 7
	attrFlowHookNum  = 1
	attrFlowPriority = 2
	attrFlowDevices  = 3
	attrDeviceName   = 1
	attrFlowHandle   = 5
	attrTableHandle  = 4
	attrSetHandle    = 16
	attrObjectHandle = 6
	flowCounter      = 2 // NFT_FLOWTABLE_COUNTER
	hookIngress      = 0 // NF_NETDEV_INGRESS
)

const nested = unix.NLA_F_NESTED

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

func text(s string) []byte { return append([]byte(s), 0) }

// attr is one netlink attribute; nest one that holds others.
func attr(typ uint16, data []byte) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: data}
}

func nest(typ uint16, inner ...netlink.Attribute) (netlink.Attribute, error) {
	data, err := netlink.MarshalAttributes(inner)
	return netlink.Attribute{Type: typ | nested, Data: data}, err
}

// transaction is a batch of messages that the kernel applies as a whole or not
// at all.
type transaction struct {
	msgs []message
	err  error // the first that could not be encoded
	ids  uint32
}

type message struct {
	typ   uint16
	flags uint16
	data  []byte
	what  string // for the error
}

// Flags of a message that makes something.
const (
	create = unix.NLM_F_CREATE
	atEnd  = unix.NLM_F_CREATE | unix.NLM_F_APPEND
)

func (t *transaction) put(what string, typ, flags uint16, attrs ...netlink.Attribute) {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil && t.err == nil {
		t.err = fmt.Errorf("encode %s: %w", what, err)
	}
	t.msgs = append(t.msgs, message{typ, flags, data, what})
}

// inner is nest with the error kept for the end.
func (t *transaction) inner(typ uint16, attrs ...netlink.Attribute) netlink.Attribute {
	a, err := nest(typ, attrs...)
	if err != nil && t.err == nil {
		t.err = fmt.Errorf("encode attribute %d: %w", typ, err)
	}
	return a
}

func (t *transaction) addTable()    { t.addTableNamed(tableName) }
func (t *transaction) deleteTable() { t.deleteTableNamed(tableName) }

func (t *transaction) addTableNamed(name string) {
	t.put("table "+name, unix.NFT_MSG_NEWTABLE, create, attr(unix.NFTA_TABLE_NAME, text(name)), attr(unix.NFTA_TABLE_FLAGS, be32(0)))
}

func (t *transaction) deleteTableNamed(name string) {
	t.put("table "+name, unix.NFT_MSG_DELTABLE, 0, attr(unix.NFTA_TABLE_NAME, text(name)))
}

// flushRules deletes all rules of all chains.
func (t *transaction) flushRules() {
	t.put("rules of table "+tableName, unix.NFT_MSG_DELRULE, 0, attr(unix.NFTA_RULE_TABLE, text(tableName)))
}

func (t *transaction) addChain(c *chain) {
	attrs := []netlink.Attribute{attr(unix.NFTA_CHAIN_TABLE, text(tableName)), attr(unix.NFTA_CHAIN_NAME, text(c.name))}
	if h := c.hook; h != nil {
		attrs = append(attrs,
			t.inner(unix.NFTA_CHAIN_HOOK, attr(unix.NFTA_HOOK_HOOKNUM, be32(uint32(h.num))), attr(unix.NFTA_HOOK_PRIORITY, be32(uint32(h.priority)))),
			attr(unix.NFTA_CHAIN_POLICY, be32(uint32(h.policy))),
			attr(unix.NFTA_CHAIN_TYPE, text(string(h.typ))))
	}
	t.put("chain "+c.name, unix.NFT_MSG_NEWCHAIN, create, attrs...)
}

func (t *transaction) deleteChain(name string) {
	t.put("chain "+name, unix.NFT_MSG_DELCHAIN, 0, attr(unix.NFTA_CHAIN_TABLE, text(tableName)), attr(unix.NFTA_CHAIN_NAME, text(name)))
}

func (t *transaction) addCounter(name string) {
	counter := t.inner(unix.NFTA_OBJ_DATA, attr(unix.NFTA_COUNTER_BYTES, make([]byte, 8)), attr(unix.NFTA_COUNTER_PACKETS, make([]byte, 8)))
	t.put("counter "+name, unix.NFT_MSG_NEWOBJ, create,
		attr(unix.NFTA_OBJ_TABLE, text(tableName)), attr(unix.NFTA_OBJ_NAME, text(name)),
		attr(unix.NFTA_OBJ_TYPE, be32(unix.NFT_OBJECT_COUNTER)), counter)
}

// addSet makes a set and fills it. id is the number that rules of the same
// transaction may call an anonymous set by; 0: any.
func (t *transaction) addSet(s *set, id uint32) {
	if id == 0 {
		t.ids++
		id = t.ids
	}
	name, what := s.name, s.label()
	if name == "" {
		name = anonymousName(s)
	}
	fields := make([]netlink.Attribute, len(s.key))
	for i, k := range s.key {
		fields[i] = t.inner(attrListElem, attr(1, be32(k.Bytes)))
	}
	var desc []netlink.Attribute
	if n := s.sizeHint(); n > 0 {
		desc = append(desc, attr(unix.NFTA_SET_DESC_SIZE, be32(n)))
	}
	if len(s.key) > 1 {
		desc = append(desc, t.inner(attrDescConcat, fields...))
	}
	attrs := []netlink.Attribute{
		attr(unix.NFTA_SET_TABLE, text(tableName)), attr(unix.NFTA_SET_NAME, text(name)), attr(unix.NFTA_SET_ID, be32(id)),
		attr(unix.NFTA_SET_FLAGS, be32(s.flags())), attr(unix.NFTA_SET_KEY_TYPE, be32(typeSum(s.key))), attr(unix.NFTA_SET_KEY_LEN, be32(keyLength(s.key))),
	}
	if typ, size, ok := s.dataType(); ok {
		attrs = append(attrs, attr(unix.NFTA_SET_DATA_TYPE, be32(typ)), attr(unix.NFTA_SET_DATA_LEN, be32(size)))
	}
	if len(desc) > 0 {
		attrs = append(attrs, t.inner(unix.NFTA_SET_DESC, desc...))
	}
	attrs = append(attrs, attr(unix.NFTA_SET_USERDATA, s.userdata()))
	t.put(what, unix.NFT_MSG_NEWSET, create, attrs...)
	t.addElements(s, id, s.elems)
}

func (t *transaction) deleteSet(name string) {
	t.put("set "+name, unix.NFT_MSG_DELSET, 0, attr(unix.NFTA_SET_TABLE, text(tableName)), attr(unix.NFTA_SET_NAME, text(name)))
}

// elementBytes bounds the elements of one message: the length of an attribute
// is 16 bits.
const elementBytes = 48 << 10

// addElements puts elements into a set, in as many messages as they need.
func (t *transaction) addElements(s *set, id uint32, elems []element) {
	t.elements(unix.NFT_MSG_NEWSETELEM, create, s, id, elems)
}

func (t *transaction) deleteElements(s *set, elems []element) {
	t.elements(unix.NFT_MSG_DELSETELEM, 0, s, 0, elems)
}

// flushSet deletes all elements.
func (t *transaction) flushSet(name string) {
	t.put("elements of "+name, unix.NFT_MSG_DELSETELEM, 0,
		attr(unix.NFTA_SET_ELEM_LIST_TABLE, text(tableName)), attr(unix.NFTA_SET_ELEM_LIST_SET, text(name)))
}

func (t *transaction) elements(typ, flags uint16, s *set, id uint32, elems []element) {
	name := s.name
	if name == "" {
		name = anonymousName(s)
	}
	head := []netlink.Attribute{attr(unix.NFTA_SET_ELEM_LIST_TABLE, text(tableName)), attr(unix.NFTA_SET_ELEM_LIST_SET, text(name))}
	if id != 0 {
		head = append(head, attr(unix.NFTA_SET_ELEM_LIST_SET_ID, be32(id)))
	}
	for first := 0; first < len(elems); {
		n := 0
		list := make([]byte, 0, min(elementBytes, 64*(len(elems)-first))+256)
		for ; first+n < len(elems) && len(list) < elementBytes; n++ {
			list = appendElement(list, s, &elems[first+n])
		}
		what := fmt.Sprintf("%s, element %d to %d", s.label(), first+1, first+n)
		if n == 1 {
			what = fmt.Sprintf("%s, element %s", s.label(), elems[first].label())
		}
		t.put(what, typ, flags, append(head[:len(head):len(head)], attr(unix.NFTA_SET_ELEM_LIST_ELEMENTS|nested, list))...)
		first += n
	}
}

// appendElement adds one element; a range of a plain interval set is two: where
// it begins and where it ends. Many of them wait for each other's transaction, so
// that they are written in place.
func appendElement(b []byte, s *set, e *element) []byte {
	plainRange := s.interval && len(s.key) == 1
	b, elem := beginAttr(b, attrListElem)
	b = appendData(b, unix.NFTA_SET_ELEM_KEY, e.key)
	if len(e.end) > 0 && !plainRange {
		b = appendData(b, attrElemKeyEnd, e.end)
	}
	switch {
	case e.verdict != nil:
		var data, v int
		b, data = beginAttr(b, unix.NFTA_SET_ELEM_DATA)
		b, v = beginAttr(b, unix.NFTA_DATA_VERDICT)
		b = appendAttr32(b, unix.NFTA_VERDICT_CODE, uint32(e.verdict.Kind))
		if e.verdict.Chain != "" {
			b = appendAttr(b, unix.NFTA_VERDICT_CHAIN, text(e.verdict.Chain)...)
		}
		endAttr(b, v)
		endAttr(b, data)
	case len(e.val) > 0:
		b = appendData(b, unix.NFTA_SET_ELEM_DATA, e.val)
	}
	if e.timeout > 0 {
		ms := max(e.timeout.Milliseconds(), 1)
		var eight [8]byte
		binary.BigEndian.PutUint64(eight[:], uint64(ms))
		b = appendAttr(b, unix.NFTA_SET_ELEM_TIMEOUT, eight[:]...)
	}
	endAttr(b, elem)
	if plainRange && len(e.end) > 0 {
		b, elem = beginAttr(b, attrListElem)
		b = appendData(b, unix.NFTA_SET_ELEM_KEY, e.end)
		b = appendAttr32(b, unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
		endAttr(b, elem)
	}
	return b
}

// appendData adds a value as nf_tables wants it: an attribute in an attribute.
func appendData(b []byte, kind uint16, value []byte) []byte {
	b, at := beginAttr(b, kind)
	b = appendAttr(b, unix.NFTA_DATA_VALUE, value...)
	endAttr(b, at)
	return b
}

// beginAttr opens an attribute that holds others, until endAttr.
func beginAttr(b []byte, kind uint16) ([]byte, int) {
	b = binary.NativeEndian.AppendUint16(b, 0)
	return binary.NativeEndian.AppendUint16(b, kind|nested), len(b) - 2
}

func endAttr(b []byte, at int) { binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at)) }

// addRule appends a rule to a chain, with its anonymous sets.
func (t *transaction) addRule(chain string, r rule) {
	c := r.compile(&t.ids)
	for i, s := range c.sets {
		t.addSet(s, c.ids[i])
	}
	list := make([]netlink.Attribute, len(c.exprs))
	for i, e := range c.exprs {
		data, err := marshalExpr(e)
		if err != nil && t.err == nil {
			t.err = fmt.Errorf("encode rule %q: %w", r, err)
		}
		list[i] = netlink.Attribute{Type: attrListElem | nested, Data: data}
	}
	t.put(fmt.Sprintf("rule of chain %s: %s", chain, r), unix.NFT_MSG_NEWRULE, atEnd,
		attr(unix.NFTA_RULE_TABLE, text(tableName)), attr(unix.NFTA_RULE_CHAIN, text(chain)),
		t.inner(unix.NFTA_RULE_EXPRESSIONS, list...))
}

// marshalExpr encodes an expression. google/nftables leaves out the direction
// of a conntrack address of one family and writes that of a port in another
// form (here it is always the original one), and of a masquerade into a port
// range it leaves out the flag without which the kernel ignores the range.
func marshalExpr(e expr.Any) ([]byte, error) {
	switch e := e.(type) {
	case *expr.Ct:
		switch e.Key {
		case unix.NFT_CT_SRC_IP, unix.NFT_CT_DST_IP, unix.NFT_CT_SRC_IP6, unix.NFT_CT_DST_IP6, expr.CtKeyPROTODST:
			return encodeExpr("ct", attr(unix.NFTA_CT_KEY, be32(uint32(e.Key))),
				attr(unix.NFTA_CT_DREG, be32(e.Register)), attr(unix.NFTA_CT_DIRECTION, []byte{0}))
		}
	case *expr.Masq:
		if e.ToPorts {
			return encodeExpr("masq", attr(unix.NFTA_MASQ_FLAGS, be32(unix.NF_NAT_RANGE_PROTO_SPECIFIED)),
				attr(unix.NFTA_MASQ_REG_PROTO_MIN, be32(e.RegProtoMin)), attr(unix.NFTA_MASQ_REG_PROTO_MAX, be32(e.RegProtoMax)))
		}
	}
	return expr.Marshal(byte(nftables.TableFamilyINet), e)
}

func encodeExpr(name string, attrs ...netlink.Attribute) ([]byte, error) {
	data, err := nest(unix.NFTA_EXPR_DATA, attrs...)
	if err != nil {
		return nil, err
	}
	return netlink.MarshalAttributes([]netlink.Attribute{attr(unix.NFTA_EXPR_NAME, text(name)), data})
}
