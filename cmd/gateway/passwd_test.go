package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal opens a pair: what is typed at the first one the second one reads.
func terminal(t *testing.T) (typed, tty *os.File) {
	t.Helper()
	typed, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = typed.Close() })
	fd := int(typed.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tty.Close() })
	return typed, tty
}

func shows(t *testing.T, tty *os.File) bool {
	t.Helper()
	x, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return x.Lflag&unix.ECHO != 0
}

// A password that is typed is not shown; afterwards the terminal shows again what
// is typed, also when the command was interrupted.
func TestPasswordAtATerminal(t *testing.T) {
	for name, want := range map[string]error{"typed": nil, "interrupted": errInterrupted} {
		t.Run(name, func(t *testing.T) {
			typed, tty := terminal(t)
			ctx, interrupt := context.WithCancel(t.Context())
			said := make(chan error, 1)
			go func() {
				got, err := askPassword(ctx, tty, io.Discard)
				if err == nil && got != "secret" {
					err = fmt.Errorf("the password is %q", got)
				}
				said <- err
			}()
			for end := time.Now().Add(10 * time.Second); shows(t, tty); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("what is typed is shown")
				}
			}
			if want == nil {
				if _, err := typed.WriteString("secret\n"); err != nil {
					t.Fatal(err)
				}
			} else {
				interrupt()
			}
			if err := <-said; !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
			if !shows(t, tty) {
				t.Error("the terminal shows nothing any more")
			}
			interrupt()
		})
	}
}
