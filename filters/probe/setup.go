package probe

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/sluicegw/sluice/filterapi"
)

// setup is how a probe begins. It is the file NAME.json beside its socket.
type setup struct {
	Init      registration `json:"init"`
	Session   registration `json:"session"`
	InitError string       `json:"init_error"`
	InitPanic bool         `json:"init_panic"`
	FailOpen  bool         `json:"fail_open"`
}

// registration is a filterapi.Events in words.
type registration struct {
	Types     []string `json:"types"`
	Any       bool     `json:"any"`
	Secondary bool     `json:"secondary"`
	Sources   []string `json:"sources"`
}

var kinds = map[string]filterapi.EventMask{
	"ConnectTCP": filterapi.ConnectTCP, "UDPDestination": filterapi.UDPDestination,
	"BindTCP": filterapi.BindTCP, "BindUDP": filterapi.BindUDP, "Listen": filterapi.Listen,
	"Accepted": filterapi.Accepted, "Terminating": filterapi.Terminating, "Established": filterapi.Established,
}

var sources = map[string]filterapi.Sources{"Transparent": filterapi.Transparent, "Explicit": filterapi.Explicit}

// everything is what the first probe hears of unless its setup says otherwise.
var everything = []string{"ConnectTCP", "UDPDestination", "BindTCP", "BindUDP", "Listen", "Accepted", "Terminating"}

func (r registration) events() filterapi.Events {
	e := filterapi.Events{AnyProtocol: r.Any, Secondary: r.Secondary}
	for _, t := range r.Types {
		e.Types |= kinds[t]
	}
	for _, s := range r.Sources {
		e.Sources |= sources[s]
	}
	return e
}

func (r registration) check() error {
	for _, t := range r.Types {
		if kinds[t] == 0 {
			return fmt.Errorf("unknown event %q", t)
		}
	}
	for _, s := range r.Sources {
		if sources[s] == 0 {
			return fmt.Errorf("unknown source %q", s)
		}
	}
	return nil
}

// firstName is the probe that works without a setup.
const firstName = "probe"

// socketOf is where a probe listens.
func socketOf(first, name string) string {
	if first == "" || name == firstName {
		return first
	}
	return filepath.Join(filepath.Dir(first), name)
}

// readSetup reads the file beside the socket. Without one the first probe hears
// of everything in its protocols, and any other one of nothing.
func readSetup(socket, name string) (setup, error) {
	var s setup
	if name == firstName {
		s.Init.Types, s.Session.Types = everything, everything
	}
	if socket == "" {
		return s, nil
	}
	text, err := os.ReadFile(socket + ".json")
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("probe setup: %w", err)
	}
	s = setup{}
	if err := errors.Join(json.Unmarshal(text, &s), s.Init.check(), s.Session.check()); err != nil {
		return s, fmt.Errorf("probe setup: %w", err)
	}
	return s, nil
}

// addressRange reads an address, or two with a hyphen between.
func addressRange(s string) (lo, hi netip.Addr, err error) {
	first, last, isRange := strings.Cut(s, "-")
	if lo, err = netip.ParseAddr(first); err != nil || !isRange {
		return lo, lo, err
	}
	hi, err = netip.ParseAddr(last)
	return lo, hi, err
}
