package policy

import "github.com/sluicegw/sluice/flow"

// every is the range of a protocol without ports.
var every = PortRange{0, 65535}

// Builtin are the protocol definitions that need not be written. Ports are
// those of the IANA service name registry unless a line says otherwise. The
// caller owns the result.
func Builtin() []Protocol {
	return []Protocol{
		{Name: "http", Matches: tcp(80)},
		{Name: "https", Matches: both(443)},           // UDP: HTTP/3, RFC 9114
		{Name: "dns", Matches: both(53), Timeout: 10}, // one question and its answer
		{Name: "dns-tls", Matches: both(853)},         // RFC 7858; UDP: RFC 9250
		{Name: "ftp", Matches: tcp(21), Filter: "ftp"},
		{Name: "ftps", Matches: tcp(990)},
		{Name: "ssh", Matches: tcp(22)},
		{Name: "telnet", Matches: tcp(23)},
		{Name: "smtp", Matches: tcp(25)},
		{Name: "smtps", Matches: tcp(465)},
		{Name: "submission", Matches: tcp(587)},
		{Name: "pop3", Matches: tcp(110)},
		{Name: "pop3s", Matches: tcp(995)},
		{Name: "imap", Matches: tcp(143)},
		{Name: "imaps", Matches: tcp(993)},
		{Name: "nntp", Matches: tcp(119)},
		{Name: "whois", Matches: tcp(43)},
		{Name: "finger", Matches: tcp(79)},
		{Name: "ident", Matches: tcp(113)},
		{Name: "ntp", Matches: udp(123)},
		{Name: "snmp", Matches: udp(161)},
		{Name: "snmp-trap", Matches: udp(162)},
		{Name: "syslog", Matches: udp(514)},
		{Name: "syslog-tls", Matches: tcp(6514)},
		{Name: "ldap", Matches: both(389)}, // UDP: Active Directory's locator
		{Name: "ldaps", Matches: tcp(636)},
		{Name: "kerberos", Matches: both(88)},
		{Name: "radius", Matches: append(udp(1812), udp(1813)...)},
		{Name: "rdp", Matches: both(3389)},
		{Name: "vnc", Matches: ports(flow.TCP, 5900, 5909)},
		{Name: "sip", Matches: both(5060), Filter: "sip"},
		{Name: "sips", Matches: tcp(5061)},
		{Name: "stun", Matches: both(3478)},
		{Name: "rtsp", Matches: tcp(554)},
		{Name: "pcp", Matches: udp(5351)}, // and NAT-PMP, RFC 6887 and 6886
		{Name: "tftp", Matches: udp(69), Filter: "tftp"},
		{Name: "irc", Matches: ports(flow.TCP, 6665, 6669)},
		{Name: "ircs", Matches: tcp(6697)},
		{Name: "xmpp", Matches: append(tcp(5222), tcp(5269)...)},
		{Name: "mqtt", Matches: append(tcp(1883), tcp(8883)...)},
		{Name: "ike", Matches: append(udp(500), udp(4500)...)}, // RFC 7296, RFC 3948
		{Name: "esp", Matches: ip(50)},
		{Name: "ah", Matches: ip(51)},
		{Name: "gre", Matches: ip(47)},
		{Name: "pptp", Matches: tcp(1723)},
		{Name: "l2tp", Matches: udp(1701)},
		{Name: "openvpn", Matches: both(1194)},
		{Name: "wireguard", Matches: udp(51820)}, // the usual port, not registered
		{Name: "dhcp", Matches: ports(flow.UDP, 67, 68)},
		{Name: "dhcpv6", Matches: ports(flow.UDP, 546, 547)},
		{Name: "mdns", Matches: udp(5353)},
		{Name: "ping", Matches: append(icmp(8), icmpv6(128)...)},
		{Name: "traceroute", Matches: ports(flow.UDP, 33434, 33534)}, // what traceroute(8) counts through
		{Name: "mysql", Matches: tcp(3306)},
		{Name: "postgresql", Matches: tcp(5432)},
		{Name: "mssql", Matches: append(tcp(1433), udp(1434)...)},
		{Name: "redis", Matches: tcp(6379)},
		{Name: "mongodb", Matches: tcp(27017)},
		{Name: "smb", Matches: tcp(445)},
		{Name: "netbios", Matches: append(ports(flow.UDP, 137, 138), tcp(139)...)},
		{Name: "nfs", Matches: both(2049)},
		{Name: "rpcbind", Matches: both(111)},
		{Name: "rsync", Matches: tcp(873)},
		{Name: "git", Matches: tcp(9418)},
		{Name: "ipp", Matches: tcp(631)},
		{Name: "jetdirect", Matches: tcp(9100)},
	}
}

func ports(p flow.Proto, lo, hi uint16) []Match { return []Match{{p, PortRange{lo, hi}}} }
func tcp(port uint16) []Match                   { return ports(flow.TCP, port, port) }
func udp(port uint16) []Match                   { return ports(flow.UDP, port, port) }
func both(port uint16) []Match                  { return append(tcp(port), udp(port)...) }
func icmp(typ uint16) []Match                   { return ports(flow.ICMP, typ, typ) }
func icmpv6(typ uint16) []Match                 { return ports(flow.ICMPv6, typ, typ) }
func ip(p flow.Proto) []Match                   { return []Match{{p, every}} }
