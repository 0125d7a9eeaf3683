package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os/signal"
	"strconv"

	"github.com/florianl/go-nfqueue/v2"
	"github.com/mdlayher/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/userpath"
)

// What the bench starts of itself in a lane's gateway namespace.
const (
	roleCallback = "callback" // baseline: go-nfqueue's own way
	roleLoop     = "loop"     // the gateway's queue loop, alone
)

// The queues of the lanes that have no gateway; the same in all of them.
const (
	laneQueue  = 10
	laneQueues = 2
)

// play takes a role until it is told to stop.
func play(role string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	switch {
	case role == roleCallback && flag.NArg() == 0:
		return playCallback(ctx)
	case role == roleLoop && flag.NArg() == 0:
		return playLoop(ctx)
	}
	return fmt.Errorf("unknown role %q with %d arguments", role, flag.NArg())
}

// playCallback accepts each packet with a mark, as the documentation of
// go-nfqueue shows it: a function that is called with every packet.
func playCallback(ctx context.Context) error {
	for n := range uint16(laneQueues) {
		nf, err := nfqueue.Open(&nfqueue.Config{
			NfQueue: laneQueue + n, MaxPacketLen: 128, MaxQueueLen: 4096, Copymode: nfqueue.NfQnlCopyPacket,
			AfFamily: unix.AF_INET, Flags: nfqueue.NfQaCfgFlagGSO,
		})
		if err != nil {
			return fmt.Errorf("open queue %d: %w", laneQueue+n, err)
		}
		defer nf.Close()
		if err := errors.Join(nf.SetOption(netlink.NoENOBUFS, true), nf.Con.SetReadBuffer(16<<20)); err != nil {
			return fmt.Errorf("set up queue %d: %w", laneQueue+n, err)
		}
		accept := func(a nfqueue.Attribute) int {
			_ = nf.SetVerdictWithOption(*a.PacketID, nfqueue.NfAccept, nfqueue.WithMark(uint32(laneMark))) // the load notices what is lost
			return 0
		}
		if err := nf.RegisterWithErrorFunc(ctx, accept, func(error) int { return 0 }); err != nil {
			return fmt.Errorf("read queue %d: %w", laneQueue+n, err)
		}
	}
	fmt.Println("ready")
	<-ctx.Done()
	return nil
}

// playLoop has the gateway's own loop read and release packets; the decision
// costs nothing.
func playLoop(ctx context.Context) error {
	marks, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		return err
	}
	q, err := userpath.OpenQueues(userpath.QueueConfig{
		First: laneQueue, Number: laneQueues, Marks: marks, Logger: zap.NewNop(),
		Takeovers: struct{ userpath.Takeovers }{}, // none is made
		Decide:    func(context.Context, flow.Packet) engine.Decision { return engine.Decision{} },
		DecideNow: func(flow.Packet) (flow.Path, bool) { return flow.Kernel, true },
		Segments:  true,
	})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return q.Run(ctx)
}

// laneMark is the mark of flow.Kernel, which the lanes' rules look for.
var laneMark = int(uint32(flow.Kernel) << 24)

func laneMarkText() string { return "0x" + strconv.FormatUint(uint64(laneMark), 16) }
