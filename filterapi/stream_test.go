package filterapi_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/sluicegw/sluice/filterapi"
)

// fake is a socket that gives segments, then an error, and keeps what is sent.
type fake struct {
	in    []*filterapi.Buffer
	end   error
	out   []*filterapi.Buffer
	full  error // of Send
	calls []string
}

func script(end error, segments ...string) *fake {
	f := &fake{end: end}
	for _, s := range segments {
		f.in = append(f.in, filterapi.NewBuffer([]byte(s), nil))
	}
	return f
}

func (f *fake) Recv() (*filterapi.Buffer, error) {
	if len(f.in) == 0 {
		return nil, f.end
	}
	b := f.in[0]
	f.in = f.in[1:]
	return b, nil
}

func (f *fake) Send(b *filterapi.Buffer) error {
	if f.full == nil {
		f.out = append(f.out, b)
	}
	return f.full
}

func (f *fake) note(call string, abortive bool) error {
	if abortive {
		call = "abort"
	}
	f.calls = append(f.calls, call)
	return nil
}
func (f *fake) Shutdown(abortive bool) error { return f.note("shutdown", abortive) }
func (f *fake) Close(abortive bool) error    { return f.note("close", abortive) }

func (f *fake) text() string {
	var all strings.Builder
	for _, b := range f.out {
		all.Write(b.Data)
	}
	return all.String()
}

func TestStreamReads(t *testing.T) {
	for _, end := range []error{io.EOF, filterapi.ErrReleased, errors.New("reset")} {
		s := filterapi.NewStream(script(end, "he", "", "llo ", "world"))
		got, err := io.ReadAll(iotest.OneByteReader(s))
		if want := end; string(got) != "hello world" || end != io.EOF && !errors.Is(err, want) || end == io.EOF && err != nil {
			t.Errorf("%q, %v after %v", got, err, end)
		}
	}
	if err := iotest.TestReader(filterapi.NewStream(script(io.EOF, "one,", "two,", "three")), []byte("one,two,three")); err != nil {
		t.Error(err)
	}
	if filterapi.NewStream(nil) != nil {
		t.Error("a stream of no socket")
	}
}

// What is not read comes out by Take, behind what bufio has read ahead.
func TestStreamTake(t *testing.T) {
	released := 0
	f := script(io.EOF)
	f.in = append(f.in, filterapi.NewBuffer([]byte("line\nmore and the rest"), func(*filterapi.Buffer) { released++ }))
	s := filterapi.NewStream(f)
	r := bufio.NewReaderSize(s, 16)
	line, err := r.ReadString('\n')
	if line != "line\n" || err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	ahead, _ := r.Peek(r.Buffered())
	b := s.Take()
	if b == nil || string(ahead)+string(b.Data) != "more and the rest" || released != 0 {
		t.Fatalf("read ahead %q, taken %v, released %d", ahead, b, released)
	}
	b.Release()
	if s.Take() != nil || released != 1 {
		t.Errorf("taken twice, or released %d times", released)
	}
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after Take: %v", err)
	}
}

func TestStreamWrites(t *testing.T) {
	f := &fake{}
	s := filterapi.NewStream(f)
	big := bytes.Repeat([]byte("x"), 2*filterapi.DefaultStreamBuffer+5)
	n, err := s.Write(big)
	if n != len(big) || err != nil || f.text() != string(big) || len(f.out) != 3 {
		t.Errorf("wrote %d in %d buffers, %v", n, len(f.out), err)
	}
	copy(big, "changed")
	if strings.Contains(f.text(), "changed") {
		t.Error("what was written is not the socket's own")
	}
	f.full = filterapi.ErrReleased
	if n, err := s.Write([]byte("a")); n != 0 || !errors.Is(err, filterapi.ErrReleased) {
		t.Errorf("to a flow that was given back: %d, %v", n, err)
	}
	if err := errors.Join(s.CloseWrite(), s.Close()); err != nil || strings.Join(f.calls, " ") != "shutdown close" {
		t.Errorf("%v, calls %v", err, f.calls)
	}
}

// Between two streams buffers are moved, not copied, also when a part of the
// first was read already.
func TestStreamMoves(t *testing.T) {
	for name, move := range map[string]func(to, from *filterapi.Stream) (int64, error){
		"io.Copy":  func(to, from *filterapi.Stream) (int64, error) { return io.Copy(to, from) },
		"ReadFrom": func(to, from *filterapi.Stream) (int64, error) { return to.ReadFrom(from) },
	} {
		src, dst := script(io.EOF, "abc", "def"), &fake{}
		second := src.in[1]
		from := filterapi.NewStream(src)
		if _, err := from.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		n, err := move(filterapi.NewStream(dst), from)
		if n != 5 || err != nil || dst.text() != "bcdef" {
			t.Errorf("%s: %d bytes %q, %v", name, n, dst.text(), err)
		}
		if len(dst.out) != 2 || dst.out[1] != second {
			t.Errorf("%s: the buffers were copied", name)
		}
		dst.full = errors.New("closed")
		if n, err := move(filterapi.NewStream(dst), filterapi.NewStream(script(io.EOF, "abc"))); n != 0 || !errors.Is(err, dst.full) {
			t.Errorf("%s to a socket that fails: %d, %v", name, n, err)
		}
	}
	dst := &fake{}
	if n, err := filterapi.NewStream(dst).ReadFrom(iotest.HalfReader(strings.NewReader("plain reader"))); n != 12 || err != nil || dst.text() != "plain reader" {
		t.Errorf("from a reader: %d %q, %v", n, dst.text(), err)
	}
	var w bytes.Buffer
	if n, err := filterapi.NewStream(script(io.EOF, "plain ", "writer")).WriteTo(&w); n != 12 || err != nil || w.String() != "plain writer" {
		t.Errorf("to a writer: %d %q, %v", n, w.String(), err)
	}
}

func TestPass(t *testing.T) {
	broken := errors.New("reset")
	for name, c := range map[string]struct {
		end, full, want error
		from, to        string // calls
	}{
		"end of stream":  {end: io.EOF, to: "shutdown"},
		"reset":          {end: broken, want: broken, from: "abort", to: "abort"},
		"far side gone":  {full: broken, want: broken, from: "abort", to: "abort"},
		"released":       {end: filterapi.ErrReleased, want: filterapi.ErrReleased},
		"released, late": {full: filterapi.ErrReleased, want: filterapi.ErrReleased},
	} {
		from, to := script(c.end, "a", "b"), &fake{full: c.full}
		err := filterapi.Pass(from, to)
		if !errors.Is(err, c.want) || strings.Join(from.calls, " ") != c.from || strings.Join(to.calls, " ") != c.to {
			t.Errorf("%s: %v, from %v, to %v", name, err, from.calls, to.calls)
		}
		if c.full == nil && to.text() != "ab" {
			t.Errorf("%s: passed %q", name, to.text())
		}
	}
}
