package pcp

import (
	"encoding/binary"
	"net/netip"
)

// The sizes of messages (RFC 6887, sections 7 and 11.1 to 13.3).
const (
	maxMessage  = 1100
	headerSize  = 24
	mapSize     = 36
	peerSize    = 56
	optionSize  = 4 // of its head
	filterSize  = 20
	nonceSize   = 12
	clientAt    = 8  // in a request
	reservedAt  = 12 // in a response, its last 96 bits
	reservedLen = 12
)

// version is that of PCP; natpmpVersion is that of its predecessor, on the same
// port.
const (
	version       = 2
	natpmpVersion = 0
)

// responseBit marks responses, in the octet of the opcode.
const responseBit = 0x80

// Opcodes of PCP.
const (
	opAnnounce = iota
	opMap
	opPeer
)

// Options of PCP. The server must understand those below mayIgnore, or refuse
// the request.
const (
	optThirdParty = iota + 1
	optPreferFailure
	optFilter
	mayIgnore = 128
)

// result is the result code of a response (RFC 6887, section 7.4).
type result byte

const (
	success result = iota
	unsuppVersion
	notAuthorized
	malformedRequest
	unsuppOpcode
	unsuppOption
	malformedOption
	networkFailure
	noResources
	unsuppProtocol
	userExQuota
	cannotProvideExternal
	addressMismatch
	excessiveRemotePeers
)

// Lifetimes of errors in seconds: how long the client need not ask again
// (section 7.4).
const (
	shortError = 30
	longError  = 1800
)

// lifetime is that of an error.
func (r result) lifetime() uint32 {
	switch r {
	case networkFailure, noResources, userExQuota, cannotProvideExternal:
		return shortError
	}
	return longError
}

// nonce is what the client proves by that a mapping is its own.
type nonce [nonceSize]byte

// request is what a client asks by PCP, of the opcodes that the server knows.
type request struct {
	opcode   byte
	lifetime uint32 // seconds

	// Of MAP and PEER.
	nonce     nonce
	proto     byte
	internal  uint16
	suggested netip.AddrPort // the address is valid if one is suggested
	remote    netip.AddrPort // of PEER

	preferFailure bool
	filters       []filterOption
	options       []byte // those that were understood, as they came
}

// filterOption is a FILTER option: clear takes all former ones away, else one
// more source may come.
type filterOption struct {
	clear bool
	source
}

// parse reads a request that came from an address. It has at least two octets,
// the version of PCP and no response bit.
func parse(b []byte, from netip.Addr) (r request, res result) {
	if len(b) < headerSize || len(b) > maxMessage || len(b)%4 != 0 {
		return r, malformedRequest
	}
	r.opcode, r.lifetime = b[1], binary.BigEndian.Uint32(b[4:])
	var size int
	switch r.opcode {
	case opAnnounce:
	case opMap:
		size = mapSize
	case opPeer:
		size = peerSize
	default:
		return r, unsuppOpcode
	}
	if address(b[clientAt:]) != from {
		return r, addressMismatch
	}
	body := b[headerSize:]
	if len(body) < size {
		return r, malformedRequest
	}
	if size > 0 {
		r.nonce, r.proto = nonce(body[:nonceSize]), body[12]
		r.internal = binary.BigEndian.Uint16(body[16:])
		r.suggested = netip.AddrPortFrom(address(body[20:]), binary.BigEndian.Uint16(body[18:]))
	}
	if size == peerSize {
		r.remote = netip.AddrPortFrom(address(body[40:]), binary.BigEndian.Uint16(body[36:]))
	}
	return r, r.readOptions(body[size:], from)
}

// readOptions reads what follows the opcode's own fields.
func (r *request) readOptions(b []byte, from netip.Addr) result {
	for len(b) > 0 {
		if len(b) < optionSize {
			return malformedOption
		}
		size := int(binary.BigEndian.Uint16(b[2:]))
		whole := optionSize + (size+3)/4*4 // padded to the next word
		if whole > len(b) {
			return malformedOption
		}
		known, res := r.option(b[0], b[optionSize:optionSize+size], from)
		if res != success {
			return res
		}
		if known {
			r.options = append(r.options, b[:whole]...)
		}
		b = b[whole:]
	}
	return success
}

// option reads one option. What a MAP request alone may have is unknown with
// another opcode.
func (r *request) option(code byte, data []byte, from netip.Addr) (known bool, res result) {
	switch {
	case code >= mayIgnore:
		return false, success
	case r.opcode != opMap:
		return false, unsuppOption
	case code == optPreferFailure:
		if len(data) != 0 || r.preferFailure {
			return false, malformedOption
		}
		r.preferFailure = true
		return true, success
	case code == optFilter:
		f, res := parseFilter(data, from)
		r.filters = append(r.filters, f)
		return true, res
	}
	return false, unsuppOption // THIRD_PARTY is not allowed (section 13.1)
}

// parseFilter reads a FILTER option of a client.
func parseFilter(data []byte, from netip.Addr) (f filterOption, res result) {
	if len(data) != filterSize {
		return f, malformedOption
	}
	bits, port, addr := int(data[1]), binary.BigEndian.Uint16(data[2:]), address(data[4:])
	if bits == 0 {
		return filterOption{clear: true}, success
	}
	if addr.Is4() {
		bits -= 96 // the length counts all of an IPv4-mapped address
	}
	if bits <= 0 || bits > addr.BitLen() || addr.Is4() != from.Is4() {
		return f, malformedOption
	}
	return filterOption{source: source{netip.PrefixFrom(addr, bits).Masked(), port}}, success
}

// address reads an address of 128 bits, where IPv4 is mapped (section 5).
func address(b []byte) netip.Addr {
	return netip.AddrFrom16([16]byte(b[:16])).Unmap()
}

// putAddress writes one.
func putAddress(b []byte, a netip.Addr) {
	wide := a.As16()
	copy(b, wide[:])
}

// refusal is the response to a request that fails: the request, as far as there
// is room, with the result.
func refusal(b []byte, res result, epoch uint32) []byte {
	b = b[:min(len(b), maxMessage)]
	out := make([]byte, max(headerSize, (len(b)+3)/4*4))
	copy(out, b)
	lifetime := res.lifetime()
	head(out, b[1], res, lifetime, epoch)
	if res != malformedRequest && res != unsuppVersion {
		clear(out[reservedAt : reservedAt+reservedLen]) // it was read
	}
	return out
}

// head writes what all responses begin with.
func head(out []byte, opcode byte, res result, lifetime, epoch uint32) {
	out[0], out[1], out[2], out[3] = version, opcode|responseBit, 0, byte(res)
	binary.BigEndian.PutUint32(out[4:], lifetime)
	binary.BigEndian.PutUint32(out[8:], epoch)
}

// announcement is the response to ANNOUNCE, also to one that nobody has sent.
func announcement(epoch uint32) []byte {
	out := make([]byte, headerSize)
	head(out, opAnnounce, success, 0, epoch)
	return out
}

// grant is the response to a MAP or PEER request b that succeeds.
func grant(b []byte, r request, lifetime, epoch uint32, external netip.AddrPort) []byte {
	size := mapSize
	if r.opcode == opPeer {
		size = peerSize
	}
	out := make([]byte, headerSize+size, headerSize+size+len(r.options))
	copy(out[headerSize:], b[headerSize:headerSize+size])
	head(out, r.opcode, success, lifetime, epoch)
	binary.BigEndian.PutUint16(out[headerSize+18:], external.Port())
	putAddress(out[headerSize+20:], external.Addr())
	return append(out, r.options...)
}
