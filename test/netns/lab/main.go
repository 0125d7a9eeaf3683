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
		os.Exit(130)
	}()
	defer built.remove()
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

// gatewayBinary is the gateway that a run tests; it is built once.
type gatewayBinary struct {
	once      sync.Once
	path, dir string
	err       error
}

var built gatewayBinary

// Binary gives the path of the gateway, with the probe filter built in.
func Binary() (string, error) {
	built.once.Do(func() {
		if built.path = os.Getenv(envGateway); built.path != "" {
			built.path, built.err = filepath.Abs(built.path)
			return
		}
		if built.dir, built.err = os.MkdirTemp("", "sluice-gateway."); built.err != nil {
			return
		}
		if built.err = os.Chmod(built.dir, 0o755); built.err != nil { // one test runs it without root
			return
		}
		built.path = filepath.Join(built.dir, "gateway")
		out, err := exec.Command("go", "build", "-tags", "probe", "-o", built.path, "github.com/sluicegw/sluice/cmd/gateway").CombinedOutput()
		if err != nil {
			built.err = fmt.Errorf("build the gateway: %w\n%s", err, out)
		}
	})
	return built.path, built.err
}

func (b *gatewayBinary) remove() {
	if b.dir != "" {
		_ = os.RemoveAll(b.dir)
	}
}
