package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/users"
)

func passwdCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "passwd",
		Short: "read a password and print its hash, for users in the configuration",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			password, err := askPassword(cmd.Context(), os.Stdin, cmd.ErrOrStderr())
			if err != nil {
				return fmt.Errorf("read the password: %w", err)
			}
			hash, err := users.Hash(password)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), hash)
			return err
		},
	}
}

// askPassword reads one line, until ctx is over. On a terminal it is not shown.
func askPassword(ctx context.Context, in *os.File, out io.Writer) (string, error) {
	fd := int(in.Fd())
	if was, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
		fmt.Fprint(out, "Password: ")
		hidden := *was
		hidden.Lflag &^= unix.ECHO
		if err := unix.IoctlSetTermios(fd, unix.TCSETS, &hidden); err != nil {
			return "", err
		}
		defer func() {
			_ = unix.IoctlSetTermios(fd, unix.TCSETS, was) // it was so before
			fmt.Fprintln(out)
		}()
	}
	type answer struct {
		line string
		err  error
	}
	read := make(chan answer, 1)
	go func() { // a terminal cannot be read with a deadline
		line, err := bufio.NewReader(in).ReadString('\n')
		read <- answer{line, err}
	}()
	select {
	case a := <-read:
		if a.err != nil && !errors.Is(a.err, io.EOF) {
			return "", a.err
		}
		return strings.TrimRight(a.line, "\r\n"), nil
	case <-ctx.Done():
		return "", errInterrupted
	}
}

var errInterrupted = errors.New("interrupted")
