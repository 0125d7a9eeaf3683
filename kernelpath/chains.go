package kernelpath

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"unicode"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// ReversePath says what becomes of a new flow whose source address is not
// routed back to the interface it came from.
type ReversePath string

// The reverse-path modes (RFC 3704: strict and loose).
const (
	ReversePathStrict ReversePath = "strict" // dropped
	ReversePathLoose  ReversePath = "loose"  // dropped only if no route leads back at all
	ReversePathOff    ReversePath = "off"    // not looked at
)

// Options are what the ruleset depends on besides the policy.
type Options struct {
	Marks flow.Marks
	// Native queues with nft's own expression; else with xt NFQUEUE through
	// nft_compat. Both do the same.
	Native bool
	// The queues: closed ones lose new flows when user space is gone, open
	// ones pass them unfiltered. The number is that of adjacent queues.
	FirstClosed, NumClosed uint16
	FirstOpen, NumOpen     uint16
	// TProxyPort is where the transparent listeners are, on both loopback
	// addresses.
	TProxyPort uint16
	// Flowtable has the devices whose flows are offloaded; none: no flowtable.
	Flowtable []string
	// Zone is the conntrack zone of upstream legs that use the client's own
	// address; never 0.
	Zone uint16
	// LogGroup is the NFLOG group of denials ("deny") and of permissions that
	// are used ("use").
	LogGroup uint16
	// ReversePath is strict if it is empty.
	ReversePath ReversePath
	// Sessions is how many flows a host of a network that is hidden may have at
	// a time; 0: as many as it likes.
	Sessions uint32
	// Ranges.Kernel bounds the ports of the kernel's own source NAT for TCP
	// and UDP; a zero range: the kernel's choice.
	Ranges nat.Ranges
}

// Input is the policy as the table needs it.
type Input struct {
	Compiled policy.Compiled
	// Networks are those that NetworkRules name, policy.Any and
	// policy.Gateway excepted.
	Networks     []policy.Network
	NetworkRules []policy.NetworkRule
	// Timers are disjoint and in the order of their ports. None on a kernel
	// without FeatureCtTimeout.
	Timers []policy.Timer
}

// The chains that several others go to. A verdict map that survives a reload
// names some of them, so that they are in every ruleset.
const (
	chainUse          = "use"            // a permission lets the flow in
	chainUseOneWay    = "use_one_way"    // the same, without its answers
	chainUseLocal     = "use_local"      // a permission lets the flow in to the gateway itself
	chainUseMapped    = "use_mapped"     // a mapping lets the flow in
	chainUsePeer      = "use_peer"       // the same, if its sender is known
	chainPeer         = "peer"           // whether it is
	chainAround       = "around"         // from the inside to an external address
	chainListed       = "listed"         // one of several sources of a single-use permission
	chainListedOneWay = "listed_one_way" // the same, for use_one_way
	chainListedLocal  = "listed_local"   // the same, for use_local
	chainWide         = "wide"           // sources that are ranges
	chainOneWay       = "one_way"        // packets of a kernel flow without answers
	chainUnwanted     = "unwanted"       // what the gateway itself does not take
	chainAsk          = "ask"            // the queue that fails closed
	chainAskOpen      = "ask_open"       // the queue that fails open
	chainMarked       = "marked"         // packets of flows whose mark is not a kernel flow's
	chainFirst        = "first"          // first packets
	chainJudged       = "judged"         // first packets that the queue gave back
	chainCarryKnown   = "carry_known"    // the same, of an endpoint whose peers are remembered
	chainCarryFirst   = "carry_first"    // a new kernel flow
	chainCarryPlain   = "carry_plain"    // the same, by a rule alone
	chainCarryMapped  = "carry_mapped"   // the same, of an endpoint that has a mapping
	chainCarryUntold  = "carry_untold"   // the same, where others are told of when they begin
	chainTakeFirst    = "take_first"     // a new user flow
	chainDivert       = "divert"         // packets of a user flow
	chainLocalOwn     = "local_own"      // answers to the gateway's upstream legs
	chainCarry        = "carry"          // packets of a kernel flow
	chainRefuse       = "refuse"         // a denial that is told
	chainBound        = "bound"          // a new kernel flow before it is routed
	chainHide         = "hide"           // a new kernel flow that leaves
	chainLeave        = "leave"          // the same, by the network rules alone
	chainSegments     = "segments"       // openings of TCP whose segments are bounded
	chainDiscard      = "discard"        // a denial that is not told
	chainCut          = "cut"            // a living flow that was ended
	chainNotSyn       = "not_syn"        // TCP that begins in the middle
	chainReversePath  = "reverse_path"   // sources that cannot be where they came from
	chainPermit       = "permit"         // the permissions of a family, whose suffix follows
)

// counterNames are the named counters. They outlive a reload.
var counterNames = []string{
	counterSpoofed, counterNotSyn, counterRefused, counterDiscarded, counterCut, counterUnmarked, counterQueued, counterPermitted, counterExhausted,
}

