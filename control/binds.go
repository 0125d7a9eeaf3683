package control

import (
	"context"
	"net/http"
	"time"

	"github.com/sluicegw/sluice/engine"
)

// Bind is an external address that the gateway holds for a client, as `gateway
// binds` shows it.
type Bind struct {
	ID uint64 `json:"id"`
	// State is "allowed" when somebody may come; else "reserved" (no source
	// may), "waiting" (for the client's address), "discarding" (until a filter
	// allows it), "emulated" (by a filter: nothing is open), or "used" (its
	// flows live, and no more come).
	State string `json:"state"`
	Proto string `json:"proto"`
	// External equals Client where nothing is translated.
	External string `json:"external"`
	// Client is empty for a bind that waits for it.
	Client string `json:"client,omitempty"`
	// By is the filter that asked for it, or what of the configuration.
	By string `json:"by"`
	// Sources may use it; "any": everybody.
	Sources  []string `json:"sources"`
	Multiple bool     `json:"multiple"`
	OneWay   bool     `json:"one_way,omitempty"`
	// SameSource: what the client sends from there leaves from External.
	SameSource bool   `json:"same_source,omitempty"`
	Socket     bool   `json:"socket,omitempty"` // its end is a socket of the gateway
	Rule       string `json:"rule,omitempty"`
	Protocol   string `json:"protocol,omitempty"`
	Session    uint64 `json:"session,omitempty"`
	Owner      string `json:"owner,omitempty"` // the session's client
	User       string `json:"user,omitempty"`
	Flows      int    `json:"flows"`
	// Expires is absent if it does not end by itself.
	Expires *time.Time `json:"expires,omitempty"`
}

// BindOf turns the engine's view into the one for people.
func BindOf(i engine.PermissionInfo) Bind {
	b := Bind{
		ID: i.ID, State: i.State, Proto: i.Proto.String(), External: addr(i.External), Client: addr(i.Client), By: i.By,
		Sources: []string{}, Multiple: i.Multiple, OneWay: i.OneWay, SameSource: i.Leaves != "", Socket: i.Socket,
		Rule: i.Rule, Protocol: i.Protocol, Session: i.Session, User: i.User, Flows: i.Flows,
	}
	if i.Owner.IsValid() {
		b.Owner = i.Owner.String()
	}
	if b.State == "armed" {
		b.State = "allowed"
	}
	for _, s := range i.Sources {
		b.Sources = append(b.Sources, s.String())
	}
	if i.AnySource {
		b.Sources = []string{"any"}
	}
	if !i.Expires.IsZero() {
		t := i.Expires
		b.Expires = &t
	}
	return b
}

func bindRoutes(m *http.ServeMux, g Gateway) {
	m.HandleFunc("GET /binds", func(w http.ResponseWriter, _ *http.Request) { reply(w, g.Binds(), nil) })
}

// Binds lists the external addresses that are held for clients.
func (c *Client) Binds(ctx context.Context) (b []Bind, err error) {
	return b, c.do(ctx, "GET", "/binds", nil, &b)
}
