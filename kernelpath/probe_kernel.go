package kernelpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/mdlayher/netlink"
	rtnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// probe is a feature and the attempt to use it; nil means that it is there.
type probe struct {
	Feature
	try func() error
}

// probeTable holds what is tried. Its chains have no hook: no packet meets
// them.
const probeTable = "sluice_probe"

// probes is the table of features.
var probes = []probe{
	{Feature{Name: FeatureNftables, Needed: true, Option: "CONFIG_NF_TABLES_INET", Module: "nf_tables", Purpose: "the gateway's table"}, tryRule()},
	{Feature{Name: FeatureQueueNative, Option: "CONFIG_NFT_QUEUE", Module: "nft_queue", Purpose: "first packets to user space"}, tryRule(&expr.Queue{Num: 1, Total: 2, Flag: expr.QueueFlagBypass})},
	{Feature{Name: FeatureQueueXT, Option: "CONFIG_NETFILTER_XT_TARGET_NFQUEUE, CONFIG_NFT_COMPAT", Module: "xt_NFQUEUE, nft_compat", Purpose: "the same without nft_queue"}, tryXTQueue},
	{Feature{Name: FeatureNFQueue, Needed: true, Option: "CONFIG_NETFILTER_NETLINK_QUEUE", Module: "nfnetlink_queue", Purpose: "first packets to user space"}, tryQueue},
	{Feature{Name: FeatureNFLog, Needed: true, Option: "CONFIG_NFT_LOG, CONFIG_NETFILTER_NETLINK_LOG", Module: "nft_log, nfnetlink_log", Purpose: "news of denials and used permissions"}, tryNFLog},
	{Feature{Name: FeatureTProxy, Needed: true, Option: "CONFIG_NFT_TPROXY", Module: "nft_tproxy", Purpose: "taking flows over in user space"}, tryRule(matchTCP4(&expr.Immediate{Register: 1, Data: []byte{0x04, 0xd2}},
		&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: unix.NFPROTO_INET, RegPort: 1})...)},
	{Feature{Name: FeatureSocket, Needed: true, Option: "CONFIG_NFT_SOCKET", Module: "nft_socket", Purpose: "telling the gateway's own upstream flows"}, tryRule(&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1}, &expr.Socket{Key: expr.SocketKeyMark, Register: 2})},
	{Feature{Name: FeatureFib, Needed: true, Option: "CONFIG_NFT_FIB_INET", Module: "nft_fib_inet", Purpose: "reverse path check, outgoing interface of a first packet"}, tryRule(&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagSADDR: true}, &expr.Fib{Register: 1, ResultOIFNAME: true, FlagDADDR: true, FlagMARK: true})},
	{Feature{Name: FeatureCtMark, Needed: true, Option: "CONFIG_NFT_CT, CONFIG_NF_CONNTRACK_MARK", Module: "nft_ct", Purpose: "the path of a flow"}, tryRule(immediate4(), &expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true})},
	{Feature{Name: FeatureCtZone, Needed: true, Option: "CONFIG_NF_CONNTRACK_ZONES", Module: "nft_ct", Purpose: "upstream flows under the client's own address"}, tryRule(&expr.Immediate{Register: 1, Data: []byte{0x10, 0x04}}, &expr.Ct{Key: expr.CtKeyZONE, Register: 1, SourceRegister: true})},
	{Feature{Name: FeatureNAT, Needed: true, Option: "CONFIG_NFT_NAT", Module: "nft_nat, nft_chain_nat", Purpose: "translation to a given address"}, tryNAT(immediate4(), &expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1})},
	{Feature{Name: FeatureMasquerade, Needed: true, Option: "CONFIG_NFT_MASQ", Module: "nft_masq", Purpose: "translation to the interface's address"}, tryNAT(&expr.Masq{})},
	{Feature{Name: FeatureReject, Needed: true, Option: "CONFIG_NFT_REJECT_INET", Module: "nft_reject_inet", Purpose: "telling clients of a refusal"}, tryRule(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED})},
	{Feature{Name: FeatureLimit, Needed: true, Option: "CONFIG_NFT_LIMIT", Module: "nft_limit", Purpose: "bounded logs and refusals"}, tryRule(&expr.Limit{Type: expr.LimitTypePkts, Rate: 10, Unit: expr.LimitTimeSecond, Burst: 20})},
	{Feature{Name: FeatureSetDelete, Needed: true, Option: "Linux 5.4", Purpose: "permissions that are used up"}, trySetDelete},
	{Feature{Name: FeatureIntervalMap, Needed: true, Option: "Linux 5.6", Purpose: "rules as lookups"}, tryIntervalMap},
	{Feature{Name: FeatureFlowtable, Option: "CONFIG_NFT_FLOW_OFFLOAD, CONFIG_NF_FLOW_TABLE_INET", Module: "nft_flow_offload, nf_flow_table_inet", Purpose: "faster forwarding"}, tryFlowtable},
	{Feature{Name: FeatureConnlimit, Option: "CONFIG_NFT_CONNLIMIT", Module: "nft_connlimit", Purpose: "limits of sessions for each client"}, tryRule(&expr.Connlimit{Count: 1, Flags: expr.NFT_CONNLIMIT_F_INV})},
	{Feature{Name: FeatureCtNetlink, Needed: true, Option: "CONFIG_NF_CT_NETLINK", Module: "nf_conntrack_netlink", Purpose: "ends, counters and cuts of kernel flows"}, tryCtNetlink},
	{Feature{Name: FeatureCtEvents, Needed: true, Option: "CONFIG_NF_CONNTRACK_EVENTS", Purpose: "ends of kernel flows"}, trySysctl("net/netfilter/nf_conntrack_events")},
	{Feature{Name: FeatureCtAccounting, Option: "CONFIG_NF_CONNTRACK, CONFIG_SYSCTL", Purpose: "bytes and packets in the log"}, trySysctl("net/netfilter/nf_conntrack_acct")},
	{Feature{Name: FeatureCtTimestamp, Option: "CONFIG_NF_CONNTRACK_TIMESTAMP", Purpose: "when kernel flows began"}, trySysctl("net/netfilter/nf_conntrack_timestamp")},
	{Feature{Name: FeatureCtTimeout, Option: "CONFIG_NF_CONNTRACK_TIMEOUT, CONFIG_NFT_CT", Module: "nft_ct", Purpose: "timeouts of protocols of their own"}, tryTimer},
	{Feature{Name: FeatureTransparent4, Needed: true, Option: "CONFIG_INET", Purpose: "sockets under addresses of others"}, tryTransparent(unix.AF_INET, unix.SOL_IP, unix.IP_TRANSPARENT)},
	{Feature{Name: FeatureTransparent6, Option: "CONFIG_IPV6", Purpose: "the same for IPv6"}, tryTransparent(unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT)},
	{Feature{Name: FeaturePolicyRoutes, Needed: true, Option: "CONFIG_IP_MULTIPLE_TABLES", Purpose: "delivering taken-over flows"}, tryPolicyRouting},
}

