package userpath

import (
	"io"
	"net"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
)

// benchStream measures one stream through carry, in pieces of 256 KiB.
func benchStream(b *testing.B, client, server *net.TCPConn) {
	piece := make([]byte, 256<<10)
	b.SetBytes(int64(len(piece)))
	got := make(chan error, 1)
	b.ResetTimer()
	go func() {
		buf := make([]byte, 256<<10)
		for n := 0; n < b.N*len(piece); {
			m, err := server.Read(buf)
			n += m
			if err != nil {
				got <- err
				return
			}
		}
		got <- nil
	}()
	for range b.N {
		if _, err := client.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
	if err := <-got; err != nil {
		b.Fatal(err)
	}
}

func BenchmarkStream(b *testing.B) {
	for _, c := range []struct {
		name    string
		filters []filterapi.DataFilter
	}{
		{"spliced", nil},
		{"one filter", []filterapi.DataFilter{passer{}}},
		{"three filters", []filterapi.DataFilter{passer{}, passer{}, passer{}}},
		{"released", []filterapi.DataFilter{releaser{}}},
	} {
		b.Run(c.name, func(b *testing.B) {
			c := carry(b, runTCP(b, nil), false, c.filters...)
			benchStream(b, c.client, c.server)
		})
	}
	b.Run("io.Copy", func(b *testing.B) {
		client, server := copied(b)
		benchStream(b, client, server)
	})
	b.Run("io.Copy without splice", func(b *testing.B) {
		client, server := copiedPlainly(b)
		benchStream(b, client, server)
	})
}

func copied(b *testing.B) (client, server *net.TCPConn) {
	client, in, out, server := fourSockets(b)
	go io.Copy(out, in)
	go io.Copy(in, out)
	return client, server
}

func copiedPlainly(b *testing.B) (client, server *net.TCPConn) {
	client, in, out, server := fourSockets(b)
	bare := func(dst io.Writer, src io.Reader) {
		io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 32<<10))
	}
	go bare(out, in)
	go bare(in, out)
	return client, server
}

func fourSockets(b *testing.B) (client, in, out, server *net.TCPConn) {
	pair := func() (a, z *net.TCPConn) {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close(); s.Close() })
		return c.(*net.TCPConn), s.(*net.TCPConn)
	}
	client, in = pair()
	server, out = pair()
	return client, in, out, server
}
