package main

import (
	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/filterapi"
)

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
