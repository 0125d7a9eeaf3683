package kernelpath

import (
	"context"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Counters gives the packets of the table's counters by their names. Without a
// table there are none.
func (t *Table) Counters(ctx context.Context) (map[string]uint64, error) {
	counts := map[string]uint64{}
	err := t.do(ctx, func() error {
		s, err := dialTable(t.netns)
		if err != nil {
			return err
		}
		defer func() { _ = s.close() }()
		return s.eachObject(unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE, func(a map[uint16][]byte) {
			packets := attributes(a[unix.NFTA_OBJ_DATA])[unix.NFTA_COUNTER_PACKETS]
			if number(a[unix.NFTA_OBJ_TYPE]) == unix.NFT_OBJECT_COUNTER && len(packets) == 8 {
				counts[cString(a[unix.NFTA_OBJ_NAME])] = binary.BigEndian.Uint64(packets)
			}
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read the table's counters: %w", err)
	}
	return counts, nil
}
