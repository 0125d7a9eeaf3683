package main

import (
	"io"
	"sync"
	"time"
)

// lines writes what is logged. A line is written at once, unless another one was
// within the last moment: then it waits for the moment to be over, and goes out
// with all that came meanwhile. So a burst of flows that end does not cost a
// system call for each, and a line that matters is not lost with a process that
// dies of what it says. Safe for concurrent use.
type lines struct {
	out io.Writer

	mu      sync.Mutex
	waiting []byte
	due     bool // a write is on its way
	last    time.Time
}

const (
	// linesMoment is how long a line may wait.
	linesMoment = time.Millisecond
	// linesMost is how much may: more is written at once.
	linesMost = 64 << 10
)

// Write implements zapcore.WriteSyncer.
func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if !l.due && now.Sub(l.last) >= linesMoment {
		l.last = now
		return l.out.Write(b)
	}
	l.waiting = append(l.waiting, b...)
	if !l.due {
		l.due = true
		time.AfterFunc(linesMoment, l.moment)
	}
	if len(l.waiting) >= linesMost {
		return len(b), l.write()
	}
	return len(b), nil
}

// moment writes what has come in a moment.
func (l *lines) moment() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.due, l.last = false, time.Now()
	_ = l.write() // there is nobody to tell
}

// write writes what waits. l.mu is held.
func (l *lines) write() error {
	if len(l.waiting) == 0 {
		return nil
	}
	_, err := l.out.Write(l.waiting)
	if l.waiting = l.waiting[:0]; cap(l.waiting) > 2*linesMost {
		l.waiting = nil
	}
	return err
}

// Sync implements zapcore.WriteSyncer: nothing waits any more.
func (l *lines) Sync() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.write()
}
