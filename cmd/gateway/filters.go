package main

import (
	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filters/ftp"
	"github.com/sluicegw/sluice/filters/tftp"
)

// builtin makes the application filters of this binary, in the order that
// counts inside a priority class.
func builtin() []filterapi.Filter {
	return append([]filterapi.Filter{ftp.New(), tftp.New()}, extra()...)
}

// parsers are the filters' readers of their options, by name.
func parsers(filters []filterapi.Filter) config.OptionParsers {
	out := make(config.OptionParsers, len(filters))
	for _, f := range filters {
		out[f.Name()] = nil
		if p, ok := f.(filterapi.OptionsParser); ok {
			out[f.Name()] = p.ParseOptions
		}
	}
	return out
}
