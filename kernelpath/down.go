package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/nftables"
)

// Down undoes what a gateway has changed in the network namespace of the
// calling thread: sysctls, policy routing, the table with all that the kernel
// carries for it, and the state file. It needs no daemon, is safe to repeat
// and says what it did. dir is that of Prepare; fallback is the policy routing
// to remove when no state file names one.
//
// Forwarding goes back before the table goes away, so that a machine that did
// not forward before does not forward unfiltered meanwhile. On error the rest
// is done all the same, and the state file stays for another try.
func Down(ctx context.Context, dir string, fallback Steering) (did []string, err error) {
	file, err := StateFile(dir)
	if err != nil {
		return nil, err
	}
	s, known, err := loadState(file)
	if err != nil {
		return nil, err
	}
	if !known {
		s.Steering = fallback
	}
	var errs []error
	for _, step := range []func() ([]string, error){
		func() ([]string, error) { return restoreSysctls(s.Sysctls) },
		s.Steering.Remove,
		deleteTable,
	} {
		if ctx.Err() != nil {
			return did, errors.Join(append(errs, context.Cause(ctx))...)
		}
		done, err := step()
		did, errs = append(did, done...), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return did, err
	}
	switch err := os.Remove(file); {
	case err == nil:
		did = append(did, "removed "+file)
	case !errors.Is(err, fs.ErrNotExist):
		return did, fmt.Errorf("remove state: %w", err)
	}
	return did, nil
}

// deleteTable deletes the table, and that of a probe that was killed.
func deleteTable() (did []string, err error) {
	c := &nftables.Conn{}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	for _, t := range tables {
		if t.Name != tableName && t.Name != probeTable {
			continue
		}
		c.DelTable(t)
		if err := c.Flush(); err != nil {
			return did, fmt.Errorf("delete table inet %s: %w", t.Name, err)
		}
		did = append(did, "deleted table inet "+t.Name)
	}
	return did, nil
}
