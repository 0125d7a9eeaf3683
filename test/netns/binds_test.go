package netns_test

import (
	"slices"
	"time"
)

// listedBind is one line of `gateway binds --json`.
type listedBind struct {
	ID                                                 uint64
	State, Proto, External, Client, By, Rule, Protocol string
	Owner, User                                        string
	Sources                                            []string
	Multiple, Socket                                   bool
	OneWay                                             bool `json:"one_way"`
	SameSource                                         bool `json:"same_source"`
	Session                                            uint64
	Flows                                              int
	Expires                                            *time.Time
}

// binds lists them.
func (s *scene) binds() (all []listedBind) {
	s.t.Helper()
	s.g.JSON(&all, "binds")
	return all
}

// open are those that have not ended; one that has is listed while its flows
// live.
func (s *scene) open() []listedBind {
	s.t.Helper()
	return slices.DeleteFunc(s.binds(), func(b listedBind) bool { return b.State == "used" })
}
