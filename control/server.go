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
	if err := removeSocket(path); err != nil {
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
	s.http.ReadTimeout, s.http.WriteTimeout = readWithin, writeWithin
	s.http.ErrorLog = zap.NewStdLog(log)
	return s, nil
}

// readWithin bounds the arrival of a question, writeWithin that of the answer,
// which a reload of many flows takes some time to give.
const (
	readWithin  = 10 * time.Second
	writeWithin = 5 * time.Minute
)

// removeSocket makes room for a socket, and for nothing else's sake.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("%q is there and is no socket", path)
	}
	return os.Remove(path)
}

// stopWithin is how long a question that was asked before the end may still
// take.
const stopWithin = time.Second

// Run serves until ctx ends, and removes the socket.
func (s *Server) Run(ctx context.Context) error {
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		within, cancel := context.WithTimeout(context.Background(), stopWithin)
		defer cancel()
		if s.http.Shutdown(within) != nil {
			_ = s.http.Close() // who still waits for an answer gets none
		}
	})
	err := s.http.Serve(s.listener)
	if !stop() {
		<-ended
	}
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// switching is the body of PUT /no-kernel-mode. A rule's name may have any
// characters, so that it is not in the path.
type switching struct {
	Rule string `json:"rule"`
	On   *bool  `json:"on"`
}

func routes(g Gateway) http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /rules", func(w http.ResponseWriter, _ *http.Request) { reply(w, g.Rules(), nil) })
	m.HandleFunc("PUT /no-kernel-mode", func(w http.ResponseWriter, r *http.Request) {
		var what switching
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4096)).Decode(&what); err != nil || what.On == nil {
			http.Error(w, `want {"rule": NAME, "on": true or false}`, http.StatusBadRequest)
			return
		}
		reply(w, struct{}{}, g.SetNoKernelMode(r.Context(), what.Rule, *what.On))
	})
	m.HandleFunc("GET /flows", func(w http.ResponseWriter, r *http.Request) {
		f, err := g.Flows(r.Context())
		reply(w, f, err)
	})
	m.HandleFunc("GET /permissions", func(w http.ResponseWriter, _ *http.Request) { reply(w, g.Permissions(), nil) })
	bindRoutes(m, g)
	sessionRoutes(m, g)
	m.HandleFunc("GET /counters", func(w http.ResponseWriter, _ *http.Request) { reply(w, g.Counters(), nil) })
	m.HandleFunc("POST /reload", func(w http.ResponseWriter, r *http.Request) { reply(w, struct{}{}, g.Reload(r.Context())) })
	return m
}

func reply(w http.ResponseWriter, v any, err error) {
	switch {
	case errors.Is(err, ErrNoRule), errors.Is(err, ErrNoSession):
		http.Error(w, err.Error(), http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // the client has gone if this fails
	}
}
