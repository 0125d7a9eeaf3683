package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/sluicegw/sluice/control"
	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/kernelpath"
)

// Sessions implements control.Gateway.
func (g *gateway) Sessions() []control.Session {
	all := g.engine.Sessions()
	out := make([]control.Session, 0, len(all))
	for _, s := range all {
		out = append(out, control.SessionOf(s))
	}
	return out
}

// Disconnect implements control.Gateway.
func (g *gateway) Disconnect(ctx context.Context, id uint64) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	living, err := g.kernelFlows(ctx)
	kernel := make([]flow.Tuple, 0, len(living))
	for _, f := range living {
		kernel = append(kernel, f.Tuple)
	}
	if err = errors.Join(err, g.engine.Disconnect(ctx, id, kernel)); errors.Is(err, filterapi.ErrNotFound) {
		return fmt.Errorf("%w: %d", control.ErrNoSession, id)
	}
	if err != nil {
		g.log.Error("disconnect a session", zap.Uint64("session", id), zap.Error(err))
		return err
	}
	g.log.Info("session disconnected", zap.Uint64("session", id))
	return nil
}

// dumpTries is how often the kernel is asked for its flows, whose list may
// change while it is read.
const dumpTries = 3

// kernelFlows are the flows that the kernel carries, as far as it can name
// them.
func (g *gateway) kernelFlows(ctx context.Context) ([]engine.KernelFlow, error) {
	var living []kernelpath.KernelFlow
	var err error
	for range dumpTries {
		if living, err = kernelpath.Dump(ctx, g.bits, flow.Kernel); err == nil {
			break
		}
	}
	flows := make([]engine.KernelFlow, 0, len(living))
	for _, f := range living {
		flows = append(flows, engine.KernelFlow{Tuple: f.Tuple, Translation: f.Translation})
	}
	if err != nil {
		err = fmt.Errorf("look at the kernel's flows: %w", err)
	}
	return flows, err
}

func sessionsCommand() *cobra.Command {
	var s shown
	c := &cobra.Command{
		Use:   "sessions",
		Short: "list the sessions: what each client does that user space has to do with",
		Long: `List the sessions. A client has one while it has flows that user space judged;
its KIND is transparent. A private one was made by a filter, for a client that
asked the filter itself, perhaps with the name of a USER. FLOWS are those that
user space judged; PERMISSIONS are what filters have opened; FILTERS are
attached to the session.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			sessions, err := control.Dial(s.socket).Sessions(cmd.Context())
			if err != nil {
				return asked(err)
			}
			return s.print(sessions, "ID\tCLIENT\tUSER\tKIND\tAGE\tFLOWS\tPERMISSIONS\tFILTERS", func(w io.Writer) {
				for _, x := range sessions {
					fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%d\t%d\t%s\n", x.ID, x.Client, dash(x.User), x.Kind, age(x.Since),
						x.Flows, x.Permissions, list(x.Filters))
				}
			})
		},
	}
	s.add(c)
	c.AddCommand(disconnectCommand())
	return c
}

func disconnectCommand() *cobra.Command {
	var socket string
	c := &cobra.Command{
		Use:   "disconnect ID",
		Short: "end a session: cut its flows, void its permissions",
		Long: `End a session: its flows are cut, also those of its client that the kernel
alone carries, and what filters have opened for it is closed. The client may
begin anew, which makes a new session.`,
		Args: oneArgument("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil {
				return &usageError{cmd, fmt.Errorf("ID %q: want the number of a session", args[0])}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			return asked(control.Dial(socket).Disconnect(ctx, id))
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket, "control socket of the running gateway")
	return c
}
