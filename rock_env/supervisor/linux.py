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

PF_EXITING = 0x4  # of a process's flags (linux/sched.h)
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP = 1, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_NAME, _PR_SET_DUMPABLE = 36, 38, 15, 4
_SECCOMP_SET_MODE_FILTER, _SECCOMP_GET_ACTION_AVAIL = 1, 2
_SECCOMP_NEW_LISTENER, _SECCOMP_WAIT_KILLABLE = 8, 32
_SECCOMP_RET_USER_NOTIF = 0x7FC00000
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
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


def offer_to_oom_killer() -> None:
    """Make this process, and what it starts, the first choice when memory is short (proc(5), oom_score_adj)."""
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"1000")
    finally:
        os.close(fd)


def set_dumpable(value: bool) -> None:
    """False: other processes of the same user can neither trace this one nor look into its /proc directory."""
    _prctl(_PR_SET_DUMPABLE, int(value))


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


def can_watch() -> bool:
    """Whether this kernel offers seccomp user notification (5.0)."""
    action = ctypes.c_uint32(_SECCOMP_RET_USER_NOTIF)
    return _libc.syscall(_SYS_SECCOMP[MACHINE], _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0


def empty_bounding_set(last_cap: int) -> None:
    """What no program that is executed from now on can gain. Needs CAP_SETPCAP."""
    for capability in range(last_cap + 1):
        _prctl(_PR_CAPBSET_DROP, capability)


def drop_privileges(seccomp_program: bytes, watched: bool, landlock_fd: int | None) -> int:
    """Empty every capability set, forbid regaining any, enter the Landlock domain and install the system call filter.

    Returns the filter's listener, a new descriptor, if it is a `watched` one; else -1.
    """
    number = _SYS_CAPSET[MACHINE]
    _check(_libc.syscall(number, ctypes.byref(_CAP_HEADER), ctypes.byref(_NO_CAPABILITIES)), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if landlock_fd is not None:
        _check(_libc.syscall(_SYS_LANDLOCK_RESTRICT, landlock_fd, 0), "landlock_restrict_self")
    buffer = ctypes.create_string_buffer(seccomp_program, len(seccomp_program))
    program = ctypes.byref(_SockFilterProgram(len(seccomp_program) // 8, ctypes.addressof(buffer)))
    call = _SYS_SECCOMP[MACHINE], _SECCOMP_SET_MODE_FILTER
    if not watched:
        _check(_libc.syscall(*call, 0, program), "seccomp")
        return -1
    # WAIT_KILLABLE (5.19): a signal does not interrupt a call that has been received, which would show it twice.
    listener = _libc.syscall(*call, _SECCOMP_NEW_LISTENER | _SECCOMP_WAIT_KILLABLE, program)
    if listener < 0:
        listener = _check(_libc.syscall(*call, _SECCOMP_NEW_LISTENER, program), "seccomp with a listener")
    return listener


_LANDLOCK_MAKE_DEVICES = 1 << 6 | 1 << 11  # MAKE_CHAR, MAKE_BLOCK
_LANDLOCK_IOCTL_DEV = 1 << 15
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # ABI version: how many file system rights it knows


def landlock_version() -> int:
    """The ABI version of Landlock; 0 where the kernel has none."""
    return max(0, _libc.syscall(_SYS_LANDLOCK_CREATE, 0, 0, 1))


class _LandlockRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def landlock_ruleset(version: int, root_fd: int, devices_fd: int) -> int:
    """A ruleset for one sandbox: no new device nodes, no device ioctls but below /dev.

    Being in a Landlock domain at all does more: no mounts, and neither ptrace nor /proc/PID/mem of anything outside the
    domain, the sandbox's first process included.
    """
    handled = (1 << _LANDLOCK_RIGHTS.get(version, 16)) - 1
    ruleset = _check(
        _libc.syscall(_SYS_LANDLOCK_CREATE, ctypes.byref(ctypes.c_uint64(handled)), 8, 0), "landlock_create_ruleset"
    )
    everywhere = handled & ~_LANDLOCK_MAKE_DEVICES & ~_LANDLOCK_IOCTL_DEV
    for access, fd in ((everywhere, root_fd), (handled & _LANDLOCK_IOCTL_DEV, devices_fd)):
        if access:
            rule = _LandlockRule(access, fd)
            _check(_libc.syscall(_SYS_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0), "landlock_add_rule")
    return ruleset


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
    """Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat); None when there is none, or one
    that has ended and only waits to be reaped: its parent may never do that."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in ("Z", "X") else None


def stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command name: [0] state, [1] ppid, [2] pgrp, [3] session, [6] flags,
    [19] start."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError:
        return None
    return data[data.rindex(b")") + 2 :].decode().split()
