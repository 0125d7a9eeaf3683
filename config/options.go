package config

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// options lets a filter read its own options.
func (r *reader) options(v *ast.MappingValueNode, what string, parse func(func(any) error) (any, error)) any {
	empty := v.Value.Type() == ast.NullType || v.Value.Type() == ast.MappingType && len(pairs(v.Value)) == 0
	if parse == nil {
		if !empty {
			r.fail(v.Value, "%s: the filter takes no options", what)
		}
		return nil
	}
	line := lineOf(v.Key) // a filter does not know the lines of its options
	decode := func(into any) (err error) {
		if empty {
			return nil
		}
		defer func() { // the YAML decoder is not ours
			if p := recover(); p != nil {
				err = fmt.Errorf("decode options: %v", p)
			}
		}()
		if err := yaml.NodeToValue(v.Value, into, yaml.Strict()); err != nil {
			line, err = optionError(err, v, into)
			return err
		}
		return nil
	}
	options, err := parse(decode)
	if err != nil {
		r.failAt(line, "%s: %v", what, err)
	}
	return options
}

// optionError says in which line the options of a filter are wrong, and why, in
// the words of the file and not of the filter's Go.
func optionError(err error, v *ast.MappingValueNode, into any) (int, error) {
	line, _, reason := yamlError(err, lineOf(v.Value))
	var u *yaml.UnknownFieldError
	if errors.As(err, &u) && u.Token != nil {
		return line, fmt.Errorf("unknown option %q%s", u.Token.Value, optionsOf(into))
	}
	want := ""
	var t *yaml.TypeError
	var n *yaml.UnexpectedNodeTypeError
	var o *yaml.OverflowError
	var at *token.Token
	switch {
	case errors.As(err, &t):
		want, at = wantType(t.DstType), t.Token
	case errors.As(err, &n):
		want, at = wantNode(n.Expected), n.Token
	case errors.As(err, &o):
		want, at = "a smaller number", o.Token
		if o.SrcNum[:1] == "-" {
			want = "no negative number"
		}
	}
	if want == "" || at == nil {
		return line, fmt.Errorf("%v", reason)
	}
	key := ""
	for _, p := range pairs(v.Value) {
		if k := p.Key.GetToken(); k != nil && k.Position.Offset <= at.Position.Offset {
			key = keyOf(p) + ": "
		}
	}
	return line, fmt.Errorf("%swant %s", key, want)
}

// optionsOf lists the keys that a filter's flat struct takes, for an error.
func optionsOf(into any) string {
	t := reflect.TypeOf(into)
	if t == nil || t.Kind() != reflect.Pointer || t.Elem().Kind() != reflect.Struct {
		return ""
	}
	var keys []string
	for _, f := range reflect.VisibleFields(t.Elem()) {
		key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if key == "" || f.Type.Kind() == reflect.Struct {
			return "" // its keys may be another's
		}
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return "; the options are " + strings.Join(keys, ", ")
}

// wantType names what a field of a filter's options takes; empty: no words for it.
func wantType(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "text"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "a mapping"
	}
	if t.Kind() >= reflect.Int && t.Kind() <= reflect.Uint64 {
		return "a whole number"
	}
	if t.Kind() == reflect.Float32 || t.Kind() == reflect.Float64 {
		return "a number"
	}
	return ""
}

// wantNode is the same for the kinds of YAML values.
func wantNode(n ast.NodeType) string {
	switch n {
	case ast.BoolType:
		return "true or false"
	case ast.StringType:
		return "text"
	case ast.SequenceType:
		return "a list"
	case ast.MappingType, ast.MappingValueType:
		return "a mapping"
	}
	return ""
}
