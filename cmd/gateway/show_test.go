package main

import (
	"testing"

	"github.com/sluicegw/sluice/control"
)

func TestWhatIsSpecialAboutAPermission(t *testing.T) {
	for want, p := range map[string]control.Permission{
		"-": {}, "notify": {Notify: true}, "address,one-way": {AddressBased: true, OneWay: true},
	} {
		if got := notes(p); got != want {
			t.Errorf("%+v: %q, want %q", p, got, want)
		}
	}
}

func TestTranslated(t *testing.T) {
	for want, f := range map[string]control.Flow{
		"-": {}, "203.0.113.1:9": {NATSrc: "203.0.113.1:9"}, "> 10.0.0.2:5": {NATDst: "10.0.0.2:5"},
		"203.0.113.1:9 > 203.0.113.10:80": {NATSrc: "203.0.113.1:9", NATDst: "203.0.113.10:80"},
	} {
		if got := translated(f); got != want {
			t.Errorf("%+v: %q, want %q", f, got, want)
		}
	}
}
