package pcp

import (
	"encoding/binary"
	"net/netip"

	"github.com/sluicegw/sluice/flow"
)

// Opcodes of NAT-PMP (RFC 6886, section 3.2 and 3.3).
const (
	pmpAddress = iota
	pmpUDP
	pmpTCP
)

// Result codes of NAT-PMP (section 3.5).
const (
	pmpSuccess           = 0
	pmpNotAuthorized     = 2
	pmpNetworkFailure    = 3
	pmpOutOfResources    = 4
	pmpUnsupportedOpcode = 5
)

// The sizes of its messages.
const (
	pmpMapSize     = 12
	pmpAddressSize = 12 // of the response
	pmpGrantSize   = 16
)

// pmpCode is NAT-PMP's word for a result.
func pmpCode(r result) uint16 {
	switch r {
	case success:
		return pmpSuccess
	case networkFailure:
		return pmpNetworkFailure
	case noResources, userExQuota:
		return pmpOutOfResources
	}
	return pmpNotAuthorized
}

// pmpRequest is a request to map, or, with a lifetime of 0, not to.
type pmpRequest struct {
	proto    flow.Proto
	internal uint16 // 0: all of the protocol
	external uint16 // a wish
	lifetime uint32
}

// parsePMP reads a request to map; false: it is none.
func parsePMP(b []byte) (r pmpRequest, ok bool) {
	if len(b) < pmpMapSize {
		return r, false
	}
	switch b[1] {
	case pmpUDP:
		r.proto = flow.UDP
	case pmpTCP:
		r.proto = flow.TCP
	default:
		return r, false
	}
	r.internal, r.external = binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
	r.lifetime = binary.BigEndian.Uint32(b[8:])
	return r, r.internal != 0 || r.lifetime == 0
}

// pmpHead is what all of its responses begin with.
func pmpHead(size int, opcode byte, code uint16, epoch uint32) []byte {
	out := make([]byte, size)
	out[0], out[1] = natpmpVersion, opcode|responseBit
	binary.BigEndian.PutUint16(out[2:], code)
	binary.BigEndian.PutUint32(out[4:], epoch)
	return out
}

// pmpExternal tells the external address.
func pmpExternal(external netip.Addr, code uint16, epoch uint32) []byte {
	out := pmpHead(pmpAddressSize, pmpAddress, code, epoch)
	if external.Is4() {
		copy(out[8:], external.AsSlice())
	}
	return out
}

// pmpGrant answers a request to map.
func pmpGrant(b []byte, code uint16, epoch uint32, external uint16, lifetime uint32) []byte {
	out := pmpHead(pmpGrantSize, b[1], code, epoch)
	copy(out[8:10], b[4:6])
	binary.BigEndian.PutUint16(out[10:], external)
	binary.BigEndian.PutUint32(out[12:], lifetime)
	return out
}

// pmpUnsupported answers an opcode that nobody knows: what came, with the
// result (section 3.5).
func pmpUnsupported(b []byte, epoch uint32) []byte {
	out := make([]byte, max(8, min(len(b), maxMessage)))
	copy(out, b)
	copy(out, pmpHead(8, b[1], pmpUnsupportedOpcode, epoch))
	return out
}
