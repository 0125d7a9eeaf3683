package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// TFTPServer is a TFTP server on port 69. Root may be read and written by
// everybody.
type TFTPServer struct {
	*Process
	Root string
}

// TFTPD starts tftpd-hpa on this host, both families.
func (h *Host) TFTPD() *TFTPServer {
	h.lab.T.Helper()
	s := h.tftpRoot()
	s.start(h, "in.tftpd", "--foreground", "--create", "--secure", s.Root)
	return s
}

// ATFTPD starts atftpd on this host, IPv4 alone.
func (h *Host) ATFTPD() *TFTPServer {
	h.lab.T.Helper()
	s := h.tftpRoot()
	s.start(h, "atftpd", "--daemon", "--no-fork", "--logfile", "-", s.Root)
	return s
}

func (h *Host) tftpRoot() *TFTPServer {
	h.lab.T.Helper()
	root, err := os.MkdirTemp(h.lab.dir, "tftp-"+h.Name+".")
	if err == nil {
		err = os.Chmod(root, 0o777)
	}
	if err != nil {
		h.lab.T.Fatalf("TFTP server: %v", err)
	}
	return &TFTPServer{Root: root}
}

func (s *TFTPServer) start(h *Host, program string, args ...string) {
	h.lab.T.Helper()
	var err error
	if s.Process, err = h.Start(nil, program, args...); err != nil {
		h.lab.T.Fatal(err)
	}
	Eventually(h.lab.T, 10*time.Second, program+" listens", func() bool {
		select {
		case <-s.Done():
			h.lab.T.Fatalf("%s ended:\n%s", program, s.Output)
		default:
		}
		return strings.Contains(h.Run("ss", "-Hlunp", "sport = :69"), fmt.Sprintf("pid=%d,", s.PID()))
	})
}

// Put makes a file of the server's.
func (s *TFTPServer) Put(h *Host, name string, content []byte) {
	h.lab.T.Helper()
	if err := os.WriteFile(filepath.Join(s.Root, name), content, 0o644); err != nil {
		h.lab.T.Fatalf("TFTP server: %v", err)
	}
}
