package lab

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// FTPServer is a vsftpd with an anonymous account.
type FTPServer struct {
	*Process
	// Root is what the client sees as /; Upload is its /in, which may be
	// written.
	Root, Upload string
	log          string
}

// VSFTPD starts vsftpd on port 21 of this host, both families. Its passive
// ports are 40000 to 40100; active connections come from port 20.
func (h *Host) VSFTPD(settings ...string) *FTPServer {
	h.lab.T.Helper()
	base := filepath.Join(h.lab.dir, "ftp-"+h.Name)
	s := &FTPServer{Root: filepath.Join(base, "root"), log: filepath.Join(base, "log")}
	s.Upload = filepath.Join(s.Root, "in")
	empty := filepath.Join(base, "empty")
	for path, mode := range map[string]os.FileMode{base: 0o755, s.Root: 0o755, s.Upload: 0o777, empty: 0o755} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			h.lab.T.Fatalf("vsftpd: %v", err)
		}
		if err := os.Chmod(path, mode); err != nil {
			h.lab.T.Fatalf("vsftpd: %v", err)
		}
	}
	config := append([]string{
		"listen=NO", "listen_ipv6=YES", "listen_port=21", "background=NO",
		"anonymous_enable=YES", "no_anon_password=YES", "local_enable=NO",
		"write_enable=YES", "anon_upload_enable=YES", "anon_mkdir_write_enable=YES", "anon_other_write_enable=YES",
		"anon_umask=022", "anon_root=" + s.Root, "secure_chroot_dir=" + empty,
		"pasv_min_port=40000", "pasv_max_port=40100", "connect_from_port_20=YES",
		"seccomp_sandbox=NO", "isolate=NO", "isolate_network=NO",
		"xferlog_enable=YES", "xferlog_std_format=NO", "log_ftp_protocol=YES", "vsftpd_log_file=" + s.log,
		"use_localtime=NO", "dirmessage_enable=NO", "idle_session_timeout=300", "data_connection_timeout=60",
	}, settings...)
	path := h.lab.File("vsftpd-"+h.Name+".conf", strings.Join(config, "\n")+"\n")
	p, err := h.Start(nil, "vsftpd", path)
	if err != nil {
		h.lab.T.Fatal(err)
	}
	s.Process = p
	h.AwaitListening(p, 21)
	return s
}

// Put makes a file of n bytes of Content under the server's root, and gives its
// hash.
func (s *FTPServer) Put(h *Host, name string, n int) string {
	h.lab.T.Helper()
	b, hash := Content(n)
	if err := os.WriteFile(filepath.Join(s.Root, name), b, 0o644); err != nil {
		h.lab.T.Fatalf("vsftpd: %v", err)
	}
	return hash
}

// Saw counts the commands with this verb that reached the server.
func (s *FTPServer) Saw(verb string) int {
	text, err := os.ReadFile(s.log)
	if err != nil {
		return 0 // no client yet, no file yet
	}
	return strings.Count(string(text), "\""+verb+" ") + strings.Count(string(text), "\""+verb+"\"")
}

// SawAny counts every command.
func (s *FTPServer) SawAny() int {
	text, err := os.ReadFile(s.log)
	if err != nil {
		return 0
	}
	return strings.Count(string(text), "FTP command:")
}

// Connections is how many control connections the server has now.
func (h *Host) Connections(port int) int {
	h.lab.T.Helper()
	n := 0
	for line := range strings.Lines(h.Run("ss", "-Htn", "state", "established", "sport = :"+strconv.Itoa(port))) {
		if strings.TrimSpace(line) != "" {
			n++
		}
	}
	return n
}
