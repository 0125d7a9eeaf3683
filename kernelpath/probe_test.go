package kernelpath

import (
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestProbeAgreesWithNft compares with what the kernel answers nft.
func TestProbeAgreesWithNft(t *testing.T) {
	s := newSpace(t)
	before := s.snapshot()
	found := made(s, Probe)
	t.Logf("\n%s", found)
	if d := difference(before, s.snapshot()); d != "" {
		t.Errorf("the probe left in its caller's namespace:\n%s", d)
	}
	if len(found) != len(probes) {
		t.Fatalf("%d of %d features", len(found), len(probes))
	}
	for name, rules := range map[FeatureName]string{
		FeatureQueueNative: "table inet x { chain c {\n queue to 1\n }\n }",
		FeatureTProxy:      "table inet x { chain c {\n meta l4proto tcp tproxy ip to :1234\n }\n }",
		FeatureSocket:      "table inet x { chain c {\n socket transparent 1\n }\n }",
		FeatureFib:         "table inet x { chain c {\n fib saddr type local\n }\n }",
		FeatureCtMark:      "table inet x { chain c {\n ct mark set 1\n }\n }",
		FeatureCtZone:      "table inet x { chain c {\n ct zone set 1\n }\n }",
		FeatureNAT:         "table inet x { chain c { type nat hook postrouting priority 100\n snat ip to 10.0.0.1\n }\n }",
		FeatureMasquerade:  "table inet x { chain c { type nat hook postrouting priority 100\n masquerade\n }\n }",
		FeatureReject:      "table inet x { chain c {\n reject\n }\n }",
		FeatureLimit:       "table inet x { chain c {\n limit rate 1/second\n }\n }",
		FeatureSetDelete:   "table inet x { set s { type ipv4_addr; flags dynamic,timeout\n }\n chain c {\n delete @s { ip saddr }\n }\n }",
		FeatureIntervalMap: "table inet x { map m { type ipv4_addr . inet_service : verdict; flags interval\n elements = { 10.0.0.0/8 . 1-2 : accept }\n }\n }",
		FeatureFlowtable:   "table inet x { flowtable f { hook ingress priority 0; devices = { lo }\n }\n chain c {\n flow add @f\n }\n }",
		FeatureNFLog:       "table inet x { chain c {\n log group 1\n }\n }",
		FeatureNftables:    "table inet x {\n }",
	} {
		cmd := exec.Command("ip", "netns", "exec", s.name, "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		out, err := cmd.CombinedOutput()
		s.sh("nft flush ruleset")
		if there := err == nil; there != found.Has(name) {
			t.Errorf("%s: probe says %v, nft %s", name, found.Has(name), out)
		}
	}
	if !found.Has(FeatureCtNetlink) || !found.Has(FeatureNFQueue) || !found.Has(FeatureTransparent4) || !found.Has(FeatureTransparent6) ||
		!found.Has(FeatureCtEvents) || !found.Has(FeaturePolicyRoutes) {
		t.Error("these tests could not run without what the probe misses")
	}
	if err := found.Missing(); err != nil {
		t.Errorf("missing: %v", err)
	}
}

// TestProbeInPlace runs where no namespace can be made.
func TestProbeInPlace(t *testing.T) {
	s := newSpace(t)
	apart := made(s, Probe)
	here := made(s, probeHere)
	if apart.String() != here.String() {
		t.Errorf("apart:\n%s\nin place:\n%s", apart, here)
	}
	if left := s.sh("nft list ruleset"); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	// xt's NFQUEUE is there exactly if the kernel's own list says so.
	names, err := os.ReadFile("/proc/net/ip_tables_targets")
	if err == nil && strings.Contains(string(names), "NFQUEUE") && !here.Has(FeatureQueueXT) {
		t.Error("NFQUEUE is registered, the probe misses it")
	}
}

func TestFeaturesMissing(t *testing.T) {
	f := Features{
		{Name: FeatureQueueNative}, {Name: FeatureQueueXT, Present: true},
		{Name: FeatureTProxy, Needed: true, Option: "CONFIG_NFT_TPROXY", Purpose: "p", Problem: "no such file"},
		{Name: FeatureFib, Needed: true, Option: "CONFIG_NFT_FIB_INET"}, {Name: FeatureFlowtable, Option: "CONFIG_NFT_FLOW_OFFLOAD"},
	}
	err := f.Missing()
	if err == nil {
		t.Fatal("nothing is missing")
	}
	for _, word := range []string{"tproxy (CONFIG_NFT_TPROXY", "fib (CONFIG_NFT_FIB_INET", "no such file"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%v: no %q", err, word)
		}
	}
	for _, word := range []string{"FLOW_OFFLOAD", "NFT_QUEUE"} {
		if strings.Contains(err.Error(), word) {
			t.Errorf("%v: has %q", err, word)
		}
	}
	if err := (Features{{Name: FeatureQueueNative, Present: true}}).Missing(); err != nil {
		t.Error(err)
	}
	if err := (Features{}).Missing(); err == nil || !strings.Contains(err.Error(), "CONFIG_NFT_QUEUE") {
		t.Errorf("no queue: %v", err)
	}
	raw, err := f.JSON()
	var back Features
	if err != nil || json.Unmarshal(raw, &back) != nil || back[2] != f[2] {
		t.Errorf("JSON %s, %v", raw, err)
	}
	if table := f.String(); !strings.Contains(table, "one of two") || strings.Count(table, "\n") != 6 {
		t.Errorf("table:\n%s", table)
	}
}
