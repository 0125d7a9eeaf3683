package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds on the text: no configuration comes near them, and the YAML parser
// needs the square of the depth.
const (
	maxSize   = 16 << 20
	maxDepth  = 64  // of brackets
	maxIndent = 200 // columns before the first word of a line
)

// reader walks through the tree of one file and collects what is wrong.
type reader struct {
	file    string
	parsers OptionParsers
	errs    []*Error
	// known are the names of all users.
	known []string
	// entries are the places of what policy.New is given.
	entries entries
	// splitGiven: the file says itself which ports the kernel's translation and
	// the leases have.
	splitGiven bool
	// maimed: a list for policy.New is not what the file means, so that its
	// errors would mislead.
	maimed bool
}

func (r *reader) failAt(line int, format string, args ...any) {
	r.errs = append(r.errs, &Error{r.file, line, fmt.Sprintf(format, args...)})
}

func (r *reader) fail(n ast.Node, format string, args ...any) { r.failAt(lineOf(n), format, args...) }

// result joins the errors in the order of the lines.
func (r *reader) result() error {
	slices.SortStableFunc(r.errs, func(a, b *Error) int { return a.Line - b.Line })
	var list []error
	for i, e := range r.errs {
		if i == 0 || *e != *r.errs[i-1] {
			list = append(list, e)
		}
	}
	return errors.Join(list...)
}

// tree parses the text. nil: it is empty, or an error has been noted.
func (r *reader) tree(text []byte) (root ast.Node) {
	defer func() { // the YAML parser is not ours
		if p := recover(); p != nil {
			r.failAt(1, "the YAML parser gave up: %v", p)
		}
	}()
	if len(text) > maxSize {
		r.failAt(1, "the file is larger than %d MiB", maxSize>>20)
		return nil
	}
	if !utf8.Valid(text) {
		r.failAt(1+strings.Count(string(text[:validPart(text)]), "\n"), "the text is not UTF-8")
		return nil
	}
	tokens := lexer.Tokenize(string(text))
	if line := tooDeep(tokens); line > 0 {
		r.failAt(line, "nested too deeply")
		return nil
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		r.failAt(yamlError(err, 1))
		return nil
	}
	for _, doc := range file.Docs {
		switch {
		case doc.Body == nil || doc.Body.Type() == ast.NullType || doc.Body.Type() == ast.CommentType:
		case root != nil:
			r.fail(doc.Body, "a second YAML document")
		default:
			root = doc.Body
		}
	}
	if root != nil {
		r.plain(root)
	}
	return root
}

// validPart is the length of the text before the first byte that is no UTF-8.
func validPart(text []byte) int {
	for i := 0; i < len(text); {
		c, n := utf8.DecodeRune(text[i:])
		if c == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return len(text)
}

// tooDeep finds the line where the nesting passes its bounds; 0: nowhere.
func tooDeep(tokens token.Tokens) int {
	brackets, line, steps := 0, 0, 0
	for _, t := range tokens {
		if t.Position.Line != line {
			line, steps = t.Position.Line, 0
			if t.Position.Column > maxIndent {
				return line
			}
		}
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			brackets++
		case token.SequenceEndType, token.MappingEndType:
			brackets = max(0, brackets-1)
		case token.SequenceEntryType, token.MappingKeyType, token.TagType, token.AnchorType:
			steps++
		}
		if brackets > maxDepth || steps > maxDepth {
			return line
		}
	}
	return 0
}

// yamlError splits an error of the YAML library into its line and the reason.
func yamlError(err error, line int) (int, string, any) {
	var e yaml.Error
	if !errors.As(err, &e) {
		return line, "%s", err.Error()
	}
	if t := e.GetToken(); t != nil && t.Position != nil {
		line = t.Position.Line
	}
	return line, "%s", e.GetMessage()
}

// plain refuses what the file format does not use: anchors, aliases, tags,
// and keys that stand in a mapping twice.
func (r *reader) plain(n ast.Node) {
	switch n := n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		r.fail(n, "anchors and aliases are not supported")
	case *ast.TagNode, *ast.DirectiveNode:
		r.fail(n, "tags and directives are not supported")
	case *ast.SequenceNode:
		for _, v := range n.Values {
			r.plain(v)
		}
	case *ast.MappingNode, *ast.MappingValueNode:
		first := map[string]int{}
		for _, v := range pairs(n) {
			key, line := v.Key.String(), lineOf(v.Key)
			if s, ok := v.Key.(*ast.StringNode); ok {
				key = s.Value
			} else {
				r.fail(v.Key, "the key %s is no text", key)
			}
			if before, twice := first[key]; twice {
				r.failAt(line, "the key %q stands there twice, first in line %d", key, before)
			} else {
				first[key] = line
			}
			r.plain(v.Value)
		}
	}
}

// pairs are the entries of a mapping; none for any other node.
func pairs(n ast.Node) []*ast.MappingValueNode {
	switch n := n.(type) {
	case *ast.MappingNode:
		return n.Values
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}
	}
	return nil
}

// keyOf is the text of an entry's key.
func keyOf(v *ast.MappingValueNode) string {
	if s, ok := v.Key.(*ast.StringNode); ok {
		return s.Value
	}
	return ""
}

// lineOf is where a value begins.
func lineOf(n ast.Node) int {
	if list := pairs(n); len(list) > 0 {
		n = list[0].Key
	}
	if n == nil {
		return 1
	}
	if t := n.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 1
}

// kindOf names a YAML value in words.
func kindOf(n ast.Node) string {
	switch n.(type) {
	case *ast.StringNode, *ast.LiteralNode:
		return "text"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "true or false"
	case *ast.NullNode, nil:
		return "nothing"
	case *ast.SequenceNode:
		return "a list"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	}
	return "something else"
}
