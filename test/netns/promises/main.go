// Command promises reads the logs of the black-box tests and prints which of
// the gateway's promises they show to hold, for each run and address family.
//
//	promises NAME=FILE...
//
// FILE is what `go test -v` said; FILE may hold several runs, each after a line
// "=== vmtest: Linux RELEASE, queue.form: FORM", and then has a column for each.
// The tests of a promise are named after its number: TestB07..., those of a
// requirement of the NAT after it: TestNUDP03a... (RFC 4787, REQ-3a), NTCP (RFC
// 5382), NICMP (RFC 5508), NCGN (RFC 6888). Parts for one family have a subtest
// IPv4 or IPv6.
package main

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"strings"
)

//go:embed promises.txt
var list string

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "promises:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	promises, err := readPromises(list)
	if err != nil {
		return err
	}
	var runs []*results
	for _, a := range args {
		name, path, ok := strings.Cut(a, "=")
		if !ok {
			return fmt.Errorf("%q is not NAME=FILE", a)
		}
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // that step was not run
		}
		if err != nil {
			return err
		}
		runs = append(runs, readLog(name, string(text))...)
	}
	_, err = os.Stdout.WriteString(table(promises, runs))
	return err
}
