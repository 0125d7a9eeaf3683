package lab

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The environment of a run.
const (
	// envGateway is the path of a gateway that was built before; without it
	// the first test that needs one builds it.
	envGateway = "SLUICE_GATEWAY"
	// envSTUN is the path of pion's stun-nat-behaviour, likewise.
	envSTUN = "SLUICE_STUN_CLIENT"
	// envForm forces a queue form into every configuration: native or xt.
	envForm = "SLUICE_QUEUE_FORM"
	// envSlow multiplies every deadline, for a machine that is emulated.
	envSlow = "SLUICE_SLOW"
	// envArtifacts is the folder where failures keep their evidence.
	envArtifacts = "SLUICE_ARTIFACTS"
)

// Main is what a suite's TestMain calls: it sweeps old leftovers, runs the
// tests, and takes the labs down also when it is interrupted. It gives the exit
// status.
func Main(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the namespace suite needs root")
		return 1
	}
	Sweep(time.Now())
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		<-interrupts
		destroyAll()
		built.remove()
		stunClient.remove()
		os.Exit(130)
	}()
	defer built.remove()
	defer stunClient.remove()
	return m.Run()
}

// Patience stretches a deadline on a slow machine.
func Patience(d time.Duration) time.Duration {
	var factor float64
	if _, err := fmt.Sscan(os.Getenv(envSlow), &factor); err != nil || factor < 1 {
		return d
	}
	return time.Duration(float64(d) * factor)
}

// program is one that is built once for a run, or was built before.
type program struct {
	env  string   // has the path of one that was built before
	args []string // of go build
	name string

	once      sync.Once
	path, dir string
	err       error
}

var (
	built      = program{env: envGateway, name: "gateway", args: []string{"-tags", "probe", "github.com/sluicegw/sluice/cmd/gateway"}}
	stunClient = program{env: envSTUN, name: "stun-nat-behaviour", args: []string{"github.com/pion/stun/v3/cmd/stun-nat-behaviour"}}
)

// Binary gives the path of the gateway, with the probe filter built in.
func Binary() (string, error) { return built.get() }

func (b *program) get() (string, error) {
	b.once.Do(func() {
		if b.path = os.Getenv(b.env); b.path != "" {
			b.path, b.err = filepath.Abs(b.path)
			return
		}
		if b.dir, b.err = os.MkdirTemp("", "sluice-"+b.name+"."); b.err != nil {
			return
		}
		if b.err = os.Chmod(b.dir, 0o755); b.err != nil { // one test runs it without root
			return
		}
		b.path = filepath.Join(b.dir, b.name)
		out, err := exec.Command("go", append([]string{"build", "-o", b.path}, b.args...)...).CombinedOutput()
		if err != nil {
			b.err = fmt.Errorf("build %s: %w\n%s", b.name, err, out)
		}
	})
	return b.path, b.err
}

func (b *program) remove() {
	if b.dir != "" {
		_ = os.RemoveAll(b.dir)
	}
}
