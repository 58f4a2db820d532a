"""Linux calls that Python 3.11 does not wrap: mounts, namespaces, capabilities, openat2. ctypes over libc."""

from __future__ import annotations

import ctypes
import errno
import os
import signal

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_SECCOMP = 1, 24, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_NAME, _PR_SET_DUMPABLE = 36, 38, 15, 4
_SECCOMP_MODE_FILTER = 2
_CLOSE_RANGE_CLOEXEC = 4
_SYS_OPENAT2 = 437  # the same number on every architecture
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10
MACHINE = os.uname().machine


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, fstype: str | None, flags: int = 0, data: str = "") -> None:
    arguments = [os.fsencode(a) if a is not None else None for a in (source, target, fstype)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(data)), f"mount {fstype or 'bind'} on {target}")


def bind_readonly(source: str, target: str) -> None:
    """Bind `source` at `target`, read-only so that no mistake of ours can reach the host's files through it."""
    mount(source, target, None, MS_BIND | MS_REC)
    kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | kept)


def umount(target: str, flags: int = MNT_DETACH) -> None:
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    _check(_libc.setns(fd, flags), "setns")


def _prctl(option: int, value: int, pointer: object = 0) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0), f"prctl {option}")


def die_with_parent() -> None:
    """SIGKILL when the parent thread ends. A later change of credentials clears it, so call it last."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def become_subreaper() -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def close_on_exec(keep: set[int]) -> None:
    """Mark every descriptor above 2 that is not in `keep`: nothing of ours may be inherited by a sandbox."""
    low = 3
    for fd in (*sorted(keep), 1 << 31):
        if fd > low:
            result = _libc.close_range(ctypes.c_uint(low), ctypes.c_uint(fd - 1), _CLOSE_RANGE_CLOEXEC)
            _check(result, "close_range")
        low = max(low, fd + 1)


def set_name(name: str) -> None:
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


class _SockFilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_CAP_HEADER = _CapHeader(0x20080522, 0)
_NO_CAPABILITIES = (ctypes.c_uint32 * 6)()


def last_capability() -> int:
    try:
        with open("/proc/sys/kernel/cap_last_cap") as file:
            return int(file.read())
    except OSError:
        return 40


def drop_privileges(last_cap: int, seccomp_program: bytes) -> None:
    """Empty the bounding set and every capability set, forbid regaining any, and install the system call filter."""
    for capability in range(last_cap + 1):
        _prctl(_PR_CAPBSET_DROP, capability)
    number = _SYS_CAPSET[MACHINE]
    _check(_libc.syscall(number, ctypes.byref(_CAP_HEADER), ctypes.byref(_NO_CAPABILITIES)), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    buffer = ctypes.create_string_buffer(seccomp_program, len(seccomp_program))
    program = _SockFilterProgram(len(seccomp_program) // 8, ctypes.addressof(buffer))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def open_in_root(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` as a process chrooted to `root_fd` would: links and `..` cannot leave it, magic links fail."""
    creates = flags & (os.O_CREAT | os.O_TMPFILE)
    how = _OpenHow(flags | os.O_CLOEXEC, mode if creates else 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    for _ in range(100):  # EAGAIN: a rename raced with the resolution of `..`
        fd = _libc.syscall(_SYS_OPENAT2, root_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):
            raise OSError(number, os.strerror(number), path)
    raise OSError(errno.EAGAIN, "the path kept changing while it was resolved", path)


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat); None when there is none."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields else None


def stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command name: [0] state, [1] ppid, [2] pgrp, [3] session, [19] start."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError:
        return None
    return data[data.rindex(b")") + 2 :].decode().split()
