//go:build stockkernel

package kernelpath

import "testing"

// The permissions on a kernel that is older, and whose maps of ranges no packet
// can change: the same cases again.
func TestStockPermissions(t *testing.T) {
	for name, test := range map[string]func(*testing.T){
		"redirect once": TestRedirectOnce, "redirect, many datagrams": TestRedirectManyDatagrams,
		"redirect to user space": TestRedirectToUser, "inbound, translated": TestPermitInboundTranslated,
		"answer from another port": TestPermitAnswerFromAnotherPort, "source": TestPermitSource,
		"ranges of sources": TestPermitRangesOfSources, "one way": TestPermitOneWay, "local": TestPermitLocal,
		"every kind adopted": TestAdoptEveryKind, "small sets": TestAdoptSmallSets, "ranges that overlap": TestCommitRangesThatOverlap,
		"against a model": TestCommitAgainstModel, "established": TestEstablishedWhileWanted, "text": TestLoadEqualsText,
		"refuses for a while": TestRedirectRefusesForAWhile,
	} {
		t.Run(name, test)
	}
}
