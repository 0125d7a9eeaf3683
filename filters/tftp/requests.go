package tftp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// requests is the data filter between a client's port and the well-known port
// of a server. What the client sends is read by one goroutine, what the server
// sends by another.
type requests struct {
	log     *zap.Logger
	session filterapi.Session
	opts    *options

	conn               filterapi.Connection
	internal, external filterapi.Socket
	name, server       netip.AddrPort // where requests leave from, and go to

	// The log has one of these already. Each belongs to one of the goroutines.
	refused, strange bool

	mu      sync.Mutex
	waiting []waiting // oldest first
}

// Pump reads requests until the flow is forgotten. What was permitted and not
// used is void when it returns.
func (r *requests) Pump(_ context.Context, conn filterapi.Connection, internal, external filterapi.Socket) error {
	r.conn, r.internal, r.external = conn, internal, external
	var err error
	if r.name, err = conn.ExternalName(); err != nil {
		return fmt.Errorf("find where requests leave from: %w", err)
	}
	if r.server, err = conn.ExternalPeer(); err != nil {
		return fmt.Errorf("find where requests go to: %w", err)
	}

	// Whoever ends first takes the other one along.
	ended := make(chan error, 2)
	go func() { ended <- each(internal, r.fromClient) }()
	go func() { ended <- each(external, r.fromServer) }()
	err = <-ended
	_ = internal.Close(err != nil) // it is over, and nobody is left to tell
	_ = external.Close(err != nil)
	<-ended
	r.void()
	return err
}

// each hands over one datagram after the other; nil: no more will come.
func each(from filterapi.Socket, take func(*filterapi.Buffer) error) error {
	for {
		buf, err := from.Recv()
		if err == nil {
			err = take(buf)
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// fromClient passes a request on when its answer may come, and answers
// everything else itself.
func (r *requests) fromClient(buf *filterapi.Buffer) error {
	op, _ := opcodeOf(buf.Data)
	switch op {
	case opError:
		// An error is never answered (RFC 1350, 7).
		buf.Release()
		return nil
	case opData, opAck, opOptions:
		return r.refuse(buf, request{}, refuse(codeTransfer, "no transfer has this port"))
	}
	req, err := parseRequest(buf.Data)
	if err == nil && req.op == opWrite && r.opts.readOnly {
		err = refuse(codeAccess, "this rule is read-only")
	}
	if err == nil {
		buf.Data = req.message()
		err = r.permit(req, string(buf.Data))
	}
	if err != nil {
		return r.refuse(buf, req, err)
	}
	return r.external.Send(buf)
}

// refuse answers the datagram in the server's name.
func (r *requests) refuse(buf *filterapi.Buffer, req request, why error) error {
	var told *refusal
	if !errors.As(why, &told) {
		told = refusalOf(why)
	}
	r.note(&r.refused, "request refused", append(fieldsOf(req), zap.Uint16("code", told.code), zap.Error(why))...)
	buf.Data = told.message()
	return r.internal.Send(buf)
}

// refusalOf is what the client hears when the gateway permits nothing.
func refusalOf(err error) *refusal {
	switch {
	case errors.Is(err, filterapi.ErrPolicyDenied), errors.Is(err, filterapi.ErrNetworkDenied):
		return refuse(codeAccess, "the rules do not allow it")
	case errors.Is(err, filterapi.ErrQuota):
		return refuse(codeUndefined, "too many transfers wait")
	}
	return refuse(codeUndefined, "no way is open for the answer")
}

// fromServer passes an error and nothing else: a transfer has a port of its
// own (RFC 1350, 4).
func (r *requests) fromServer(buf *filterapi.Buffer) error {
	r.mu.Lock()
	asked := len(r.waiting) > 0
	r.mu.Unlock()
	if !asked || !isError(buf.Data) {
		op, _ := opcodeOf(buf.Data)
		r.note(&r.strange, "the server sends from the port of requests; lost", zap.Stringer("message", op))
		buf.Release()
		return nil
	}
	r.void()
	return r.internal.Send(buf)
}

// note writes into the log; of what a peer can repeat, only the first one
// stands out.
func (r *requests) note(before *bool, msg string, fields ...zap.Field) {
	level := zap.InfoLevel
	if *before {
		level = zap.DebugLevel
	}
	*before = true
	r.log.Log(level, msg, append([]zap.Field{zap.Stringer("flow", r.conn.Tuple())}, fields...)...)
}

func fieldsOf(req request) []zap.Field {
	if req.file == "" {
		return nil
	}
	return []zap.Field{zap.Stringer("operation", req.op), zap.String("file", req.file), zap.String("mode", req.mode)}
}
