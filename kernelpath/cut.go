package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// The life of a cut flow after Cut has returned:
//
//	marked, probed --cutAgain--> probed again --cutAgain--> ... --cutLinger--> deleted: DESTROY
//
// While it is marked, the table's cut chain resets whoever speaks. The probes
// make idle ends speak; they are repeated because one may be lost and because
// Linux answers at most one bad acknowledgement in 500 ms
// (net.ipv4.tcp_invalid_ratelimit).
const (
	cutAgain  = 600 * time.Millisecond
	cutLinger = 2 * time.Second
	// cutTimeout is the timer that the entry itself gets, never to be
	// refreshed: a flow is gone even if nobody is left to delete it.
	cutTimeout = 5 * time.Second
)

// CutConfig is what a Cutter needs.
type CutConfig struct {
	Marks flow.Marks
	// Unoffload takes all flows out of the flowtable and returns when the
	// kernel has acknowledged; they come back with their next packet, cut ones
	// excepted. It may run concurrently with everything. nil: no flowtable.
	Unoffload func(context.Context) error
	Logger    *zap.Logger
}

// Cutter ends living kernel flows. The table does its part: its arrive chain
// sends the entries with the cut bit to a reset, and its raw output chain
// leaves packets with the Reject mark untracked. Safe for concurrent use.
type Cutter struct {
	cfg    CutConfig
	probes *prober

	entries *ctSocket

	mu      sync.Mutex
	pending []cutFlow
	wake    chan struct{}
}

// cutFlow is a marked flow that waits for its end.
type cutFlow struct {
	KernelFlow
	again, end time.Time
}

// NewCutter opens its sockets in the network namespace of the calling thread.
func NewCutter(cfg CutConfig) (*Cutter, error) {
	entries, err := dialConntrack()
	if err != nil {
		return nil, err
	}
	probes, err := newProber(cfg.Marks.Value(flow.Reject))
	if err != nil {
		entries.close()
		return nil, err
	}
	return &Cutter{cfg: cfg, probes: probes, entries: entries, wake: make(chan struct{}, 1)}, nil
}

// Close frees the sockets; no other method may run or follow.
func (c *Cutter) Close() error { return errors.Join(c.entries.close(), c.probes.close()) }

// Cut ends living flows, named by the tuple of their first packet before
// translation. When it returns, no packet of them is carried any more and the
// ends of TCP have been probed; Run does the rest. A flow that is gone, or
// that the gateway does not carry, is no error. On error the flows that could
// be cut are. One that was cut before is left to its end.
func (c *Cutter) Cut(ctx context.Context, tuples ...flow.Tuple) error {
	var errs []error
	var marked []cutFlow
	now := time.Now()
	offloaded := false
	for _, t := range tuples {
		if ctx.Err() != nil {
			errs = append(errs, fmt.Errorf("cut %s: %w", t, context.Cause(ctx)))
			break
		}
		f, ok, err := c.mark(t)
		if err != nil {
			errs = append(errs, fmt.Errorf("cut %s: %w", t, err))
		}
		if ok {
			marked = append(marked, cutFlow{f, now.Add(cutAgain), now.Add(cutLinger)})
			offloaded = offloaded || f.Offloaded()
		}
	}
	// Marked flows cannot go back into the flowtable, so it is emptied after.
	if offloaded {
		errs = append(errs, c.unoffload(ctx))
	}
	for i := range marked {
		errs = append(errs, c.probes.probe(&marked[i].KernelFlow))
	}
	if len(marked) > 0 {
		c.mu.Lock()
		c.pending = append(c.pending, marked...)
		c.mu.Unlock()
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
	return errors.Join(errs...)
}

// mark sets the cut bit and a timer that nothing refreshes. false: there is
// nothing to cut. The status comes back as it is after the change.
func (c *Cutter) mark(t flow.Tuple) (KernelFlow, bool, error) {
	const attempts = 4
	for i := range attempts {
		f, ok, err := c.entries.entry(t)
		if !ok || err != nil {
			return f, false, err
		}
		if path := c.cfg.Marks.Path(f.Mark); !path.Carries() {
			return f, false, nil
		}
		if c.cfg.Marks.IsCut(f.Mark) {
			// Marked here, or before and on its way to its end. A second end
			// would hit whatever flow has the same tuple by then: the kernel
			// gives the same ID to an entry of the same tuple in the same place.
			return f, i > 0, nil
		}
		attrs := appendTupleAttr(nil, t)
		attrs = appendAttr32(attrs, ctaMark, c.cfg.Marks.CutValue(c.cfg.Marks.Path(f.Mark)))
		attrs = appendAttr32(attrs, ctaMarkMask, c.cfg.Marks.Mask())
		if f.Status&statusFixedTimeout == 0 {
			attrs = appendAttr32(attrs, ctaTimeout, uint32(cutTimeout/time.Second))
			attrs = appendAttr32(attrs, ctaStatus, f.Status|statusFixedTimeout)
		}
		err = c.entries.request(ctMsgNew, nfFamilyOf(t), attrs, nil)
		switch {
		case errors.Is(err, unix.ENOENT):
			return f, false, nil
		case errors.Is(err, unix.EBUSY), err == nil:
			// EBUSY: the status moved on meanwhile, an answer came for example.
		default:
			return f, false, fmt.Errorf("mark conntrack entry: %w", err)
		}
	}
	return KernelFlow{}, false, fmt.Errorf("mark conntrack entry: %w", unix.EBUSY)
}

func (c *Cutter) unoffload(ctx context.Context) error {
	if c.cfg.Unoffload == nil {
		return errors.New("take cut flows out of the flowtable: the table offers no way")
	}
	if err := c.cfg.Unoffload(ctx); err != nil {
		return fmt.Errorf("take cut flows out of the flowtable: %w", err)
	}
	return nil
}

// Run brings cut flows to their end until ctx is over, which is no error.
func (c *Cutter) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		if next, any := c.advance(ctx, time.Now()); any {
			timer.Reset(time.Until(next))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-timer.C:
		}
	}
}

