package policy

import (
	"fmt"
	"net/netip"
	"testing"
)

func TestJudgeProtocol(t *testing.T) {
	p := office(t)
	for _, c := range []struct {
		q, name string
		want    string // class, rule, filters and reason
	}{
		// The port says nothing.
		{"tcp 10.0.0.2 lan0 > 203.0.113.9:23 wan0", "http", "kernel web 0 "},
		{"tcp 10.0.0.2 lan0 > 203.0.113.9:80 wan0", "telnet", "reject no-telnet 0 rule"},
		{"udp 10.0.0.2 lan0 > 203.0.113.9:9 wan0", "ftp", "ask files 1 "},
		{"udp 10.0.0.2 lan0 > 203.0.113.9:9 wan0", "chat", "ask files 1 "},
		{"tcp 10.0.0.2 lan0 > 203.0.113.9:80 wan0", "ldap", "reject  0 default"},
		{"tcp 10.0.0.2 lan0 > 192.168.1.9:80 dmz0", "ldap", "kernel everything-odd 0 "},
		{"tcp 10.0.0.7 lan0 > 203.0.113.9:80 wan0", "telnet", "ask boss-may 0 "},
		{"tcp 10.0.0.2 lan0 > 10.0.0.1:1 self", "ssh", "kernel admin 0 "},
		{"tcp 203.0.113.9 wan0 > 10.0.0.2:80 lan0", "ssh", "drop  0 network"},
		{"tcp fd00:a::2 lan0 > 203.0.113.9:80 wan0", "http", "drop  0 default"}, // both families at once
		// Nobody in particular.
		{"tcp 10.0.0.2 lan0", "http", "kernel web 0 "},
		{"tcp 10.0.0.2 lan0", "ftp", "ask files 1 "},
		{"tcp 10.0.0.2 lan0", "ldap", "kernel everything-odd 0 "},
		{"tcp 10.0.0.2 lan0", "telnet", "reject no-telnet 0 rule"},
		{"tcp 10.0.0.7 lan0", "telnet", "ask boss-may 0 "},
		{"tcp 192.168.1.9 dmz0", "http", "drop  0 default"},
		{"tcp 192.168.1.9 dmz0", "ssh", "kernel back 0 "}, // a route rule joins both ways
		{"tcp 203.0.113.9 wan0", "ssh", "drop  0 network"},
		// Unknown.
		{"tcp 10.0.0.2 lan0 > 203.0.113.9:80 wan0", "no-such", "drop  0 protocol"},
		{"tcp 10.0.0.7 lan0", AnyProtocol, "drop  0 protocol"},
	} {
		v := p.JudgeProtocol(partly(t, c.q), c.name)
		rule := ""
		if v.Rule != nil {
			rule = v.Rule.Name
		}
		class := map[Class]string{ClassDrop: "drop", ClassReject: "reject", ClassKernel: "kernel", ClassAsk: "ask", ClassAskOpen: "ask"}[v.Class]
		if got := fmt.Sprintf("%s %s %d %s", class, rule, len(v.Filters), v.Reason); got != c.want {
			t.Errorf("%s as %s: %q, want %q", c.q, c.name, got, c.want)
		}
		if known := v.Reason != ReasonProtocol; known != (v.Protocol != nil) || known && v.Protocol.Name != c.name {
			t.Errorf("%s as %s: protocol %v", c.q, c.name, v.Protocol)
		}
		if v.Class != ClassDrop && v.Class != ClassReject && v.NetworkRule == nil && !partly(t, c.q).ToGateway {
			t.Errorf("%s as %s: no network rule", c.q, c.name)
		}
	}
}

// partly is question, also without a destination.
func partly(t *testing.T, text string) Question {
	var proto, src, iface string
	if n, _ := fmt.Sscan(text, &proto, &src, &iface); n == 3 && len(text) == len(proto)+len(src)+len(iface)+2 {
		q := question(t, text+" > 192.0.2.1:1 wan0")
		q.Dst, q.OutIface = netip.AddrPort{}, ""
		return q
	}
	return question(t, text)
}
