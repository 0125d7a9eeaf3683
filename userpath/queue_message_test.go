package userpath

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// packetMessage is a packet message as the kernel sends it.
func packetMessage(id, mark, dev uint32, payload []byte) []byte {
	b := appendNfHeader(nil, nfqMsgPacket, 0, 0, labQueue)
	b = appendAttr(b, nfqaPacketHdr, append(binary.BigEndian.AppendUint32(nil, id), 0x08, 0x00, 0))
	b = appendAttr32(b, nfqaMark, mark)
	b = appendAttr32(b, nfqaInDev, dev)
	b = appendAttr(b, nfqaPayload, payload)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

func TestParseQueued(t *testing.T) {
	whole := packetMessage(7, 0xaa00bb00, 3, []byte("headers"))
	kind, _, body, rest, ok := netlinkMessage(whole)
	if !ok || kind != nfqMsgPacket || len(rest) != 0 {
		t.Fatalf("kind %d, rest %d, ok %v", kind, len(rest), ok)
	}
	q, ok := parseQueued(body)
	if !ok || q.id != 7 || q.mark != 0xaa00bb00 || q.inDev != 3 || string(q.payload) != "headers" {
		t.Fatalf("%+v, %v", q, ok)
	}
	for n := range len(body) - 1 { // the last byte is padding
		if q, ok := parseQueued(body[:n]); ok {
			t.Fatalf("cut at %d: %+v", n, q)
		}
	}
}

func TestParseNetlinkErrorNamesThePacket(t *testing.T) {
	refused := appendVerdict(nil, labQueue, 4711, verdict{what: nfRepeat})
	code := -int32(unix.ENOENT)
	e, ok := parseNetlinkError(append(binary.NativeEndian.AppendUint32(nil, uint32(code)), refused...))
	if !ok || e.errno != unix.ENOENT || !e.verdict || e.id != 4711 {
		t.Fatalf("%+v, %v", e, ok)
	}
}

func TestVerdictKeepsOthersMarkBits(t *testing.T) {
	marks, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		t.Fatal(err)
	}
	v := newVerdicts(marks, &counters{})
	s := &queueSocket{number: 0x1234}
	v.path(heldPacket{sock: s, id: 9, mark: 0xf1f2f3f4}, flow.Reject)
	v.requeue(heldPacket{sock: s, id: 10}, 20)
	v.path(heldPacket{sock: s, id: 11}, flow.Own) // never a packet's path
	want := []struct{ id, verdict, mark uint32 }{
		{9, nfRepeat, 0xf1f2f3f4&^flow.DefaultMask | 0x01000000}, {10, nfQueue | 20<<16, 0}, {11, nfDrop, 0},
	}
	for rest := v.buf; ; {
		kind, _, body, next, ok := netlinkMessage(rest)
		if !ok {
			break
		}
		w := want[0]
		want = want[1:]
		if kind != nfqMsgVerdict || binary.BigEndian.Uint16(body[2:]) != 0x1234 ||
			binary.BigEndian.Uint32(body[8:]) != w.verdict || binary.BigEndian.Uint32(body[12:]) != w.id {
			t.Fatalf("%x is not %+v", body, w)
		}
		if w.mark != 0 && binary.BigEndian.Uint32(body[20:]) != w.mark {
			t.Fatalf("%x has not mark %08x", body, w.mark)
		}
		rest = next
	}
	if len(want) != 0 {
		t.Fatalf("missing %+v", want)
	}
}

func TestParseQueueAccount(t *testing.T) {
	got := parseQueueAccount([]byte("   10  91012     3 2   128     4     5      321  1\nnonsense\n   11 4294967295     0 2   128     0     0        0  1\n"))
	if got[10] != (queueLine{portID: 91012, depth: 3, full: 4, missed: 5}) || got[11].portID != 4294967295 || len(got) != 2 {
		t.Fatalf("%+v", got)
	}
}

// FuzzQueueMessages: nothing that arrives may make the parsers read past its
// end, nor loop for ever.
func FuzzQueueMessages(f *testing.F) {
	f.Add(packetMessage(1, 2, 3, []byte{0x45}))
	f.Add(append(packetMessage(1, 2, 3, nil), packetMessage(4, 5, 6, bytes.Repeat([]byte{1}, 128))...))
	f.Add(appendBind(nil, 1, 2, 3, 4, 5))
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		for {
			_, _, body, rest, ok := netlinkMessage(b)
			if !ok {
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("no progress")
			}
			if q, ok := parseQueued(body); ok {
				total += len(q.payload)
			}
			parseNetlinkError(body)
			parseQueueAccount(body)
			b = rest
		}
	})
}
