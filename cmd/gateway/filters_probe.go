//go:build probe

package main

import (
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filters/probe"
)

// extra adds the filters that the black-box tests drive.
func extra() []filterapi.Filter { return []filterapi.Filter{probe.New("probe"), probe.New("probe2")} }
