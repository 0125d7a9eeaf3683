package nat

import (
	"strings"
	"testing"
)

func TestRangesCheck(t *testing.T) {
	good := Ranges{Kernel: Range{10000, 19999}, Leases: []Range{{20000, 32767}, {61000, 65535}}, WellKnown: Range{512, 1023}, Own: Range{32768, 60999}}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Ranges){
		"ports.kernel":        func(r *Ranges) { r.Kernel.Hi = 20000 },
		"ports.leases":        func(r *Ranges) { r.Leases = []Range{{20000, 32767}, {60999, 65535}} },
		"ports.leases (30000": func(r *Ranges) { r.Leases = []Range{{20000, 32767}, {30000, 30001}} },
		"ports.well_known":    func(r *Ranges) { r.WellKnown.Hi, r.Kernel.Lo = 1024, 1024 },
		"ip_local_port_range": func(r *Ranges) { r.Own = Range{1024, 65535} },
	} {
		r := good
		if change(&r); r.Check() == nil || !strings.Contains(r.Check().Error(), name) {
			t.Errorf("%v: got %v, want one that names %s", r, r.Check(), name)
		}
	}
}
