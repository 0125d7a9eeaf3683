package filtertest_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
)

// A filter that fails open loses its data filters and the flow goes on; a
// deadline that passes is a failure, too.
func TestFailModes(t *testing.T) {
	for name, fail := range map[string]func(context.Context) error{
		"error":    func(context.Context) error { return errors.New("broken") },
		"panic":    func(context.Context) error { panic("broken") },
		"deadline": func(ctx context.Context) error { <-ctx.Done(); time.Sleep(time.Minute); return nil },
	} {
		for _, mode := range []filterapi.FailMode{filterapi.FailClosed, filterapi.FailOpen} {
			synctest.Test(t, func(t *testing.T) {
				f := &fragile{mode: mode, fail: fail}
				g := filtertest.New(t, f, "")
				fl, err := g.Offer(client, server)
				if open := err == nil; open != (mode == filterapi.FailOpen) {
					t.Errorf("%s in mode %v: %v", name, mode, err)
				}
				if err == nil {
					fl.Client.Send("x")
					fl.Server.Expect("x")
					if fl.Filtered {
						t.Error("the failed filter's data filter is there")
					}
				}
				if !strings.Contains(fmt.Sprint(g.Journal()), "failed") {
					t.Errorf("%s: journal %v", name, g.Journal())
				}
				time.Sleep(2 * time.Minute)
			})
		}
	}
}

type fragile struct {
	puppet
	mode filterapi.FailMode
	fail func(context.Context) error
}

func (f *fragile) FailMode() filterapi.FailMode { return f.mode }
func (f *fragile) AttachToSession(filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	return f, filterapi.Events{Types: filterapi.ConnectTCP}, nil
}
func (f *fragile) HandleEvent(ctx context.Context, ev filterapi.Event) error {
	if err := ev.(*filterapi.ConnectEvent).Connection.AttachDataFilter(passing{"!"}, filterapi.PriorityNAT); err != nil {
		return err
	}
	return f.fail(ctx)
}
