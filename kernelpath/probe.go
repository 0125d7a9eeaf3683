package kernelpath

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// FeatureName names something that a kernel has or has not.
type FeatureName string

// The features, in the order in which Probe tries them.
const (
	FeatureNftables     FeatureName = "nftables"
	FeatureQueueNative  FeatureName = "queue-native"
	FeatureQueueXT      FeatureName = "queue-xt"
	FeatureNFQueue      FeatureName = "nfqueue"
	FeatureNFLog        FeatureName = "nflog"
	FeatureTProxy       FeatureName = "tproxy"
	FeatureSocket       FeatureName = "socket"
	FeatureFib          FeatureName = "fib"
	FeatureCtMark       FeatureName = "ct-mark"
	FeatureCtZone       FeatureName = "ct-zone"
	FeatureNAT          FeatureName = "nat"
	FeatureMasquerade   FeatureName = "masquerade"
	FeatureReject       FeatureName = "reject"
	FeatureLimit        FeatureName = "limit"
	FeatureSetDelete    FeatureName = "set-delete"
	FeatureIntervalMap  FeatureName = "interval-map"
	FeatureFlowtable    FeatureName = "flowtable"
	FeatureConnlimit    FeatureName = "connlimit"
	FeatureCtNetlink    FeatureName = "conntrack-netlink"
	FeatureCtEvents     FeatureName = "conntrack-events"
	FeatureCtAccounting FeatureName = "conntrack-accounting"
	FeatureCtTimestamp  FeatureName = "conntrack-timestamp"
	FeatureCtTimeout    FeatureName = "conntrack-timeout"
	FeatureTransparent4 FeatureName = "transparent-ipv4"
	FeatureTransparent6 FeatureName = "transparent-ipv6"
	FeaturePolicyRoutes FeatureName = "policy-routing"
)

// Feature is what Probe found out about one.
type Feature struct {
	Name    FeatureName `json:"name"`
	Present bool        `json:"present"`
	// Needed: without it the gateway does not start. Of the two forms of the
	// queue either will do.
	Needed bool `json:"needed"`
	// Option is the kernel's build option, or the version that brought it.
	Option string `json:"option"`
	// Module is loaded on demand where the option is =m.
	Module string `json:"module,omitempty"`
	// Purpose is what the gateway uses it for.
	Purpose string `json:"purpose"`
	// Problem is what the kernel said.
	Problem string `json:"problem,omitempty"`
}

// Features is the result of a probe, in the order of the names above.
type Features []Feature

// Has says whether the kernel has a feature.
func (f Features) Has(name FeatureName) bool {
	for _, x := range f {
		if x.Name == name {
			return x.Present
		}
	}
	return false
}

// Missing is nil if everything needed is there; else one error that names
// each absent feature with its kernel option.
func (f Features) Missing() error {
	var lines []string
	for _, x := range f {
		if x.Needed && !x.Present {
			lines = append(lines, fmt.Sprintf("%s (%s, for: %s): %s", x.Name, x.Option, x.Purpose, x.Problem))
		}
	}
	if !f.Has(FeatureQueueNative) && !f.Has(FeatureQueueXT) {
		lines = append(lines, fmt.Sprintf("%s (CONFIG_NFT_QUEUE) or %s (CONFIG_NETFILTER_XT_TARGET_NFQUEUE and CONFIG_NFT_COMPAT): first packets reach user space by one of them", FeatureQueueNative, FeatureQueueXT))
	}
	if len(lines) == 0 {
		return nil
	}
	return fmt.Errorf("the kernel lacks what the gateway needs:\n\t%s", strings.Join(lines, "\n\t"))
}

// String is a table for people.
func (f Features) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "FEATURE\tHERE\tNEED\tKERNEL OPTION\tMODULE\tUSED FOR")
	for _, x := range f {
		here, need := "no", "optional"
		if x.Present {
			here = "yes"
		}
		switch {
		case x.Needed:
			need = "needed"
		case x.Name == FeatureQueueNative || x.Name == FeatureQueueXT:
			need = "one of two"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", x.Name, here, need, x.Option, x.Module, x.Purpose)
	}
	w.Flush()
	return b.String()
}

// JSON is the same for programs: an array of Feature.
func (f Features) JSON() ([]byte, error) {
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode features: %w", err)
	}
	return b, nil
}

// Probe tries every feature for real, in a network namespace of its own that
// ends with it; where none may be made (no CAP_SYS_ADMIN), in the current one,
// in a table without any hook. Modules load on the way. An error means that
// nothing could be tried; what the kernel lacks is no error, see Missing.
func Probe() (Features, error) {
	type result struct {
		features Features
		err      error
	}
	done := make(chan result)
	go func() {
		// Never unlocked: the thread and its namespace end with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil && !errors.Is(err, unix.EPERM) {
			done <- result{err: fmt.Errorf("make a network namespace to probe in: %w", err)}
			return
		}
		f, err := probeHere()
		done <- result{f, err}
	}()
	r := <-done
	return r.features, r.err
}

// probeHere tries all in the network namespace of the calling thread.
func probeHere() (Features, error) {
	var found Features
	for _, p := range probes {
		f := p.Feature
		err := p.try()
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("probe %s: %w (it takes CAP_NET_ADMIN and CAP_NET_RAW)", f.Name, err)
		}
		if f.Present = err == nil; err != nil {
			f.Problem = err.Error()
		}
		found = append(found, f)
	}
	return found, nil
}