func immediate4() expr.Any { return &expr.Immediate{Register: 1, Data: []byte{10, 0, 0, 1}} }

// matchTCP4 says before the expressions what tproxy wants to know: IPv4, TCP.
func matchTCP4(e ...expr.Any) []expr.Any {
	return append([]expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Register: 1, Data: []byte{byte(flow.TCP)}},
	}, e...)
}

// inProbeTable sends what fill adds to a table, in one transaction, and takes
// the table away again.
func inProbeTable(fill func(*nftables.Conn, *nftables.Table) error) error {
	c := &nftables.Conn{}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: probeTable})
	if err := fill(c, t); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return err // nothing of a failed transaction stays
	}
	c.DelTable(t)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("delete the probe's table: %w", err)
	}
	return nil
}

// tryRule puts one rule into a chain.
func tryRule(e ...expr.Any) func() error {
	return func() error {
		return inProbeTable(func(c *nftables.Conn, t *nftables.Table) error {
			chain := c.AddChain(&nftables.Chain{Name: "probe", Table: t})
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: e})
			return nil
		})
	}
}

// tryXTQueue does so after the kernel was asked to load the target.
func tryXTQueue() error {
	s, err := dialTable(0)
	if err != nil {
		return err
	}
	if err := errors.Join(s.wakeXTQueue(), s.close()); err != nil {
		return err
	}
	return tryRule(&expr.Target{Name: xtQueue, Rev: xtQueueRevision, Info: &xt.Unknown{1, 0, 1, 0, 0, 0, 0, 0}})()
}

// tryNAT does so beside an empty base chain of type nat.
func tryNAT(e ...expr.Any) func() error {
	return func() error {
		return inProbeTable(func(c *nftables.Conn, t *nftables.Table) error {
			c.AddChain(&nftables.Chain{Name: "hooked", Table: t, Type: nftables.ChainTypeNAT,
				Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
			chain := c.AddChain(&nftables.Chain{Name: "probe", Table: t})
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: e})
			return nil
		})
	}
}