const (
	counterSpoofed   = "spoofed"   // the reverse path does not fit
	counterNotSyn    = "not_syn"   // unknown TCP that does not begin with SYN
	counterRefused   = "refused"   // denied with an answer
	counterDiscarded = "discarded" // denied silently
	counterCut       = "cut"       // packets of flows that were ended
	counterUnmarked  = "unmarked"  // no path: died in the forward chain
	counterQueued    = "queued"    // packets sent to user space
	counterPermitted = "permitted" // flows that a permission let in
	counterExhausted = "exhausted" // first packets for which there was no port
)

// builder collects the parts of a Ruleset.
type builder struct {
	Options
	in          Input
	r           Ruleset
	plainTimers map[uint32]bool // of boxes
}

// Build makes the ruleset of a policy. It is pure: the same input gives the
// same ruleset, in the same order. The error names what the kernel's language
// cannot hold.
func Build(in Input, o Options) (Ruleset, error) {
	if o.ReversePath == "" {
		o.ReversePath = ReversePathStrict
	}
	b := &builder{Options: o, in: in, plainTimers: map[uint32]bool{}}
	if err := b.check(); err != nil {
		return Ruleset{}, fmt.Errorf("build the ruleset: %w", err)
	}
	b.r.counters = counterNames
	b.r.flowtable, b.r.xtQueue = o.Flowtable, !o.Native
	b.permissionSets()
	if err := b.outMaps(); err != nil {
		return Ruleset{}, fmt.Errorf("build the ruleset: %w", err)
	}
	for _, part := range []func() error{b.networkSets, b.upstreamZone, b.arrive, b.judged, b.translate, b.clamp, b.forward, b.pairs, b.publish, b.timers, b.gateway} {
		if err := part(); err != nil {
			return Ruleset{}, fmt.Errorf("build the ruleset: %w", err)
		}
	}
	return b.r, nil
}

// chain adds an empty chain.
func (b *builder) chain(name string) *chain {
	c := &chain{name: name}
	b.r.chains = append(b.r.chains, c)
	return c
}

// base adds an empty base chain.
func (b *builder) base(name string, h hook) *chain {
	c := b.chain(name)
	c.hook = &h
	return c
}

func (b *builder) set(s *set) *set {
	b.r.sets = append(b.r.sets, s)
	return s
}

func filterHook(name string, num uint32, priority int32, policy nftables.ChainPolicy) hook {
	return hook{nftables.ChainTypeFilter, name, nftables.ChainHook(num), priority, policy}
}

func prerouting(priority int32) hook {
	return filterHook("prerouting", unix.NF_INET_PRE_ROUTING, priority, nftables.ChainPolicyAccept)
}

func output(priority int32) hook {
	return filterHook("output", unix.NF_INET_LOCAL_OUT, priority, nftables.ChainPolicyAccept)
}

// mark is the mark of a path, alone.
func (b *builder) mark(p flow.Path) uint32 { return b.Marks.Value(p) }

// hasPath matches the path in a mark.
func (b *builder) hasPath(f field, p flow.Path) stmt {
	return masked(f, b.Marks.PathMask(), b.mark(p))
}

// putPath writes a path into a mark and keeps other people's bits.
func (b *builder) putPath(f field, p flow.Path) stmt {
	return setMark(f, b.Marks.Mask(), b.mark(p))
}

func (b *builder) check() error {
	if b.NumClosed == 0 || b.NumOpen == 0 {
		return errors.New("no queue is configured")
	}
	closed, open := int(b.FirstClosed)+int(b.NumClosed), int(b.FirstOpen)+int(b.NumOpen)
	if closed > math.MaxUint16+1 || open > math.MaxUint16+1 || (int(b.FirstClosed) < open && int(b.FirstOpen) < closed) {
		return fmt.Errorf("queues %d+%d and %d+%d overlap or go beyond 65535", b.FirstClosed, b.NumClosed, b.FirstOpen, b.NumOpen)
	}
	if b.TProxyPort == 0 || b.Zone == 0 {
		return fmt.Errorf("transparent port %d, conntrack zone %d: neither may be 0", b.TProxyPort, b.Zone)
	}
	switch b.ReversePath {
	case ReversePathStrict, ReversePathLoose, ReversePathOff:
	default:
		return fmt.Errorf("reverse path mode %q is unknown", b.ReversePath)
	}
	if k := b.Ranges.Kernel; k.Lo > k.Hi {
		return fmt.Errorf("port range %s is empty", k)
	}
	if err := b.checkPublications(); err != nil {
		return err
	}
	for _, d := range b.Flowtable {
		if err := checkInterface(d); err != nil {
			return err
		}
	}
	return nil
}

// checkInterface refuses what cannot be an interface name (dev_valid_name in
// net/core/dev.c), and the wildcard, which the sets do not hold.
func checkInterface(name string) error {
	if name == "" || len(name) > unix.IFNAMSIZ-1 {
		return fmt.Errorf("interface name %q: 1 to 15 characters are possible", name)
	}
	if strings.ContainsFunc(name, func(c rune) bool {
		return unicode.IsSpace(c) || !unicode.IsPrint(c) || strings.ContainsRune(`/:"*\`, c)
	}) {
		return fmt.Errorf("interface name %q: a character that names cannot have", name)
	}
	return nil
}

// anySize is the size of the sets that rules change: nft wants a bound. Memory
// is used for the elements alone.
const anySize = 1 << 20
