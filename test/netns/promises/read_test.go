package main

import (
	"fmt"
	"strings"
	"testing"
)

const sample = `=== RUN   TestB01Redirect
=== RUN   TestB01Redirect/IPv4
=== RUN   TestB01Redirect/IPv6
    a_test.go:1: no
--- FAIL: TestB01Redirect (0.10s)
    --- PASS: TestB01Redirect/IPv4 (0.05s)
    --- FAIL: TestB01Redirect/IPv6 (0.05s)
--- PASS: TestB2Run (0.10s)
=== RUN   TestB03Once
--- FAIL: TestB04Many (0.10s)
    --- PASS: TestB04Many/kernel/IPv4 (0.05s)
    --- PASS: TestB04Many/kernel/IPv6 (0.05s)
--- SKIP: TestB05Timeout (0.10s)
--- PASS: TestB06A (0.10s)
    --- PASS: TestB06A/IPv4 (0.05s)
--- PASS: TestB10X (0.10s)
--- PASS: TestNUDP01Mapping (0.10s)
--- FAIL: TestNUDP03aRanges (0.10s)
--- PASS: TestNUDP03NoOverloading (0.10s)
--- PASS: TestNTCP01Mapping (0.10s)
--- FAIL: TestNothing (0.10s)
`

func TestOf(t *testing.T) {
	runs := readLog("here", sample)
	if len(runs) != 1 || runs[0].name != "here" {
		t.Fatalf("%+v", runs)
	}
	for _, row := range []struct {
		promise    string
		fam4, fam6 string
	}{
		{"B1", "pass", "FAIL"},       // one part failed
		{"B2", "pass", "pass"},       // no parts: it counts for both
		{"B3", "FAIL", "FAIL"},       // it never ended
		{"B4", "FAIL", "FAIL"},       // it failed outside its parts
		{"B5", "FAIL", "FAIL"},       // skipped
		{"B6", "pass", "not yet"},    // one family only
		{"B7", "not yet", "not yet"}, // no test
		{"B10", "pass", "pass"},      // and is not the 1
		{"UDP 1", "pass", "pass"},
		{"UDP 3", "pass", "pass"},
		{"UDP 3a", "FAIL", "FAIL"}, // and is not the 3
		{"TCP 1", "pass", "pass"},
		{"CGN 1", "not yet", "not yet"},
	} {
		if a, b := runs[0].of(row.promise, "IPv4"), runs[0].of(row.promise, "IPv6"); a != row.fam4 || b != row.fam6 {
			t.Errorf("%s: %s and %s, want %s and %s", row.promise, a, b, row.fam4, row.fam6)
		}
	}
}

func TestTable(t *testing.T) {
	log := "=== vmtest: Linux 6.1, queue.form: native\r\n--- PASS: TestB02A (1s)\r\n=== vmtest: Linux 6.1, queue.form: xt\n--- FAIL: TestB02A (1s)\n"
	runs := append(readLog("here", sample), readLog("stock", log)...)
	promises, err := readPromises("# x\n1 46 one\n2 4 two\n3 - three\nUDP3a 4 four\n")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(table(promises, runs), "\n")
	want := [][]string{
		{"promise", "|", "here", "|", "stock", "native", "|", "stock", "xt"}, nil,
		{"B1", "one", "|", "pass", "FAIL", "|", "not", "yet", "not", "yet", "|", "not", "yet", "not", "yet"},
		{"B2", "two", "|", "pass", "-", "|", "pass", "-", "|", "FAIL", "-"},
		{"B3", "three", "|", "FAIL", "-", "|", "not", "yet", "-", "|", "not", "yet", "-"},
		{"UDP", "3a", "four", "|", "FAIL", "-", "|", "not", "yet", "-", "|", "not", "yet", "-"},
		{"3", "pass,", "4", "fail,", "8", "not", "yet"},
	}
	for i, w := range want {
		if got := strings.Join(strings.Fields(lines[i]), " "); w != nil && got != strings.Join(w, " ") {
			t.Errorf("line %d: %s\nwant %s", i, got, strings.Join(w, " "))
		}
	}
}

// The list has every promise, in order, with a title that fits.
func TestList(t *testing.T) {
	all, err := readPromises(list)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range all {
		if i < 63 && p.name != fmt.Sprintf("B%d", i+1) || i >= 63 && p.name[0] == 'B' {
			t.Errorf("%s is in the place of B%d", p.name, i+1)
		}
		if len(p.title) > 53 {
			t.Errorf("%s: the title is %d characters long", p.name, len(p.title))
		}
	}
	for _, bad := range []string{"2 46 x\n2 46 y\n", "1 46\n", "x 46 y\n", "0 46 y\n", "UDP 46 y\n"} {
		if _, err := readPromises(bad); err == nil {
			t.Errorf("%q passes", bad)
		}
	}
}
