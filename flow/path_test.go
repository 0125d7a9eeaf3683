package flow

import "testing"

// Every conntrack mark means one thing, whatever else is in the other bits.
func TestMarksMeanOneThing(t *testing.T) {
	for _, mask := range []uint32{DefaultMask, 0xf, 0xf0000000} {
		m, err := NewMarks(mask)
		if err != nil {
			t.Fatal(err)
		}
		for name, x := range map[string]struct {
			mark        uint32
			path        Path
			cut, oneWay bool
		}{
			"kernel":     {m.Value(Kernel), Kernel, false, false},
			"user":       {m.Value(User), User, false, false},
			"own":        {m.Value(Own), Own, false, false},
			"none":       {0, Drop, false, false},
			"one way":    {m.OneWay(), Kernel, false, true},
			"cut kernel": {m.CutValue(Kernel), Kernel, true, false},
			"cut user":   {m.CutValue(User), User, true, false},
		} {
			for _, others := range []uint32{0, ^mask} {
				mark := x.mark | others
				if m.Path(mark) != x.path || m.IsCut(mark) != x.cut || m.IsOneWay(mark) != x.oneWay {
					t.Errorf("mask %#x, %s, mark %#x: path %s, cut %v, one way %v", mask, name, mark, m.Path(mark), m.IsCut(mark), m.IsOneWay(mark))
				}
			}
			if x.mark&^mask != 0 {
				t.Errorf("mask %#x, %s: mark %#x has bits of others", mask, name, x.mark)
			}
		}
	}
	for _, mask := range []uint32{0, 0x7, 0x1f, 0x17} {
		if _, err := NewMarks(mask); err == nil {
			t.Errorf("mask %#x was taken", mask)
		}
	}
}
