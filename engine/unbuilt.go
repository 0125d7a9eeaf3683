package engine

import "github.com/sluicegw/sluice/filterapi"

// What is not built yet.

func (s *session) emulateClientBind(filterapi.EmulatedBind) (*connection, error) {
	return nil, filterapi.ErrNotSupported
}
