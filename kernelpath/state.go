package kernelpath

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DefaultStateDir is where the state is kept unless another folder is given.
const DefaultStateDir = "/run/sluice"

// state is what Prepare found and changed outside the table, so that Down can
// put it back. There is one file for each network namespace.
type state struct {
	// Boot is the kernel's boot id: sysctls of an earlier boot are gone.
	Boot     string   `json:"boot"`
	Steering Steering `json:"steering"`
	// Sysctls are the values from before, in the order in which they are to be
	// put back.
	Sysctls []sysctlValue `json:"sysctls"`
}

// sysctlValue is the content of a file below /proc/sys.
type sysctlValue struct {
	Path  string `json:"path"`
	Value string `json:"value"`
}

func (s *state) has(path string) bool {
	for _, v := range s.Sysctls {
		if v.Path == path {
			return true
		}
	}
	return false
}

// StateFile names the state file of the calling thread's network namespace in
// dir; an empty dir is DefaultStateDir. The name has the namespace's cookie,
// which no later namespace of the same boot gets again.
func StateFile(dir string) (string, error) {
	if dir == "" {
		dir = DefaultStateDir
	}
	cookie, err := netnsCookie()
	if err != nil {
		return "", fmt.Errorf("identify the network namespace: %w", err)
	}
	return filepath.Join(dir, fmt.Sprintf("kernel-%x.json", cookie)), nil
}

// netnsCookie reads SO_NETNS_COOKIE (Linux 5.14).
func netnsCookie() (cookie uint64, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	size := uint32(unsafe.Sizeof(cookie))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE,
		uintptr(unsafe.Pointer(&cookie)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	return cookie, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("identify the boot: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// loadState reads a state file; false: there is none of this boot.
func loadState(file string) (s state, ok bool, err error) {
	boot, err := bootID()
	if err != nil {
		return state{}, false, err
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return state{Boot: boot}, false, nil
	}
	if err != nil {
		return state{}, false, fmt.Errorf("read state: %w", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return state{}, false, fmt.Errorf("read state %s: %w", file, err)
	}
	if s.Boot != boot {
		return state{Boot: boot}, false, nil
	}
	return s, true, nil
}

// save writes the file whole or not at all; when it returns, the content has
// reached the disk.
func (s state) save(file string) error {
	b, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".kernel-*")
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	_, err = tmp.Write(append(b, '\n'))
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		os.Remove(tmp.Name())
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}
