package userpath

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What a connection costs beside its packets: the system calls that make its
// sockets and ask about them. None of them waits, so that they are made as those
// in rawcall.go; and an address goes into memory of the caller's, where the
// syscall package would make a new one each time.

// rawSocket makes a TCP socket that does not block.
func rawSocket(domain int) (int, error) {
	return rawResult(unix.RawSyscall(unix.SYS_SOCKET, uintptr(domain), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP))
}

// rawAccept takes a connection off a listener that does not block; from is who
// made it.
func rawAccept(listener int) (fd int, from netip.AddrPort, err error) {
	var raw unix.RawSockaddrInet6 // room for both
	size := uint32(unix.SizeofSockaddrInet6)
	fd, err = rawResult(unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&size)),
		unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0))
	if err != nil {
		return -1, netip.AddrPort{}, err
	}
	return fd, udpDecode(&raw), nil
}

// rawName is the address that a socket has.
func rawName(fd int) (netip.AddrPort, error) {
	var raw unix.RawSockaddrInet6
	size := uint32(unix.SizeofSockaddrInet6)
	_, err := rawResult(unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&size))))
	return udpDecode(&raw), err
}

// rawSetInt sets an option.
func rawSetInt(fd, level, name, value int) error {
	v := int32(value)
	_, err := rawResult(unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&v)), unsafe.Sizeof(v), 0))
	return err
}

// rawAbort has the next close of a socket be a reset (SO_LINGER of no time).
func rawAbort(fd int) {
	v := unix.Linger{Onoff: 1}
	unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&v)), unix.SizeofLinger, 0)
}

// rawShutdown says that nothing more is sent.
func rawShutdown(fd int) {
	unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
}

// rawWatch adds a socket to an epoll instance.
func rawWatch(epoll, fd int, ev *unix.EpollEvent) error {
	_, err := rawResult(unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epoll), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(ev)), 0, 0))
	return err
}

// rawEvents gives what an epoll instance has to tell now, without waiting. The
// call is epoll_pwait, which every architecture has.
func rawEvents(epoll int, events []unix.EpollEvent) (int, error) {
	return rawResult(unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0, 0))
}
