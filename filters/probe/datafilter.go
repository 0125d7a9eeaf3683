package probe

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
)

// dataFilter passes bytes and reports them. With a tag, it stands before the
// first bytes of each direction. Modes: upper changes letters; echo sends back
// to the client what comes from it; quiet reports no bytes.
type dataFilter struct {
	f         *Filter
	tag, mode string
}

func (f *Filter) dataFilter(a answer) *dataFilter { return &dataFilter{f, a.Chain, a.Mode} }

// control is how a test steers the data filters on one connection.
type control struct {
	mu       sync.Mutex
	gate     chan struct{} // not nil: nothing is read until it is closed
	release  chan struct{} // closed: Pump gives the flow back
	released bool
	closing  bool // the test closes the sockets itself
	abortive bool // and that way
	pumps    []*pump
}

type pump struct{ internal, external filterapi.Socket }

// controlOf gives a connection's control, which is made at need.
func (f *Filter) controlOf(c filterapi.Connection) *control {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.controls[c]
	if k == nil {
		k = &control{release: make(chan struct{})}
		f.controls[c] = k
	}
	return k
}

// pause stops the reading of all data filters on the connection, or lets it go
// on.
func (k *control) pause(on bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case on && k.gate == nil:
		k.gate = make(chan struct{})
	case !on && k.gate != nil:
		close(k.gate)
		k.gate = nil
	}
}

func (k *control) letGo() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.released {
		k.released = true
		close(k.release)
	}
}

// ending says that errors are the test's own doing from now on.
func (k *control) ending(abortive bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closing, k.abortive = true, abortive
}

func (k *control) isEnding() (closing, abortive bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.closing, k.abortive
}

func (k *control) add(p *pump) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pumps = append(k.pumps, p)
}

// wait returns when reading is allowed.
func (k *control) wait(ctx context.Context) error {
	k.mu.Lock()
	gate := k.gate
	k.mu.Unlock()
	if gate == nil {
		return nil
	}
	select {
	case <-gate:
		return nil
	case <-k.release:
		return filterapi.ErrReleased
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sockets are those of one side; the first pump's are used.
func (k *control) socket(side string) (filterapi.Socket, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.pumps) == 0 {
		return nil, filterapi.ErrNotFound
	}
	if side == "internal" {
		return k.pumps[0].internal, nil
	}
	return k.pumps[0].external, nil
}

// Pump implements filterapi.DataFilter.
func (d *dataFilter) Pump(ctx context.Context, conn filterapi.Connection, internal, external filterapi.Socket) error {
	k := d.f.controlOf(conn)
	k.add(&pump{internal, external})
	started := event{Event: d.f.next(), Kind: "Pump", Conn: d.f.numbered(conn), Dst: conn.Tuple().Dst.String()}
	started.Name, started.Peer = text(conn.ExternalName()), text(conn.ExternalPeer())
	d.f.push(started)
	err := d.pump(ctx, k, conn, internal, external)
	d.f.push(event{Event: d.f.next(), Kind: "PumpEnd", Conn: started.Conn, Dst: started.Dst, Error: errorName(err)})
	return err
}

func (d *dataFilter) pump(ctx context.Context, k *control, conn filterapi.Connection, internal, external filterapi.Socket) error {
	if d.mode == "echo" || external == nil {
		return d.carry(ctx, k, conn, "internal", internal, internal)
	}
	done := make(chan error, 2)
	go func() { done <- d.carry(ctx, k, conn, "internal", internal, external) }()
	go func() { done <- d.carry(ctx, k, conn, "external", external, internal) }()
	var all error
	for range 2 {
		select {
		case err := <-done:
			all = errors.Join(all, err)
		case <-k.release:
			return filterapi.ErrReleased
		}
	}
	return all
}

func (d *dataFilter) carry(ctx context.Context, k *control, conn filterapi.Connection, side string, from, to filterapi.Socket) error {
	tag := []byte(d.tag)
	for {
		if err := k.wait(ctx); err != nil {
			return err
		}
		b, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return to.Shutdown(false)
		}
		if errors.Is(err, filterapi.ErrReleased) {
			return nil
		}
		if err != nil {
			if closing, abortive := k.isEnding(); closing {
				return to.Close(abortive)
			}
			_ = to.Close(true) // the far side was reset: so is this one
			return err
		}
		if d.mode != "quiet" {
			d.f.push(event{
				Event: d.f.next(), Kind: "Bytes", Conn: d.f.numbered(conn), FromSide: side,
				Remote: b.Addr.String(), Data: bytes.Clone(b.Data),
			})
		}
		if d.mode == "upper" {
			b.Data = bytes.ToUpper(b.Data)
		}
		if len(tag) > 0 {
			b.Data = append(tag, b.Data...)
			tag = nil
		}
		if err := to.Send(b); err != nil {
			return err
		}
	}
}
