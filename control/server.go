package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
)

// ErrNoRule: no rule of that name.
var ErrNoRule = errors.New("no such rule")

// Server answers on the Unix socket.
type Server struct {
	listener net.Listener
	http     http.Server
}

// Listen opens the socket, for root alone. A socket that a dead gateway left
// is replaced; one that answers is an error.
func Listen(path string, g Gateway, log *zap.Logger) (*Server, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("control socket %q: another gateway answers there", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	s := &Server{listener: l}
	s.http.Handler = routes(g)
	s.http.ReadHeaderTimeout = 10 * time.Second
	s.http.ErrorLog = zap.NewStdLog(log)
	return s, nil
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = s.http.Close() })
	defer stop()
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

func routes(g Gateway) http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /rules", func(w http.ResponseWriter, _ *http.Request) { reply(w, g.Rules(), nil) })
	m.HandleFunc("PUT /rules/{name}/no-kernel-mode", func(w http.ResponseWriter, r *http.Request) {
		var on bool
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64)).Decode(&on); err != nil {
			http.Error(w, "want true or false", http.StatusBadRequest)
			return
		}
		reply(w, struct{}{}, g.SetNoKernelMode(r.Context(), r.PathValue("name"), on))
	})
	m.HandleFunc("GET /flows", func(w http.ResponseWriter, r *http.Request) {
		f, err := g.Flows(r.Context())
		reply(w, f, err)
	})
	m.HandleFunc("GET /permissions", func(w http.ResponseWriter, _ *http.Request) { reply(w, g.Permissions(), nil) })
	m.HandleFunc("GET /counters", func(w http.ResponseWriter, _ *http.Request) { reply(w, g.Counters(), nil) })
	m.HandleFunc("POST /reload", func(w http.ResponseWriter, r *http.Request) { reply(w, struct{}{}, g.Reload(r.Context())) })
	return m
}

func reply(w http.ResponseWriter, v any, err error) {
	switch {
	case errors.Is(err, ErrNoRule):
		http.Error(w, err.Error(), http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // the client has gone if this fails
	}
}
