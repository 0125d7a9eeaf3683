package filterapi

// Socket is one side of a connection: the network, or the next data filter; a
// filter cannot tell which. One goroutine may receive while another sends.
// (IFWXSocket)
type Socket interface {
	// Recv blocks for the next piece of a stream or the next datagram. The
	// buffer is the caller's, who hands it on with Send or gives it back with
	// Release. io.EOF: the far side will send no more, and may still be sent
	// to. ErrReleased: Pump has given the flow back, and nothing was received;
	// see DataFilter. Any other error is final: the far side was reset or the
	// connection is over.
	Recv() (*Buffer, error)
	// Send takes the buffer over, also when it fails, and returns when the
	// next hop has taken it; it blocks while that is full. For a datagram
	// Buffer.Addr is the far address: the peer, on both sides.
	Send(*Buffer) error
	// Shutdown ends the sending side: with a FIN, or with a reset if
	// abortive.
	Shutdown(abortive bool) error
	// Close ends both sides; abortive as in Shutdown.
	Close(abortive bool) error
}
