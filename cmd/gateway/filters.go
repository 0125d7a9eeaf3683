package main

import (
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filters/ftp"
	"github.com/sluicegw/sluice/filters/pcp"
	"github.com/sluicegw/sluice/filters/sip"
	"github.com/sluicegw/sluice/filters/socks"
	"github.com/sluicegw/sluice/filters/tftp"
)

// builtin makes the application filters of this binary. This list is the one
// place where they are named: a filter of your own, from whichever module, is
// one import and one line here, and docs/writing-a-filter.md says how to write
// it. The order counts: in it filters hear of an event, and in it those of one
// priority are chained, the first next to the client.
func builtin() []filterapi.Filter {
	return append([]filterapi.Filter{
		ftp.New(),
		tftp.New(),
		sip.New(),
		pcp.New(),
		socks.New(),
	}, extra()...)
}
