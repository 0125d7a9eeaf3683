package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/kernelpath"
)

// errRuns: a gateway runs in this network namespace.
var errRuns = errors.New("another gateway runs in this network namespace; stop it first")

// claim takes the network namespace of the calling thread for this process,
// until release is called or the process is gone. The file that it locks stays.
func claim() (release func(), err error) {
	state, err := kernelpath.StateFile("")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(state), 0o755); err != nil {
		return nil, fmt.Errorf("claim the network namespace: %w", err)
	}
	f, err := os.OpenFile(state+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("claim the network namespace: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errRuns
		}
		return nil, fmt.Errorf("claim the network namespace: lock %s: %w", f.Name(), err)
	}
	return func() { _ = f.Close() }, nil
}
