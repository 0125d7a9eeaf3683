// Command gateway is Sluice: a transparent gateway whose kernel table is the
// fast path and whose application filters judge what needs judgement.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/config"
)

// The exit statuses besides 0.
const (
	statusFailed = 1
	statusUsage  = 2 // the command line is wrong
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends it the hard way
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		text, status := complaint(err, os.Geteuid())
		fmt.Fprintln(os.Stderr, text)
		os.Exit(status)
	}
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "gateway",
		Short:         "a transparent gateway: kernel NAT fast path, application filters",
		Args:          noArguments,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return &usageError{c, err} })
	root.AddCommand(runCommand(), checkCommand(), probeCommand(), downCommand(),
		rulesCommand(), flowsCommand(), permissionsCommand(), bindsCommand(), sessionsCommand(), countersCommand(), reloadCommand(), passwdCommand())
	return root
}

// usageError is a command line that says something else than its command can.
type usageError struct {
	command *cobra.Command
	err     error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// noArguments is cobra.NoArgs with an error that says what is there.
func noArguments(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if c.HasAvailableSubCommands() {
		err := fmt.Errorf("%s has no command %q", c.CommandPath(), args[0])
		if close := c.SuggestionsFor(args[0]); len(close) > 0 {
			err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(close, " or "))
		}
		return &usageError{c, err}
	}
	return &usageError{c, fmt.Errorf("%s takes no argument, got %q", c.CommandPath(), args[0])}
}

// oneArgument wants exactly one.
func oneArgument(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == 1 {
			return nil
		}
		return &usageError{c, fmt.Errorf("%s wants one %s, got %d", c.CommandPath(), what, len(args))}
	}
}

// complaint is what is said of an error, and the exit status. Errors of a
// configuration stay as they are, each a line `file:line: reason`, so that
// editors can follow them.
func complaint(err error, uid int) (string, int) {
	var usage *usageError
	if errors.As(err, &usage) {
		return fmt.Sprintf("gateway: %v\nusage: %s\n'%s --help' says more", err, usage.command.UseLine(), usage.command.CommandPath()), statusUsage
	}
	var bad *config.Error
	if errors.As(err, &bad) && strings.HasPrefix(err.Error(), bad.File+":") {
		return err.Error(), statusFailed
	}
	text := "gateway: " + err.Error()
	if uid != 0 && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)) {
		text += "; root may do it"
	}
	return text, statusFailed
}

// defaultConfig is where `gateway run` looks without -c.
const defaultConfig = "/etc/sluice/gateway.yaml"

// defaultSocket is the control socket unless the configuration or --socket
// names another.
const defaultSocket = "/run/sluice/control.sock"
