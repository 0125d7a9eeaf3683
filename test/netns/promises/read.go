package main

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// promise is one line of the list.
type promise struct {
	name     string   // "B7", or of the NAT "UDP 3a"
	families []string // nil: it has none
	title    string
}

func readPromises(text string) ([]promise, error) {
	var all []promise
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.SplitN(line, " ", 3)
		name, err := listed(f[0])
		if err != nil || len(f) != 3 || slices.ContainsFunc(all, func(p promise) bool { return p.name == name }) {
			return nil, fmt.Errorf("the list of promises: %q", line)
		}
		p := promise{name: name, title: f[2]}
		if strings.Contains(f[1], "4") {
			p.families = append(p.families, "IPv4")
		}
		if strings.Contains(f[1], "6") {
			p.families = append(p.families, "IPv6")
		}
		all = append(all, p)
	}
	return all, nil
}

// listed is the name of what the list calls 7 or UDP3a.
func listed(word string) (string, error) {
	if n, err := strconv.Atoi(word); err == nil && n > 0 {
		return "B" + strconv.Itoa(n), nil
	}
	if name := nameOf("TestN" + word); name != "" {
		return name, nil
	}
	return "", fmt.Errorf("%q is no promise", word)
}

// nameOf is the promise that a test is named after; none: empty.
func nameOf(test string) string {
	m := number.FindStringSubmatch(test)
	switch {
	case m == nil:
		return ""
	case m[1] == "B":
		return "B" + m[2]
	}
	return m[1][1:] + " " + m[2]
}

// results are those of one run: what became of each test and subtest.
type results struct {
	name  string
	tests map[string]outcome
}

type outcome int

const (
	unfinished outcome = iota // it began, and the run ended before it did
	passed
	failed
)

var (
	header = regexp.MustCompile(`^=== vmtest: Linux (\S+), queue\.form: (\w+)`)
	began  = regexp.MustCompile(`^=== RUN\s+(\S+)`)
	ended  = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+)`)
	number = regexp.MustCompile(`^Test(B|NUDP|NTCP|NICMP|NCGN)0*(\d+[a-z]?)`)
)

// readLog reads what a step said. Without a header all of it is one run.
func readLog(name, text string) []*results {
	var runs []*results
	begin := func(name string) { runs = append(runs, &results{name, map[string]outcome{}}) }
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		if m := header.FindStringSubmatch(line); m != nil {
			begin(name + " " + m[2])
			continue
		}
		b, e := began.FindStringSubmatch(line), ended.FindStringSubmatch(line)
		if b == nil && e == nil || b != nil && nameOf(b[1]) == "" || e != nil && nameOf(e[2]) == "" {
			continue
		}
		if len(runs) == 0 {
			begin(name)
		}
		r := runs[len(runs)-1]
		if b != nil {
			r.tests[b[1]] = unfinished
			continue
		}
		r.tests[e[2]] = failed // a skipped test shows nothing
		if e[1] == "PASS" {
			r.tests[e[2]] = passed
		}
	}
	return runs
}

// family is the one that a test's name has as an element; none: empty.
func family(test string) string {
	for _, element := range strings.Split(test, "/") {
		if element == "IPv4" || element == "IPv6" {
			return element
		}
	}
	return ""
}

// split tells the tests that have a part for a family, each with all those that
// stand above such a part.
func (r *results) split() map[string]bool {
	out := map[string]bool{}
	for t := range r.tests {
		if family(t) == "" {
			continue
		}
		for i := strings.LastIndexByte(t, '/'); i >= 0; i = strings.LastIndexByte(t[:i], '/') {
			out[t[:i]] = true
		}
	}
	return out
}

// of is what a run says of a promise in one family; an empty family is all of
// it. A test without parts for the families counts for both. One that failed
// although none of its parts did counts for both, too.
func (r *results) of(promise, fam string) string {
	split := r.split()
	shown, broken := false, false
	for t, o := range r.tests {
		if nameOf(t) != promise {
			continue
		}
		f := family(t)
		switch {
		case fam == "" || f == fam:
		case f != "":
			continue
		case split[t] && (o == passed || r.partFailed(t)):
			continue
		}
		shown = true
		broken = broken || o != passed
	}
	switch {
	case broken:
		return "FAIL"
	case shown:
		return "pass"
	}
	return "not yet"
}

func (r *results) partFailed(test string) bool {
	for t, o := range r.tests {
		if strings.HasPrefix(t, test+"/") && family(t) != "" && o != passed {
			return true
		}
	}
	return false
}

// table is what is printed: a line for each promise, and the sums.
func table(promises []promise, runs []*results) string {
	var b strings.Builder
	const left, wide = 62, 7
	fmt.Fprintf(&b, "%-*s", left, "promise")
	for _, r := range runs {
		fmt.Fprintf(&b, " | %-17s", r.name)
	}
	fmt.Fprintf(&b, "\n%-*s", left, "")
	for range runs {
		fmt.Fprintf(&b, " | %-8s %-8s", "IPv4", "IPv6")
	}
	b.WriteString("\n")
	sums := map[string]int{}
	for _, p := range promises {
		fmt.Fprintf(&b, "%-*s %-*s", wide, p.name, left-wide-1, p.title)
		for _, r := range runs {
			cells := [2]string{"-", "-"}
			if p.families == nil {
				cells[0] = r.of(p.name, "")
			}
			for _, f := range p.families {
				cells[map[string]int{"IPv4": 0, "IPv6": 1}[f]] = r.of(p.name, f)
			}
			for _, c := range cells {
				sums[c]++
			}
			fmt.Fprintf(&b, " | %-8s %-8s", cells[0], cells[1])
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "%d pass, %d fail, %d not yet\n", sums["pass"], sums["FAIL"], sums["not yet"])
	return b.String()
}
