package flow

// ParseUnreachable reads an ICMP or ICMPv6 "destination unreachable" packet
// that starts with its IP header: the tuple of the packet that it quotes, as
// that was sent, and the path that says the same to its sender. IPv6
// extension headers before the ICMPv6 header are not looked through. It
// allocates nothing and keeps nothing of b. (RFC 792; RFC 4443, 3.1)
func ParseUnreachable(b []byte) (quoted Tuple, told Path, ok bool) {
	const (
		icmpHeader   = 8
		ipv6Header   = 40
		unreachable4 = 3
		unreachable6 = 1
	)
	var paths [4]Path // by code
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && Proto(b[9]) == ICMP:
		head := int(b[0]&15) * 4
		if head < 20 || len(b) < head+icmpHeader || b[head] != unreachable4 {
			return Tuple{}, Drop, false
		}
		paths = [4]Path{0: NetUnreachable, 1: HostUnreachable, 3: PortUnreachable}
		b = b[head:]
	case len(b) >= ipv6Header+icmpHeader && b[0]>>4 == 6 && Proto(b[6]) == ICMPv6 && b[ipv6Header] == unreachable6:
		paths = [4]Path{0: NetUnreachable, 3: HostUnreachable}
		b = b[ipv6Header:]
	default:
		return Tuple{}, Drop, false
	}
	told = Reject
	if code := int(b[1]); code < len(paths) && paths[code] != Drop {
		told = paths[code]
	}
	quoted, _, ok = ParsePacket(b[icmpHeader:])
	return quoted, told, ok
}
