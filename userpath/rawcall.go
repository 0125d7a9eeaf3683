package userpath

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls on sockets that never block, made without telling the
// scheduler. The usual way is for calls that may wait: a monitor thread looks
// for those every 20 us, and gives the processor of one that takes longer to
// another thread. Sending a packet takes about that long, because the kernel
// carries it as far as it gets within the call. So each such call woke threads
// that had nothing to do, which cost more than a tenth of a short connection.
// And in a process that was idle the monitor sleeps, and the first call of the
// usual way wakes it: it came between a packet and its verdict, and the monitor
// ran before the client, together 20 us of a connection that stands after 45.
// What these calls do not may not be done here: wait.

func rawRead(fd int, b []byte) (int, error) {
	return rawResult(unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b))))
}

func rawWrite(fd int, b []byte) (int, error) {
	return rawResult(unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b))))
}

// rawClose closes a socket that does not linger, or does so for no time.
func rawClose(fd int) {
	unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

// rawConnect is for a non-blocking socket.
func rawConnect(fd int, to netip.AddrPort) error {
	var raw unix.RawSockaddrInet6 // room for both
	size := unix.SizeofSockaddrInet6
	if to.Addr().Is4() {
		in4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&raw))
		in4.Family, in4.Addr = unix.AF_INET, to.Addr().As4()
		size = unix.SizeofSockaddrInet4
	} else {
		raw.Family, raw.Addr = unix.AF_INET6, to.Addr().As16()
	}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&raw.Port))[:], to.Port())
	_, err := rawResult(unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&raw)), uintptr(size)))
	return err
}

// rawSend is for a netlink socket, with MSG_DONTWAIT.
func rawSend(fd int, b []byte) error {
	_, err := rawResult(unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)),
		unix.MSG_DONTWAIT, 0, 0))
	return err
}

// rawReceiveMany is recvmmsg with MSG_DONTWAIT: datagrams that are there. Neither
// the netlink library nor x/sys has it.
func rawReceiveMany(fd int, heads []mmsghdr) (int, error) {
	return rawResult(unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(heads))), uintptr(len(heads)),
		unix.MSG_DONTWAIT, 0, 0))
}

// rawReadable is ppoll without a time to wait. What cannot be asked is readable:
// who reads it hears why.
func rawReadable(fd int) bool {
	p := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	var now unix.Timespec
	n, err := rawResult(unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0))
	return n != 0 || err != nil
}

func rawResult(n, _ uintptr, errno unix.Errno) (int, error) {
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}