// trySetDelete lets a rule delete an element of a set with timeouts and
// concatenated keys.
func trySetDelete() error {
	return inProbeTable(func(c *nftables.Conn, t *nftables.Table) error {
		s := &nftables.Set{Table: t, Name: "once", Dynamic: true, HasTimeout: true, Concatenation: true, Size: 16,
			KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)}
		if err := c.AddSet(s, nil); err != nil {
			return err
		}
		chain := c.AddChain(&nftables.Chain{Name: "probe", Table: t})
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{
			immediate4(), &expr.Immediate{Register: 9, Data: []byte{0, 80}},
			&expr.Dynset{SrcRegKey: 1, SetID: s.ID, SetName: s.Name, Operation: dynsetDelete},
		}})
		return nil
	})
}

// tryIntervalMap makes a verdict map whose keys are ranges in two dimensions.
func tryIntervalMap() error {
	return inProbeTable(func(c *nftables.Conn, t *nftables.Table) error {
		s := &nftables.Set{Table: t, Name: "boxes", Interval: true, Concatenation: true, IsMap: true,
			KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService), DataType: nftables.TypeVerdict}
		return c.AddSet(s, []nftables.SetElement{{
			Key: []byte{10, 0, 0, 0, 0, 80, 0, 0}, KeyEnd: []byte{10, 0, 0, 255, 0, 90, 0, 0},
			VerdictData: &expr.Verdict{Kind: expr.VerdictAccept},
		}})
	})
}

// tryFlowtable makes a flowtable without devices and a rule that fills it.
func tryFlowtable() error {
	return inProbeTable(func(c *nftables.Conn, t *nftables.Table) error {
		f := c.AddFlowtable(&nftables.Flowtable{Table: t, Name: "fast", Hooknum: nftables.FlowtableHookIngress, Priority: nftables.FlowtablePriorityFilter})
		chain := c.AddChain(&nftables.Chain{Name: "probe", Table: t})
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{&expr.FlowOffload{Name: f.Name}}})
		return nil
	})
}

// Subsystems, messages and attributes of nfnetlink that bind a queue or a log
// group (linux/netfilter/nfnetlink_queue.h, nfnetlink_log.h).
const (
	queueSubsys   = 3
	queueConfig   = 2
	queueCfgCmd   = 1
	logSubsys     = 4
	logConfig     = 1
	logCfgCmd     = 1
	cfgBind       = 1
	probeResource = 65431
)

// bindResource binds a queue or a group; closing the socket frees it. One that
// somebody has bound is there.
func bindResource(subsys, message, attr uint16, command []byte) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open netfilter netlink socket: %w", err)
	}
	defer conn.Close()
	data := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, probeResource)
	_, err = conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(subsys<<8 | message), Flags: netlink.Request | netlink.Acknowledge},
		Data:   appendAttr(data, attr, command...),
	})
	if errors.Is(err, unix.EBUSY) {
		return nil
	}
	return err
}

func tryQueue() error {
	// struct nfqnl_msg_config_cmd: command, pad, protocol family.
	return bindResource(queueSubsys, queueConfig, queueCfgCmd, []byte{cfgBind, 0, 0, unix.AF_INET})
}

func tryNFLog() error {
	if err := bindResource(logSubsys, logConfig, logCfgCmd, []byte{cfgBind}); err != nil {
		return err
	}
	return tryRule(&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX, Group: probeResource, Data: []byte("probe")})()
}

func tryCtNetlink() error {
	s, err := dialConntrack()
	if err != nil {
		return err
	}
	defer s.close()
	// The answer to a question for a flow that cannot be.
	err = s.request(ctMsgGet, unix.AF_INET, appendTupleAttr(nil, flow.Tuple{
		Proto: flow.UDP, Src: netip.MustParseAddrPort("192.0.2.1:1"), Dst: netip.MustParseAddrPort("192.0.2.2:1"),
	}), nil)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// trySysctl looks for a switch of conntrack; by now conntrack is loaded.
func trySysctl(path string) func() error {
	return func() error {
		_, err := readSysctl(path)
		return err
	}
}

func tryTransparent(family, level, option int) func() error {
	return func() error {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
			return fmt.Errorf("make socket transparent: %w", err)
		}
		return nil
	}
}

func tryPolicyRouting() error {
	for _, family := range ipFamilies() {
		rules, err := rtnl.RuleList(family)
		if err != nil {
			return fmt.Errorf("list routing rules: %w", err)
		}
		if len(rules) == 0 {
			return errors.New("there are no routing rules")
		}
	}
	return nil
}
