package kernelpath

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/nat"
)

// Table is the gateway's table in one network namespace: its rules (Load) and
// the permissions in its sets (Install, Remove). One goroutine owns all
// changes. All changes that wait while a transaction is in flight go out
// together in the next one. Safe for concurrent use.
type Table struct {
	netns int
	log   *zap.Logger

	mu      sync.Mutex
	waiting []*change
	closed  bool
	wake    chan struct{} // holds one: there is something to do
	done    chan struct{} // closed when the owner has ended

	// The rest belongs to the owner goroutine.
	sock    *socket
	holders holders
	// demanded says that the chains on demand are wanted; demand are those of
	// the ruleset that was loaded last.
	demanded bool
	demand   []*chain
	// shape is what the table looks like since our last change of more than
	// elements (0: none is loaded), looked the generation at which it still did.
	shape  uint64
	looked uint32
	// commits counts transactions with permissions, for tests.
	commits int
}

// ErrClosed is the answer of a Table after Close.
var ErrClosed = errors.New("the table is closed")

// change is one waiting call: a permission to install or remove, or a function
// that has the table for itself.
type change struct {
	ctx        context.Context
	permission nat.Permission
	remove     bool
	// refused is why a permission cannot be installed; what there is of its
	// ID is removed instead.
	refused error
	alone   func() error
	result  chan error  // one answer, exactly once
	done    func(error) // instead of result
}

func (c *change) answer(err error) {
	if c.done != nil {
		c.done(err)
		return
	}
	c.result <- err
}

// Open connects to nf_tables. netns is a file descriptor of a network
// namespace, which the caller keeps open as long as the Table; 0: the one of
// the calling thread. Nothing is changed before Load. Close ends it.
func Open(netns int, log *zap.Logger) (*Table, error) {
	sock, err := dialTable(netns)
	if err != nil {
		return nil, err
	}
	t := &Table{
		netns: netns, log: log, sock: sock, holders: newHolders(),
		wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	go t.own()
	return t, nil
}

// Close ends the owner goroutine when it has answered what waits. What is in
// the kernel stays there. It may be called twice.
func (t *Table) Close() error {
	t.mu.Lock()
	first := !t.closed
	t.closed = true
	t.mu.Unlock()
	t.rouse()
	<-t.done
	if !first {
		return nil
	}
	return t.sock.close()
}

// Install lets the flows of a permission in and returns when the kernel has
// acknowledged. One with the same ID is replaced, its time begins anew. On
// error nothing of it is in force. (engine.Kernel)
func (t *Table) Install(ctx context.Context, p nat.Permission) error {
	if err := t.submit(&change{ctx: ctx, permission: p}); err != nil {
		return fmt.Errorf("install permission %d: %w", p.ID, err)
	}
	return nil
}

// InstallLater is Install for who does not wait: done is called with its error
// on the owner goroutine, and must neither block nor call the Table. Those that
// are asked for together are told together. (engine.Kernel)
func (t *Table) InstallLater(p nat.Permission, done func(error)) {
	told := func(err error) {
		if err != nil {
			err = fmt.Errorf("install permission %d: %w", p.ID, err)
		}
		done(err)
	}
	if !t.queue(&change{ctx: context.Background(), permission: p, done: told}) {
		told(ErrClosed)
	}
}

// Remove voids a permission and returns when the kernel has acknowledged. One
// that was used up, has expired or is unknown is no error. (engine.Kernel)
func (t *Table) Remove(ctx context.Context, p nat.Permission) error {
	if err := t.submit(&change{ctx: ctx, permission: p, remove: true}); err != nil {
		return fmt.Errorf("remove permission %d: %w", p.ID, err)
	}
	return nil
}

// do runs f on the owner goroutine, between two transactions.
func (t *Table) do(ctx context.Context, f func() error) error {
	return t.submit(&change{ctx: ctx, alone: f})
}

// submit hands a change over and waits for its own answer. A transaction never
// waits for anybody, so a context that ends meanwhile is looked at only before
// the change goes out.
func (t *Table) submit(c *change) error {
	c.result = make(chan error, 1)
	if !t.queue(c) {
		return ErrClosed
	}
	return <-c.result
}

// queue puts a change among those that wait; false: the table is closed.
func (t *Table) queue(c *change) bool {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return false
	}
	t.waiting = append(t.waiting, c)
	t.mu.Unlock()
	t.rouse()
	return true
}

