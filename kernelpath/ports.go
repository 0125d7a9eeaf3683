package kernelpath

import (
	"fmt"

	"github.com/sluicegw/sluice/nat"
)

// LocalPorts is the range that the kernel takes the ports of the gateway's own
// sockets from (net.ipv4.ip_local_port_range, which IPv6 uses as well).
func LocalPorts() (nat.Range, error) {
	text, err := readSysctl("net/ipv4/ip_local_port_range")
	if err != nil {
		return nat.Range{}, err
	}
	var r nat.Range
	if _, err := fmt.Sscan(text, &r.Lo, &r.Hi); err != nil {
		return nat.Range{}, fmt.Errorf("read net.ipv4.ip_local_port_range %q: %w", text, err)
	}
	return r, nil
}
