// Command gateway is Sluice: a transparent gateway whose kernel table is the
// fast path and whose application filters judge what needs judgement.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends it the hard way
	root := &cobra.Command{
		Use:           "gateway",
		Short:         "a transparent gateway: kernel NAT fast path, application filters",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(runCommand(), checkCommand(), probeCommand(), downCommand(),
		rulesCommand(), flowsCommand(), permissionsCommand(), countersCommand(), reloadCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "gateway: "+err.Error())
		os.Exit(1)
	}
}

// defaultConfig is where `gateway run` looks without -c.
const defaultConfig = "/etc/sluice/gateway.yaml"

// defaultSocket is the control socket unless the configuration or --socket
// names another.
const defaultSocket = "/run/sluice/control.sock"