func (t *Table) rouse() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// own is the owner goroutine.
func (t *Table) own() {
	defer close(t.done)
	for range t.wake {
		t.mu.Lock()
		batch, closed := t.waiting, t.closed
		t.waiting = nil
		t.mu.Unlock()
		t.work(batch)
		if closed {
			return
		}
	}
}

// work answers a batch in its order: neighbouring permissions go out together.
func (t *Table) work(batch []*change) {
	var group []*change
	flush := func() {
		t.apply(group)
		group = nil
	}
	for _, c := range batch {
		switch {
		case c.ctx.Err() != nil:
			c.answer(c.ctx.Err())
		case c.alone != nil:
			flush()
			c.answer(c.alone())
		default:
			group = append(group, c)
		}
	}
	flush()
}

// apply sends permissions as one transaction. If the kernel refuses it, the
// halves are tried alone, so that in the end each caller gets its own error
// and no other.
func (t *Table) apply(group []*change) {
	if len(group) == 0 {
		return
	}
	now := time.Now()
	t.holders.sweep(now)
	t.closeGates()
	undo := t.holders.begin()
	for _, c := range group {
		t.holders.take(c, now)
	}
	err := t.commit(t.holders.transaction(now))
	t.commits++
	switch {
	case err == nil:
		t.holders.gates.opened(now)
		t.holders.end()
		for _, c := range group {
			c.answer(c.refused)
		}
	case errors.Is(err, unix.ENOENT) && t.gone():
		// Trying each alone would keep Guard waiting: the kernel takes its time
		// to refuse a transaction. What Load puts back is what is held.
		undo()
		for _, c := range group {
			t.holders.drop(c.permission.ID)
			if c.remove {
				c.answer(nil)
			} else {
				c.answer(fmt.Errorf("table %s is gone: %w", tableName, unix.ENOENT))
			}
		}
	case len(group) > 1:
		undo()
		t.apply(group[:len(group)/2])
		t.apply(group[len(group)/2:])
	default:
		undo()
		err := t.alone(group[0])
		group[0].answer(cmp.Or(group[0].refused, err))
	}
}

// alone tries one permission again: the packet path may have used up an
// element between our adding and deleting it, and a map may hold the key with
// another value from an earlier run. On error nothing of it stays in force.
func (t *Table) alone(c *change) error {
	const tries = 3
	var err error
	for range tries {
		now := time.Now()
		undo := t.holders.begin()
		t.holders.take(c, now)
		t.clear(t.holders.touchedSlots())
		if err = t.commit(t.holders.transaction(now)); err == nil {
			t.holders.gates.opened(now)
			t.holders.end()
			return nil
		}
		undo()
	}
	if !c.remove {
		if slots, bad := slotsOf(c.permission); bad == nil {
			t.holders.drop(c.permission.ID)
			t.clear(t.holders.unheld(slots))
		}
	}
	return err
}

// gone says whether there is no table: somebody else has deleted it.
func (t *Table) gone() bool {
	there := false
	err := t.sock.eachObject(unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, func(map[uint16][]byte) { there = true })
	return err == nil && !there
}

// clear deletes slots one by one, each if it is there.
func (t *Table) clear(slots []slot) {
	for _, s := range slots {
		tx := &transaction{}
		tx.deleteElements(s.in(), []element{s.bare()})
		_ = t.commit(tx) // what is not there need not go
	}
}

// commit sends a transaction over the lasting socket, and opens that anew when
// the socket itself failed.
func (t *Table) commit(tx *transaction) error {
	err := t.sock.commit(tx)
	var refused *transactionError
	if err == nil || errors.As(err, &refused) || tx.err != nil {
		return err
	}
	fresh, dialErr := dialTable(t.netns)
	if dialErr != nil {
		return errors.Join(err, dialErr)
	}
	_ = t.sock.close()
	t.sock = fresh
	return err
}
