package filterapi_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// members are the exported names of the package, and with their type those of
// fields and methods.
func members(t *testing.T) map[string]bool {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	add := func(owner string, fields *ast.FieldList) {
		for _, f := range fields.List {
			for _, n := range f.Names {
				out[owner+"."+n.Name] = true
			}
		}
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.TypeSpec:
				out[n.Name.Name] = true
				switch of := n.Type.(type) {
				case *ast.InterfaceType:
					add(n.Name.Name, of.Methods)
				case *ast.StructType:
					add(n.Name.Name, of.Fields)
				}
			case *ast.ValueSpec:
				for _, name := range n.Names {
					out[name.Name] = true
				}
			case *ast.FuncDecl:
				if n.Recv == nil {
					out[n.Name.Name] = true
				} else if star, ok := n.Recv.List[0].Type.(*ast.StarExpr); ok {
					out[star.X.(*ast.Ident).Name+"."+n.Name.Name] = true
				}
				return false
			}
			return true
		})
	}
	return out
}

// What the table of names says is there is there, and what it says is absent
// has a reason.
func TestTableOfNames(t *testing.T) {
	text, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	known := members(t)
	row := regexp.MustCompile(`(?m)^//\t +?(.*\S)  +(\S.*)$|^//\t(.*\S)  +(\S.*)$`)
	name := regexp.MustCompile(`^[A-Z][A-Za-z]+(\.[A-Z][A-Za-z]+)?$`)
	reason := regexp.MustCompile(`\((\d+)\)`)
	checked := 0
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		here := m[2] + m[4]
		for _, w := range strings.FieldsFunc(here, func(r rune) bool { return strings.ContainsRune(" ,;:()'", r) }) {
			// A single capitalised word may be plain English, or a method.
			if !name.MatchString(w) || !strings.Contains(w, ".") && !known[w] {
				continue
			}
			checked++
			if !known[w] {
				t.Errorf("the table says %q, which is not there: %s", w, m[0])
			}
		}
		for _, n := range reason.FindAllStringSubmatch(here, -1) {
			if !regexp.MustCompile(`(?m)^//  ` + n[1] + `\. `).Match(text) {
				t.Errorf("no reason %s: %s", n[1], m[0])
			}
		}
	}
	if checked < 100 {
		t.Errorf("only %d names were found in the table", checked)
	}
}
