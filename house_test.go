// Package sluice has only this test of the house: packages import what
// ARCHITECTURE.md says.
package sluice

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/sluicegw/sluice"

var row = regexp.MustCompile("^\\| `([a-z/]+)` \\| .* \\| ([a-z/ -]+) \\|$")

// rooms reads the table: room to the rooms that it may import.
func rooms(t *testing.T) map[string][]string {
	text, err := os.ReadFile("ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	for _, line := range strings.Split(string(text), "\n") {
		if m := row.FindStringSubmatch(line); m != nil {
			out[m[1]] = strings.Fields(strings.ReplaceAll(m[2], "-", ""))
		}
	}
	return out
}

func TestImportsAreThoseOfTheHouse(t *testing.T) {
	allowed := rooms(t)
	list, err := exec.Command("go", "list", "-tags", "probe", "-json=ImportPath,Imports", "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for d := json.NewDecoder(bytes.NewReader(list)); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		room := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if room == "" {
			continue
		}
		seen++
		may, ok := allowed[room]
		if !ok {
			t.Errorf("%s has no row in ARCHITECTURE.md", room)
			continue
		}
		for _, i := range p.Imports {
			if other, ours := strings.CutPrefix(i, module+"/"); ours && !slices.Contains(may, other) {
				t.Errorf("%s imports %s, which ARCHITECTURE.md does not allow", room, other)
			}
		}
	}
	if seen != len(allowed) {
		t.Errorf("ARCHITECTURE.md has %d rooms, the module %d", len(allowed), seen)
	}
}
