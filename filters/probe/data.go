package probe

import (
	"context"
	"errors"
	"io"

	"github.com/sluicegw/sluice/filterapi"
)

// dataFilter passes bytes and reports them. With a tag, it stands before the
// first bytes of each direction.
type dataFilter struct {
	f   *Filter
	tag string
}

// Pump implements filterapi.DataFilter.
func (d *dataFilter) Pump(ctx context.Context, conn filterapi.Connection, internal, external filterapi.Socket) error {
	done := make(chan error, 2)
	go func() { done <- d.carry(ctx, conn, "internal", internal, external) }()
	go func() { done <- d.carry(ctx, conn, "external", external, internal) }()
	return errors.Join(<-done, <-done)
}

func (d *dataFilter) carry(ctx context.Context, conn filterapi.Connection, side string, from, to filterapi.Socket) error {
	var tag []byte
	if d.tag != "" {
		tag = []byte(d.tag)
	}
	for {
		d.f.mu.Lock()
		gate := d.f.paused[conn]
		d.f.mu.Unlock()
		if gate != nil {
			select {
			case <-gate:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		b, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return to.Shutdown(false)
		}
		if err != nil {
			_ = to.Close(true) // the far side was reset: so is this one
			return err
		}
		d.f.mu.Lock()
		d.f.lastID++
		e := event{Event: d.f.lastID, Kind: "Bytes", Conn: d.f.connID(conn), FromSide: side}
		d.f.mu.Unlock()
		e.Data = append(e.Data, b.Data...)
		d.f.push(e)
		if tag != nil {
			b.Data = append(tag, b.Data...)
			tag = nil
		}
		if err := to.Send(b); err != nil {
			return err
		}
	}
}
