package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/sluicegw/sluice/engine"
)

// ErrNoSession: no living session has that number.
var ErrNoSession = errors.New("no such session")

// Session is a living session as `gateway sessions` shows it.
type Session struct {
	ID     uint64 `json:"id"`
	Client string `json:"client"`
	User   string `json:"user,omitempty"`
	// Kind is "transparent" for the client's own, which its flows join by
	// themselves, and "private" for one that a filter made.
	Kind  string    `json:"kind"`
	Since time.Time `json:"since"`
	// Flows are those that user space judged.
	Flows       int      `json:"flows"`
	Permissions int      `json:"permissions"`
	Filters     []string `json:"filters"`
}

// SessionOf turns the engine's view into the one for people.
func SessionOf(i engine.SessionInfo) Session {
	s := Session{
		ID: i.ID, Client: i.Client.String(), User: i.User, Kind: "transparent", Since: i.Since,
		Flows: i.Flows, Permissions: i.Permissions, Filters: append([]string{}, i.Filters...),
	}
	if i.Private {
		s.Kind = "private"
	}
	return s
}

func sessionRoutes(m *http.ServeMux, g Gateway) {
	m.HandleFunc("GET /sessions", func(w http.ResponseWriter, _ *http.Request) { reply(w, g.Sessions(), nil) })
	m.HandleFunc("DELETE /sessions/{id}", func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.ParseUint(r.PathValue("id"), 10, 64)
		if err != nil {
			http.Error(w, "a session has a number", http.StatusBadRequest)
			return
		}
		reply(w, struct{}{}, g.Disconnect(r.Context(), id))
	})
}

// Sessions lists the living sessions.
func (c *Client) Sessions(ctx context.Context) (s []Session, err error) {
	return s, c.do(ctx, "GET", "/sessions", nil, &s)
}

// Disconnect ends a session; see Gateway.
func (c *Client) Disconnect(ctx context.Context, id uint64) error {
	return c.do(ctx, "DELETE", fmt.Sprintf("/sessions/%d", id), nil, nil)
}
