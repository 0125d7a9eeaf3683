package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/config"
)

// newLogger writes to stderr: lines for people on a terminal, JSON otherwise,
// unless the configuration names one.
func newLogger(c config.Log) (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(c.Level)
	if err != nil {
		return nil, err
	}
	out := &lines{out: os.Stderr}
	if c.Format == "console" || c.Format == "auto" && isTerminal(os.Stderr) {
		return zap.New(&console{LevelEnabler: level, out: out}), nil
	}
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	enc.EncodeDuration = zapcore.StringDurationEncoder
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(enc), out, level)), nil
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// console is a zapcore.Core that writes `15:04:05.000 LEVEL logger: message
// key=value ...`. Safe for concurrent use.
type console struct {
	zapcore.LevelEnabler
	out    zapcore.WriteSyncer
	fields []zapcore.Field
}

// With implements zapcore.Core.
func (c *console) With(f []zapcore.Field) zapcore.Core {
	return &console{c.LevelEnabler, c.out, append(c.fields[:len(c.fields):len(c.fields)], f...)}
}

// Check implements zapcore.Core.
func (c *console) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements zapcore.Core.
func (c *console) Write(e zapcore.Entry, fields []zapcore.Field) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %-5s ", e.Time.Format("15:04:05.000"), e.Level.CapitalString())
	if e.LoggerName != "" {
		b.WriteString(e.LoggerName + ": ")
	}
	b.WriteString(e.Message)
	for _, list := range [][]zapcore.Field{c.fields, fields} {
		for _, f := range list {
			enc := zapcore.NewMapObjectEncoder()
			f.AddTo(enc)
			if v, ok := enc.Fields[f.Key]; ok {
				fmt.Fprintf(&b, " %s=%s", f.Key, plain(v))
			}
		}
	}
	b.WriteByte('\n')
	_, err := c.out.Write([]byte(b.String()))
	return err
}

// Sync implements zapcore.Core.
func (c *console) Sync() error { return c.out.Sync() }

// plain writes a value as people read it. Text with blanks is quoted; nothing
// that a far end has sent can begin a line of its own.
func plain(v any) string {
	var s string
	switch v := v.(type) {
	case time.Time:
		return v.Format("15:04:05.000")
	case []any:
		parts := make([]string, 0, len(v))
		for _, x := range v {
			parts = append(parts, plain(x))
		}
		return strings.Join(parts, ",")
	case string:
		s = v
	default:
		s = fmt.Sprint(v)
	}
	if quoted := fmt.Sprintf("%q", s); s == "" || strings.ContainsAny(s, " \"=") || quoted != `"`+s+`"` {
		return quoted
	}
	return s
}
