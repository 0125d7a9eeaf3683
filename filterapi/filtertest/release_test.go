package filtertest_test

import (
	"errors"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
)

// A goroutine that waits in Recv is called off and takes nothing.
func TestReleaseCallsRecvOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		waited := make(chan error, 1)
		p := &puppet{pump: func(internal, external filterapi.Socket) error {
			go func() {
				_, err := external.Recv()
				waited <- errors.Join(err, external.Shutdown(false), internal.Close(true))
			}()
			synctest.Wait()
			return filterapi.ErrReleased
		}}
		g := filtertest.New(t, p, "")
		fl := g.Connect(client, server)
		if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
			t.Errorf("Pump: %v", err)
		}
		fl.Server.Send("in")
		fl.Client.Expect("in")
		fl.Client.Send("out")
		fl.Server.Expect("out")
		if err := <-waited; !errors.Is(err, filterapi.ErrReleased) {
			t.Errorf("the Recv that waited: %v", err)
		}
	})
}

// What a goroutine has in its hands comes first, however long a Send takes. It
// is lost when it is kept too long, and holds up nothing of the other
// direction.
func TestReleaseWaitsForBuffers(t *testing.T) {
	for _, late := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			sent := make(chan error, 1)
			p := &puppet{pump: func(internal, external filterapi.Socket) error {
				buf, err := external.Recv()
				if err != nil {
					return err
				}
				go func() {
					wait := filterapi.ReleaseGrace - time.Millisecond
					if late {
						wait += 2 * time.Millisecond
					}
					<-time.After(wait)
					sent <- internal.Send(buf)
				}()
				return filterapi.ErrReleased
			}}
			g := filtertest.New(t, p, "")
			fl := g.Connect(client, server)
			fl.Server.Send("first ", "second")
			fl.Client.Send("out")
			fl.Server.Expect("out")
			want, wantErr := "first second", error(nil)
			if late {
				want, wantErr = "second", filterapi.ErrReleased
			}
			fl.Client.Expect(want)
			if err := <-sent; !errors.Is(err, wantErr) {
				t.Errorf("late %v: Send: %v", late, err)
			}
			if lost := slices.Contains(g.Journal(), filtertest.Entry{What: filtertest.Lost, Text: "first "}); lost != late {
				t.Errorf("late %v: the journal says lost: %v", late, lost)
			}
		})
	}
}

// A Send that waits for a slow end is no buffer that is kept.
func TestReleaseWaitsForASend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sent := make(chan error, 1)
		p := &puppet{pump: func(internal, external filterapi.Socket) error {
			first, err := external.Recv()
			if err != nil {
				return err
			}
			second, err := external.Recv()
			if err != nil {
				return err
			}
			go func() { sent <- errors.Join(internal.Send(first), internal.Send(second)) }()
			return filterapi.ErrReleased
		}}
		g := filtertest.New(t, p, "")
		g.Window = 6
		fl := g.Connect(client, server)
		fl.Server.Send("first,", "second", "third")
		<-time.After(10 * filterapi.ReleaseGrace)
		fl.Client.Expect("first,secondthird")
		if err := <-sent; err != nil {
			t.Errorf("Send: %v", err)
		}
	})
}

// An end that a Recv has returned is met again.
func TestReleaseAfterTheEnd(t *testing.T) {
	p := &puppet{pump: func(_, external filterapi.Socket) error {
		if _, err := external.Recv(); err != io.EOF {
			return err
		}
		return filterapi.ErrReleased
	}}
	fl := filtertest.New(t, p, "").Connect(client, server)
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
	fl.Client.Send("out")
	fl.Server.Expect("out")
}
