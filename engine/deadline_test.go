package engine

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestDeadline(t *testing.T) {
	parent, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := &Deadline{Parent: parent, At: time.Now().Add(time.Hour)}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
	child, stop := context.WithTimeout(c, 2*time.Hour)
	defer stop()
	if at, ok := child.Deadline(); !ok || !at.Equal(c.At) {
		t.Fatalf("the child may live until %v", at)
	}
	c.End()
	<-child.Done()
	if !errors.Is(c.Err(), context.Canceled) {
		t.Fatal(c.Err())
	}
	past := &Deadline{Parent: parent, At: time.Now().Add(-time.Second)}
	if !errors.Is(past.Err(), context.DeadlineExceeded) {
		t.Fatal(past.Err())
	}
	<-past.Done()
	never := &Deadline{Parent: parent, At: time.Now().Add(time.Hour)}
	cancel()
	<-never.Done()
}
