package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// Client asks a running gateway.
type Client struct {
	path string
	http http.Client
}

// Dial makes a client for a socket; it connects with the first call.
func Dial(path string) *Client {
	c := &Client{path: path}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}
	return c
}

// Rules lists the access rules in order.
func (c *Client) Rules(ctx context.Context) (r []Rule, err error) {
	return r, c.do(ctx, "GET", "/rules", nil, &r)
}

// Flows lists the living flows.
func (c *Client) Flows(ctx context.Context) (f []Flow, err error) {
	return f, c.do(ctx, "GET", "/flows", nil, &f)
}

// Permissions lists the permissions that wait or whose flows live.
func (c *Client) Permissions(ctx context.Context) (p []Permission, err error) {
	return p, c.do(ctx, "GET", "/permissions", nil, &p)
}

// Counters gives the gateway's own counters by name.
func (c *Client) Counters(ctx context.Context) (m map[string]uint64, err error) {
	return m, c.do(ctx, "GET", "/counters", nil, &m)
}

// SetNoKernelMode moves new flows of a rule; see Gateway.
func (c *Client) SetNoKernelMode(ctx context.Context, rule string, on bool) error {
	return c.do(ctx, "PUT", "/no-kernel-mode", switching{rule, &on}, nil)
}

// Reload makes the gateway read its configuration again.
func (c *Client) Reload(ctx context.Context) error {
	return c.do(ctx, "POST", "/reload", nil, nil)
}

// answerWithin bounds a call whose context has no deadline: a gateway that is
// stopped (SIGSTOP) accepts connections and never answers.
const answerWithin = 30 * time.Second

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, answerWithin)
		defer cancel()
	}
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://gateway"+path, &body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			return fmt.Errorf("the gateway at %q did not answer in time: %w", c.path, context.DeadlineExceeded)
		case errors.As(err, &op):
			return fmt.Errorf("no gateway answers at %q: %w", c.path, op.Err)
		}
		return fmt.Errorf("ask the gateway at %q: %w", c.path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // as much as came
		return errors.New(strings.TrimSpace(string(text)))
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("read the gateway's answer: %w", err)
	}
	return nil
}
