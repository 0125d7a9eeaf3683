package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/control"
	"github.com/sluicegw/sluice/flow"
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

// asked explains an error of the control socket.
func asked(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%w: does it run? --socket names another socket", err)
	}
	return err
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
		Long: `List the access rules of the running gateway, in their order. NO-KERNEL-MODE is
as "rules set" has left it. DECIDED IN says where the first packet of a flow
is judged; what user space has judged may still be carried by the kernel.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rules, err := control.Dial(s.socket).Rules(cmd.Context())
			if err != nil {
				return asked(err)
			}
			return s.print(rules, "NAME\tACTION\tFROM\tTO\tPROTOCOLS\tUSERS\tFILTERS\tNO-KERNEL-MODE\tDECIDED IN", func(w io.Writer) {
				for _, r := range rules {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Name, r.Action, list(r.From), list(r.To),
						list(r.Protocols), list(r.Users), list(r.Filters), onOff(r.NoKernelMode), r.Decided)
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
		Args:  oneArgument("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if mode != "on" && mode != "off" {
				return &usageError{cmd, fmt.Errorf("--no-kernel-mode=%s: want on or off", mode)}
			}
			return asked(control.Dial(socket).SetNoKernelMode(cmd.Context(), args[0], mode == "on"))
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
		Long: `List the living flows. PATH says who carries them: the kernel alone, or user
space, which is this gateway's process. A flow in the kernel is listed as long
as conntrack knows it: two minutes after the end of a TCP connection, thirty
seconds after an answer to a ping. TRANSLATED is what NAT made of the source
and, behind ">", of the destination where the flow came in through a
permission; PERMISSION is the number of that. OUT and IN are bytes with
headers, from and to the initiator; those of a flow in user space are in the
log at its end.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			flows, err := control.Dial(s.socket).Flows(cmd.Context())
			if err != nil {
				return asked(err)
			}
			slices.SortFunc(flows, func(a, b control.Flow) int { return a.Start.Compare(b.Start) })
			return s.print(flows, "PATH\tPROTO\tSOURCE\tDESTINATION\tTRANSLATED\tRULE\tUSER\tPERMISSION\tAGE\tOUT\tIN", func(w io.Writer) {
				for _, f := range flows {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", pathOf(f), f.Proto, source(f), destination(f),
						translated(f), dash(f.Rule), dash(f.User), number(f.Permission), age(f.Start), countsOf(f))
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
		Long: `List what the filters have opened. An outbound permission lets CLIENT connect
to TARGET, and a redirect does so for a CLIENT that goes to the gateway's VIA
address instead; FROM is the gateway's address that they leave from, if the
filter asked for one. An inbound one lets SOURCES connect to the gateway's
EXTERNAL address and port, and leads them to CLIENT.

STATE is armed when flows may come. Before that a bind may be reserved (no
source may use it yet), waiting (for the client's address) or discarding (until
a filter allows it); an emulated one is open at no address, a filter plays that
part. One that is used stays in the list until its FLOWS have ended, and opens
nothing any more if it was for one use.

PATH says who carries the flows: kernel; user, the gateway's process; or asked,
where the first packet of each flow is shown to filters and the kernel carries
what none of them holds. NOTES: address, it
belongs to the client's address and not to the session; notify, a filter hears
of each connection that stands; one-way, answers are dropped.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			perms, err := control.Dial(s.socket).Permissions(cmd.Context())
			if err != nil {
				return asked(err)
			}
			return s.print(perms, "ID\tSTATE\tDIRECTION\tPROTO\tCLIENT\tVIA\tTARGET/EXTERNAL\tFROM/SOURCES\tUSE\tPATH\tRULE\tSESSION\tFLOWS\tEXPIRES\tNOTES", func(w io.Writer) {
				for _, p := range perms {
					use, expires := "once", "-"
					if p.Multiple {
						use = "multiple"
					}
					if p.Expires != nil {
						expires = time.Until(*p.Expires).Round(time.Second).String()
					}
					fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n",
						p.ID, p.State, p.Direction, p.Proto, dash(p.Client), dash(p.Via), dash(p.Target+p.External),
						dash(p.Source+strings.Join(p.Sources, ",")), use, p.Path, dash(p.Rule), p.Session, living(p), expires, notes(p))
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
		Short: "show the gateway's own counters, since it was started",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := control.Dial(s.socket).Counters(cmd.Context())
			if err != nil {
				return asked(err)
			}
			names := make([]string, 0, len(m))
			for n := range m {
				names = append(names, n)
			}
			slices.Sort(names)
			return s.print(m, "COUNTER\tVALUE\tMEANING", func(w io.Writer) {
				for _, n := range names {
					fmt.Fprintf(w, "%s\t%d\t%s\n", n, m[n], meaning(n))
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
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			if err := control.Dial(socket).Reload(ctx); err != nil {
				return fmt.Errorf("reload: %w", asked(err))
			}
			return nil
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

// living are the flows of a permission.
func living(p control.Permission) string {
	var out []string
	for _, f := range p.Living {
		out = append(out, f.Src+" > "+f.Dst)
	}
	return list(out)
}

// notes are what is special about a permission.
func notes(p control.Permission) string {
	var n []string
	for _, x := range []struct {
		on   bool
		name string
	}{{p.AddressBased, "address"}, {p.Notify, "notify"}, {p.OneWay, "one-way"}} {
		if x.on {
			n = append(n, x.name)
		}
	}
	return list(n)
}

func number(n uint64) string {
	if n == 0 {
		return "-"
	}
	return strconv.FormatUint(n, 10)
}

// translated is what NAT made of a flow's addresses.
func translated(f control.Flow) string {
	if f.NATDst == "" {
		return dash(f.NATSrc)
	}
	return strings.TrimSpace(f.NATSrc + " > " + f.NATDst)
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// source is the initiator; an ICMP query has an identifier instead of a port,
// and the other protocols have neither.
func source(f control.Flow) string {
	addr, port := split(f.Src)
	switch f.Proto {
	case flow.TCP.String(), flow.UDP.String():
		return f.Src
	case flow.ICMP.String(), flow.ICMPv6.String():
		return addr + " id " + port
	}
	return addr
}

// destination is where it goes; an ICMP query has its type.
func destination(f control.Flow) string {
	addr, port := split(f.Dst)
	switch f.Proto {
	case flow.TCP.String(), flow.UDP.String():
		return f.Dst
	case flow.ICMP.String(), flow.ICMPv6.String():
		return addr + " type " + port
	}
	return addr
}

func split(addrPort string) (addr, port string) {
	a, err := netip.ParseAddrPort(addrPort)
	if err != nil {
		return addrPort, "?"
	}
	return a.Addr().String(), strconv.Itoa(int(a.Port()))
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
