package kernelpath

import (
	"encoding/binary"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// flags of the set as the kernel knows them.
func (s *set) flags() uint32 {
	var f uint32
	for _, x := range []struct {
		on   bool
		flag uint32
	}{
		{s.name == "", unix.NFT_SET_ANONYMOUS | unix.NFT_SET_CONSTANT},
		{s.interval, unix.NFT_SET_INTERVAL}, {len(s.data) > 0, unix.NFT_SET_MAP},
		{s.timeout, unix.NFT_SET_TIMEOUT}, {s.dynamic, unix.NFT_SET_EVAL},
		{len(s.key) > 1, setFlagConcat},
	} {
		if x.on {
			f |= x.flag
		}
	}
	return f
}

// typeSum is the number that nft makes of the types of a concatenation.
func typeSum(types []nftables.SetDatatype) uint32 {
	var sum uint32
	for _, t := range types {
		sum = sum<<nftables.SetConcatTypeBits | t.GetNFTMagic()
	}
	return sum
}

// keyLength is the length of a key: one type as it is, several each padded.
func keyLength(types []nftables.SetDatatype) uint32 {
	if len(types) == 1 {
		return types[0].Bytes
	}
	var n uint32
	for _, t := range types {
		n += (t.Bytes + 3) / 4 * 4
	}
	return n
}

// dataType is what a map holds; ok is false for a set.
func (s *set) dataType() (typ, size uint32, ok bool) {
	switch {
	case len(s.data) == 0:
		return 0, 0, false
	case s.isVerdictMap():
		return unix.NFT_DATA_VERDICT, 0, true
	}
	return typeSum(s.data), keyLength(s.data), true
}

// sizeHint lets the kernel choose the best form for a set that never changes,
// and bounds one that rules change.
func (s *set) sizeHint() uint32 {
	if s.name == "" {
		return uint32(len(s.elems))
	}
	return s.size
}

// userdata is what only nft reads when it lists the set: the byte order of the
// key and the comment (libnftnl, udata.h).
func (s *set) userdata() []byte {
	order := uint32(2) // big endian
	switch s.key[0].Name {
	case nftables.TypeMark.Name, nftables.TypeFIBAddr.Name, nftables.TypeIFName.Name:
		order = 1 // the host's
	}
	data := append([]byte{udataByteOrder, 4}, binary.NativeEndian.AppendUint32(nil, order)...)
	if s.comment != "" {
		data = append(data, udataComment, byte(len(s.comment)+1))
		data = append(append(data, s.comment...), 0)
	}
	return data
}

// label names the set in an error.
func (s *set) label() string {
	word := "set "
	if len(s.data) > 0 {
		word = "map "
	}
	if s.name == "" {
		return "anonymous " + word[:3]
	}
	return word + s.name
}
