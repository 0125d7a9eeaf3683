package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluicegw/sluice/control"
)

// Binds implements control.Gateway.
func (g *gateway) Binds() []control.Bind {
	all := g.engine.Binds()
	out := make([]control.Bind, 0, len(all))
	for _, b := range all {
		out = append(out, control.BindOf(b))
	}
	return append(out, g.publishedBinds()...)
}

func bindsCommand() *cobra.Command {
	var s shown
	c := &cobra.Command{
		Use:   "binds",
		Short: "list the external addresses that the gateway holds for clients",
		Long: `List the external addresses that the gateway holds for clients, whoever asked
for them: a filter for a secondary connection, a client by PCP, NAT-PMP or SOCKS,
or the configuration. What comes to EXTERNAL from SOURCES is led to CLIENT; where
nothing is translated both are the same. BY is the filter that asked for it, or
what of the configuration.

STATE is allowed when somebody may come. Else a bind is discarding (it holds its
address, and what comes is lost until a filter allows it), reserved (no source may
use it yet), waiting (for the client's address) or emulated (a filter plays that
part, and nothing is open). One that is used lets nobody in any more, and stays in
the list until its FLOWS have ended.

NOTES: once, the first flow uses it up; one-way, what the client answers is
dropped; same-source, what the client itself sends from there leaves from
EXTERNAL; socket, its end is a socket of the gateway.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			binds, err := control.Dial(s.socket).Binds(cmd.Context())
			if err != nil {
				return asked(err)
			}
			return s.print(binds, "ID\tSTATE\tPROTO\tEXTERNAL\tCLIENT\tSOURCES\tBY\tRULE\tSESSION\tUSER\tFLOWS\tEXPIRES\tNOTES", func(w io.Writer) {
				for _, b := range binds {
					expires := "-"
					if b.Expires != nil {
						expires = time.Until(*b.Expires).Round(time.Second).String()
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n",
						number(b.ID), b.State, b.Proto, dash(b.External), dash(b.Client), list(b.Sources), dash(b.By), dash(b.Rule),
						number(b.Session), dash(b.User), b.Flows, expires, bindNotes(b))
				}
			})
		},
	}
	s.add(c)
	return c
}

// bindNotes are what is special about a bind.
func bindNotes(b control.Bind) string {
	var n []string
	for _, x := range []struct {
		on   bool
		name string
	}{{!b.Multiple, "once"}, {b.OneWay, "one-way"}, {b.SameSource, "same-source"}, {b.Socket, "socket"}} {
		if x.on {
			n = append(n, x.name)
		}
	}
	return dash(strings.Join(n, ","))
}
