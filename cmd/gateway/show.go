package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluicegw/sluice/control"
)

// shown are the flags that every command of a running gateway has.
type shown struct {
	socket string
	json   bool
}

func (s *shown) add(c *cobra.Command) {
	c.Flags().StringVar(&s.socket, "socket", defaultSocket, "control socket of the running gateway")
	c.Flags().BoolVar(&s.json, "json", false, "print JSON")
}

// print writes v as JSON, or as the table that rows makes.
func (s *shown) print(v any, head string, rows func(w io.Writer)) error {
	if s.json {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, head)
	rows(w)
	return w.Flush()
}

func rulesCommand() *cobra.Command {
	var s shown
	c := &cobra.Command{
		Use:   "rules",
		Short: "list the access rules of the running gateway",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rules, err := control.Dial(s.socket).Rules(cmd.Context())
			if err != nil {
				return err
			}
			return s.print(rules, "NAME\tACTION\tFROM\tTO\tPROTOCOLS\tFILTERS\tNO-KERNEL-MODE\tDECIDED IN", func(w io.Writer) {
				for _, r := range rules {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Name, r.Action, list(r.From), list(r.To),
						list(r.Protocols), list(r.Filters), onOff(r.NoKernelMode), r.Decided)
				}
			})
		},
	}
	s.add(c)
	c.AddCommand(rulesSetCommand())
	return c
}

func rulesSetCommand() *cobra.Command {
	var socket, mode string
	c := &cobra.Command{
		Use:   "set NAME --no-kernel-mode=on|off",
		Short: "move new flows of a rule between the kernel and user space, until the next reload",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if mode != "on" && mode != "off" {
				return fmt.Errorf("--no-kernel-mode=%q: want on or off", mode)
			}
			return control.Dial(socket).SetNoKernelMode(cmd.Context(), args[0], mode == "on")
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket, "control socket of the running gateway")
	c.Flags().StringVar(&mode, "no-kernel-mode", "", "on: user space carries new flows; off: the kernel does where it can")
	return c
}

func flowsCommand() *cobra.Command {
	var s shown
	c := &cobra.Command{
		Use:   "flows",
		Short: "list the living flows, in the kernel and in user space",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			flows, err := control.Dial(s.socket).Flows(cmd.Context())
			if err != nil {
				return err
			}
			slices.SortFunc(flows, func(a, b control.Flow) int { return a.Start.Compare(b.Start) })
			return s.print(flows, "PATH\tPROTO\tSOURCE\tDESTINATION\tTRANSLATED\tRULE\tAGE\tOUT\tIN", func(w io.Writer) {
				for _, f := range flows {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", pathOf(f), f.Proto, f.Src, f.Dst,
						dash(f.NATSrc+f.NATDst), dash(f.Rule), age(f.Start), countsOf(f))
				}
			})
		},
	}
	s.add(c)
	return c
}

func permissionsCommand() *cobra.Command {
	var s shown
	c := &cobra.Command{
		Use:   "permissions",
		Short: "list what the filters have opened: waiting permissions and those in use",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			perms, err := control.Dial(s.socket).Permissions(cmd.Context())
			if err != nil {
				return err
			}
			return s.print(perms, "ID\tSTATE\tDIRECTION\tPROTO\tCLIENT\tTARGET OR EXTERNAL\tSOURCES\tUSE\tPATH\tRULE\tEXPIRES", func(w io.Writer) {
				for _, p := range perms {
					use, expires := "once", "-"
					if p.Multiple {
						use = "multiple"
					}
					if p.Expires != nil {
						expires = time.Until(*p.Expires).Round(time.Second).String()
					}
					fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.ID, p.State, p.Direction, p.Proto, p.Client,
						p.Target+p.External, list(p.Sources), use, p.Path, p.Rule, expires)
				}
			})
		},
	}
	s.add(c)
	return c
}

func countersCommand() *cobra.Command {
	var s shown
	c := &cobra.Command{
		Use:   "counters",
		Short: "show the gateway's own counters",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := control.Dial(s.socket).Counters(cmd.Context())
			if err != nil {
				return err
			}
			names := make([]string, 0, len(m))
			for n := range m {
				names = append(names, n)
			}
			slices.Sort(names)
			return s.print(m, "COUNTER\tVALUE", func(w io.Writer) {
				for _, n := range names {
					fmt.Fprintf(w, "%s\t%d\n", n, m[n])
				}
			})
		},
	}
	s.add(c)
	return c
}

func reloadCommand() *cobra.Command {
	var socket string
	c := &cobra.Command{
		Use:   "reload",
		Short: "make the running gateway read its configuration again",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			return control.Dial(socket).Reload(ctx)
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket, "control socket of the running gateway")
	return c
}

func list(s []string) string { return dash(strings.Join(s, ",")) }

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func pathOf(f control.Flow) string {
	if f.Offloaded {
		return f.Path + " (offloaded)"
	}
	return f.Path
}

func age(start time.Time) string {
	if start.IsZero() {
		return "-"
	}
	return time.Since(start).Round(time.Second).String()
}

func countsOf(f control.Flow) string {
	if f.Counts == nil {
		return "-\t-"
	}
	return fmt.Sprintf("%d\t%d", f.Counts.OutBytes, f.Counts.InBytes)
}
