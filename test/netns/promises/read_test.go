package main

import (
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
`

func TestOf(t *testing.T) {
	runs := readLog("here", sample)
	if len(runs) != 1 || runs[0].name != "here" {
		t.Fatalf("%+v", runs)
	}
	for _, row := range []struct {
		promise    int
		fam4, fam6 string
	}{
		{1, "pass", "FAIL"},       // one part failed
		{2, "pass", "pass"},       // no parts: it counts for both
		{3, "FAIL", "FAIL"},       // it never ended
		{4, "FAIL", "FAIL"},       // it failed outside its parts
		{5, "FAIL", "FAIL"},       // skipped
		{6, "pass", "not yet"},    // one family only
		{7, "not yet", "not yet"}, // no test
		{10, "pass", "pass"},      // and is not the 1
	} {
		if a, b := runs[0].of(row.promise, "IPv4"), runs[0].of(row.promise, "IPv6"); a != row.fam4 || b != row.fam6 {
			t.Errorf("B%d: %s and %s, want %s and %s", row.promise, a, b, row.fam4, row.fam6)
		}
	}
}

func TestTable(t *testing.T) {
	log := "=== vmtest: Linux 6.1, queue.form: native\r\n--- PASS: TestB02A (1s)\r\n=== vmtest: Linux 6.1, queue.form: xt\n--- FAIL: TestB02A (1s)\n"
	runs := append(readLog("here", sample), readLog("stock", log)...)
	promises, err := readPromises("# x\n1 46 one\n2 4 two\n3 - three\n")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(table(promises, runs), "\n")
	want := [][]string{
		{"promise", "|", "here", "|", "stock", "native", "|", "stock", "xt"}, nil,
		{"B1", "one", "|", "pass", "FAIL", "|", "not", "yet", "not", "yet", "|", "not", "yet", "not", "yet"},
		{"B2", "two", "|", "pass", "-", "|", "pass", "-", "|", "FAIL", "-"},
		{"B3", "three", "|", "FAIL", "-", "|", "not", "yet", "-", "|", "not", "yet", "-"},
		{"3", "pass,", "3", "fail,", "6", "not", "yet"},
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
	if err != nil || len(all) != 63 {
		t.Fatalf("%d promises, %v", len(all), err)
	}
	for _, p := range all {
		if len(p.title) > 52 {
			t.Errorf("B%d: the title is %d characters long", p.number, len(p.title))
		}
	}
	for _, bad := range []string{"2 46 second first\n", "1 46\n", "x 46 y\n"} {
		if _, err := readPromises(bad); err == nil {
			t.Errorf("%q passes", bad)
		}
	}
}
