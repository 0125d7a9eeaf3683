package nat

import (
	"strings"
	"testing"
)

func TestRangesCheck(t *testing.T) {
	good := Ranges{Kernel: Range{10000, 32767}, Leases: Range{61000, 65535}, Own: Range{32768, 60999}}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, r := range map[string]Ranges{
		"ports.kernel":        {Kernel: Range{10000, 32768}, Leases: good.Leases, Own: good.Own},
		"ports.leases":        {Kernel: good.Kernel, Leases: Range{60999, 65535}, Own: good.Own},
		"ip_local_port_range": {Kernel: good.Kernel, Leases: good.Leases, Own: Range{1024, 65535}},
	} {
		if err := r.Check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v: got %v, want one that names %s", r, err, name)
		}
	}
}
