//go:build stockkernel

package kernelpath

import "testing"

// The permissions on a kernel that is older, and whose maps of ranges no packet
// can change: the same cases again, what depends on the kernel.
func TestStockPermissions(t *testing.T) {
	for name, test := range map[string]func(*testing.T){
		"redirect once": TestRedirectOnce, "inbound, translated": TestPermitInboundTranslated,
		"answer from another port": TestPermitAnswerFromAnotherPort, "source": TestPermitSource,
		"ranges of sources": TestPermitRangesOfSources, "one way": TestPermitOneWay, "local": TestPermitLocal,
		"every kind adopted": TestAdoptEveryKind, "small sets": TestAdoptSmallSets, "ranges that overlap": TestCommitRangesThatOverlap,
		"against a model": TestCommitAgainstModel,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // they wait more than they work
			test(t)
		})
	}
}

func TestStockEstablished(t *testing.T) { TestEstablishedWhileWanted(t) }
