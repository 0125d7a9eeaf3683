//go:build !probe

package main

import "github.com/sluicegw/sluice/filterapi"

// extra are the filters of other builds; the plain binary has none.
func extra() []filterapi.Filter { return nil }
