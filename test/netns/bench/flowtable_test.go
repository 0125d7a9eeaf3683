package main

import "testing"

func TestOffloadedFlow(t *testing.T) {
	const flow = "tcp      6 src=10.64.0.1 dst=198.18.0.0 sport=32768 dport=5002 packets=10 bytes=520 " +
		"src=198.18.0.0 dst=203.0.113.1 sport=5002 dport=10100 packets=90 bytes=123456 [OFFLOAD] mark=16777216 use=2\n"
	got, err := parseCarried(flow)
	if err != nil || got.packets != 10 || got.replyBytes != 123456 {
		t.Errorf("%+v, %v", got, err)
	}
	for name, list := range map[string]string{
		"no flow": "", "two flows": flow + flow,
		"a flow of the rules": "udp 17 29 src=10.64.0.1 dst=198.18.0.0 sport=1 dport=2 packets=1 bytes=46 [UNREPLIED] src=198.18.0.0 dst=203.0.113.1 sport=2 dport=1 packets=0 bytes=0 mark=0 use=1\n",
		"no counters":         "tcp 6 src=10.64.0.1 dst=198.18.0.0 sport=1 dport=2 src=198.18.0.0 dst=203.0.113.1 sport=2 dport=1 [OFFLOAD] mark=0 use=2\n",
	} {
		if got, err := parseCarried(list); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
