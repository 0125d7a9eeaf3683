package probe

import (
	"context"
	"errors"
	"io"

	"github.com/sluicegw/sluice/filterapi"
)

// through is a data filter that passes everything on and tells nobody, for the
// bench: what it costs is what the gateway's chain costs. One direction has the
// goroutine that Pump is called on.
type through struct{}

// Pump implements filterapi.DataFilter.
func (through) Pump(_ context.Context, _ filterapi.Connection, internal, external filterapi.Socket) error {
	back := make(chan error, 1)
	go func() { back <- passOn(external, internal) }()
	return errors.Join(passOn(internal, external), <-back)
}

// passOn carries one direction to its end.
func passOn(from, to filterapi.Socket) error {
	for {
		b, err := from.Recv()
		switch {
		case err == nil:
			err = to.Send(b)
		case errors.Is(err, io.EOF):
			return to.Shutdown(false)
		default:
			_ = to.Close(true) // the far side was reset: so is this one
		}
		if err != nil {
			return err
		}
	}
}