// advance does what is due and says when something is due again.
func (c *Cutter) advance(ctx context.Context, now time.Time) (next time.Time, any bool) {
	c.mu.Lock()
	work := c.pending
	c.pending = nil
	c.mu.Unlock()
	var stay, probe []cutFlow
	for _, f := range work {
		switch {
		case !now.Before(f.end):
			c.finish(ctx, f)
			continue
		case !now.Before(f.again):
			f.again = now.Add(cutAgain)
			probe = append(probe, f)
		}
		stay = append(stay, f)
	}
	c.probeAgain(ctx, probe)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending = append(c.pending, stay...)
	for _, f := range c.pending {
		due := f.end
		if f.again.Before(due) {
			due = f.again
		}
		if !any || due.Before(next) {
			next, any = due, true
		}
	}
	return next, any
}

// probeAgain asks the ends once more. A packet that was on its way while the
// mark was set may have put its flow into the flowtable since.
func (c *Cutter) probeAgain(ctx context.Context, flows []cutFlow) {
	offloaded := false
	for _, f := range flows {
		now, ok, err := c.entries.entry(f.Tuple)
		offloaded = offloaded || err == nil && ok && now.Offloaded()
	}
	if offloaded {
		c.report(c.unoffload(ctx))
	}
	for i := range flows {
		c.report(c.probes.probe(&flows[i].KernelFlow))
	}
}

// finish deletes the entry, which raises its DESTROY event. What the flow's
// ends send from now on begins a new flow, and TCP must begin with SYN.
func (c *Cutter) finish(ctx context.Context, f cutFlow) {
	attrs := appendAttr32(appendTupleAttr(nil, f.Tuple), ctaID, f.ID)
	for range 2 {
		err := c.entries.request(ctMsgDelete, nfFamilyOf(f.Tuple), attrs, nil)
		if errors.Is(err, unix.EBUSY) { // offloaded entries cannot be deleted
			c.report(c.unoffload(ctx))
			continue
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			c.report(fmt.Errorf("delete conntrack entry of %s: %w", f.Tuple, err))
		}
		return
	}
}

func (c *Cutter) report(err error) {
	if err != nil {
		c.cfg.Logger.Warn("cut a flow", zap.Error(err))
	}
}
