package main

import (
	"fmt"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/sluicegw/sluice/config"
)

// checkedPort stands for the port of the transparent listeners, which a
// running gateway gets from the kernel, in the text that `check` prints.
const checkedPort = 1

func checkCommand() *cobra.Command {
	var quiet, flowtable bool
	c := &cobra.Command{
		Use:   "check FILE",
		Short: "check a configuration and print the ruleset that it makes; needs no privileges",
		Args:  oneArgument("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			cfg, err := loadConfig(args[0], builtin())
			if err != nil {
				return err
			}
			r, err := buildRuleset(cfg, cfg.Policy, kernelFacts{
				native: cfg.Queue.Form != config.QueueXT, flowtable: flowtable, timers: true, tproxyPort: checkedPort,
			})
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if err := warnSecrets(args[0], cfg); err != nil {
				fmt.Fprintln(os.Stderr, "note: "+err.Error())
			}
			for _, text := range slices.Concat(missingInterfaces(cfg.Policy), nobodysRules(cfg)) {
				fmt.Fprintln(os.Stderr, "note: "+text)
			}
			if !quiet {
				fmt.Print(r.String())
			}
			return nil
		},
	}
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "do not print the ruleset")
	c.Flags().BoolVar(&flowtable, "flowtable", false, "print it as on a kernel that has flowtables")
	return c
}
