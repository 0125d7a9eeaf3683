package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// selfCheckLeast and its inverse bound the ratio of a baseline to itself.
const selfCheckLeast = 0.9

// row is a case as it is printed.
type row struct {
	Case     string  `json:"case"`
	Unit     string  `json:"unit"`
	Baseline string  `json:"baseline"`
	Sluice   float64 `json:"sluice_median"`
	Than     float64 `json:"baseline_median"`
	Ratio    float64 `json:"ratio_median"`
	Min      float64 `json:"ratio_min"`
	Max      float64 `json:"ratio_max"`
	Expect   float64 `json:"expected,omitempty"` // at least; absent: for information
	Most     float64 `json:"at_most,omitempty"`  // instead
	Met      bool    `json:"met"`
	Skipped  string  `json:"not_measured,omitempty"` // why; nothing else is said then
	Samples  result  `json:"samples"`
}

// report is what a run prints.
type report struct {
	Kernel     string `json:"kernel"`
	Processors int    `json:"processors"`
	Rounds     int    `json:"rounds"`
	SelfCheck  bool   `json:"self_check,omitempty"`
	Rows       []row  `json:"cases"`
}

func newReport(o options) *report {
	r := &report{Processors: runtime.NumCPU(), Rounds: o.rounds, SelfCheck: o.selfCheck}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		r.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	return r
}

func (r *report) add(c benchCase, got result) row {
	x := row{
		Case: c.name, Unit: c.unit, Baseline: c.baseline, Expect: c.expect, Most: max(0, c.most), Samples: got,
		Sluice: median(c.figures(got.Of)), Than: median(c.figures(got.Than)),
		Ratio: median(got.Ratios), Min: slices.Min(got.Ratios), Max: slices.Max(got.Ratios),
	}
	x.Met = x.Ratio >= x.Expect && (x.Most == 0 || x.Ratio <= x.Most)
	if r.SelfCheck {
		x.Met = x.Met && x.Ratio <= 1/selfCheckLeast
	}
	r.Rows = append(r.Rows, x)
	return x
}

// skip has the table say that a case cannot be here.
func (r *report) skip(c benchCase, why notHere) row {
	x := row{Case: c.name, Unit: c.unit, Baseline: c.baseline, Met: true, Skipped: why.Error()}
	r.Rows = append(r.Rows, x)
	return x
}

func (r *report) met() bool {
	return !slices.ContainsFunc(r.Rows, func(x row) bool { return !x.Met })
}

func (r *report) print(w io.Writer, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	_, err := io.WriteString(w, r.table())
	return err
}

// table is Markdown.
func (r *report) table() string {
	var b strings.Builder
	subject := "Sluice"
	if r.SelfCheck {
		subject = "itself"
	}
	fmt.Fprintf(&b, "Linux %s, %d processors; medians of %d rounds.\n\n", r.Kernel, r.Processors, r.Rounds)
	fmt.Fprintf(&b, "| case | %s | baseline | ratio | spread | expected |\n|---|---|---|---|---|---|\n", subject)
	for _, x := range r.Rows {
		if x.Skipped != "" {
			fmt.Fprintf(&b, "| %s | %s | | | | |\n", x.Case, x.Skipped)
			continue
		}
		fmt.Fprintf(&b, "| %s | %s %s | %s: %s %s | **%.2f** | %.2f..%.2f | %s |\n",
			x.Case, figure(x.Sluice), x.Unit, x.Baseline, figure(x.Than), x.Unit, x.Ratio, x.Min, x.Max, x.expectation(r.SelfCheck))
	}
	return b.String()
}

func (x row) expectation(selfCheck bool) string {
	switch {
	case x.Most > 0:
		return fmt.Sprintf("<= %.2f, %s", x.Most, verdict(x.Met))
	case x.Expect == 0:
		return "-"
	case selfCheck:
		return fmt.Sprintf("%.2f..%.2f, %s", x.Expect, 1/x.Expect, verdict(x.Met))
	}
	return fmt.Sprintf(">= %.2f, %s", x.Expect, verdict(x.Met))
}

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "**missed**"
}

// brief is a line for who watches the run.
func (x row) brief() string {
	if x.Skipped != "" {
		return fmt.Sprintf("%-44s %s", x.Case, x.Skipped)
	}
	return fmt.Sprintf("%-44s %8s / %-8s %-7s ratio %.2f (%.2f..%.2f)", x.Case, figure(x.Sluice), figure(x.Than), x.Unit, x.Ratio, x.Min, x.Max)
}

// figure has three significant digits or so.
func figure(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
