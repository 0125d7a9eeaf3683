// Package netns_test is the black box: it drives the built gateway between
// network namespaces and says only what a user could see from outside. Tests
// are named after the promise that they hold the gateway to.
package netns_test

import (
	"os"
	"testing"

	"github.com/sluicegw/sluice/test/netns/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }
