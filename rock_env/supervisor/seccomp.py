"""The system call filter of a sandbox, as classic BPF.

Assembled here instead of by libseccomp, so that it needs no native library and cannot be missing. Denied calls fail
with EPERM (clone3 with ENOSYS, on which C libraries fall back to clone): programs see an ordinary error.

With `watched`, a denied call is first shown to the supervisor (seccomp user notification), which records and denies it;
so are calls that name a network address, which it records and lets continue. See rock_env.supervisor.watch.
"""

from __future__ import annotations

import errno
import struct

# name: (x86_64, aarch64); None where the architecture has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "unshare": (272, 97),
    "setns": (308, 268),
    # other processes' memory, kernel keyrings, file handles
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    # large kernel attack surface, of no use to a shell user
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_secret": (447, 447),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "lookup_dcookie": (212, 18),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "iopl": (172, None),
    "ioperm": (173, None),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
}
_CLONE, _CLONE3, _IOCTL, _SOCKET = (56, 220), (435, 435), (16, 29), (41, 198)
_MKNOD, _MKNODAT = (133, None), (259, 33)
_CONNECT, _BIND, _SENDTO, _SENDMSG, _SENDMMSG = (42, 203), (49, 200), (44, 206), (46, 211), (307, 269)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_CLONE_NEW_FLAGS = 0x7E020000  # every CLONE_NEW* of clone(2)
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_SOCKET_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink. Not vsock: no namespace confines it
_RAW_TYPES = (3, 10)  # SOCK_RAW, SOCK_PACKET
_CHARACTER_DEVICE, _BLOCK_DEVICE = 0o020000, 0o060000

_LOAD, _JEQ, _JSET, _JGE, _RETURN, _AND = 0x20, 0x15, 0x45, 0x35, 0x06, 0x54
_ALLOW, _KILL, _ERRNO, _NOTIFY = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
_NUMBER, _ARCHITECTURE, _ARG0, _ARG1, _ARG2, _ARG4 = 0, 4, 16, 24, 32, 48


def _op(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)


def _guard(number: int, body: list[bytes]) -> list[bytes]:
    """`body` runs for system call `number`; it must end in a return. Afterwards the number is still loaded."""
    return [_op(_JEQ, number, 0, len(body)), *body]


def supported(machine: str) -> bool:
    return machine in _ARCHITECTURES


def _refused(machine: str) -> set[int]:
    """Numbers of calls that are denied whatever their arguments."""
    column, _ = _ARCHITECTURES[machine]
    return {numbers[column] for numbers in _DENIED.values()} - {None}


def _devices(column: int, deny: bytes, allow: bytes) -> list[bytes]:
    """mknod and mknodat: no device nodes."""
    program = []
    for numbers, mode in ((_MKNOD, _ARG1), (_MKNODAT, _ARG2)):
        number = numbers[column]
        if number is not None:
            kinds = [_op(_JEQ, _CHARACTER_DEVICE, 1, 0), _op(_JEQ, _BLOCK_DEVICE, 0, 1)]
            program += _guard(number, [_op(_LOAD, mode), _op(_AND, 0o170000), *kinds, deny, allow])
    return program


def _sockets(column: int, watched: bool, allow: bytes) -> list[bytes]:
    """socket: four families, and of the internet families no raw sockets."""
    refuse = _op(_RETURN, _NOTIFY if watched else _ERRNO | errno.EAFNOSUPPORT)
    deny = _op(_RETURN, _NOTIFY if watched else _ERRNO | errno.EPERM)
    raw = [_op(_LOAD, _ARG1), _op(_AND, 0xF), _op(_JEQ, _RAW_TYPES[0], 2, 0), _op(_JEQ, _RAW_TYPES[1], 1, 0)]
    inet = [*raw, allow, deny]
    unix, inet4, inet6, netlink = _SOCKET_FAMILIES
    families = [
        _op(_JEQ, unix, 4, 0), _op(_JEQ, netlink, 3, 0), _op(_JEQ, inet4, 3, 0), _op(_JEQ, inet6, 2, 0), refuse, allow
    ]  # fmt: skip
    return _guard(_SOCKET[column], [_op(_LOAD, _ARG0), *families, *inet])


def _addresses(column: int, handover: int) -> list[bytes]:
    """Calls that name an address are shown to the supervisor. `handover`: the descriptor of our own one sendmsg."""
    notify, allow = _op(_RETURN, _NOTIFY), _op(_RETURN, _ALLOW)
    program = []
    for numbers in (_CONNECT, _BIND, _SENDMMSG):
        program += _guard(numbers[column], [notify])
    address = [_op(_LOAD, _ARG4), _op(_JEQ, 0, 0, 2), _op(_LOAD, _ARG4 + 4), _op(_JEQ, 0, 1, 0), notify, allow]
    program += _guard(_SENDTO[column], address)
    return program + _guard(_SENDMSG[column], [_op(_LOAD, _ARG0), _op(_JEQ, handover, 1, 0), notify, allow])


def build(machine: str, handover: int | None = None) -> bytes:
    """The filter for an architecture, as an array of struct sock_filter.

    `handover` makes it a watched one, to be installed with a listener: the number of the descriptor on which a new
    process hands that listener over, and which no process of a sandbox can have (RLIMIT_NOFILE is not above it).
    """
    column, architecture = _ARCHITECTURES[machine]
    watched = handover is not None
    deny, allow = _op(_RETURN, _NOTIFY if watched else _ERRNO | errno.EPERM), _op(_RETURN, _ALLOW)
    program = [
        _op(_LOAD, _ARCHITECTURE),
        _op(_JEQ, architecture, 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":  # the x32 table would bypass every number below
        program += [_op(_JGE, 0x40000000, 0, 1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    for number in sorted(_refused(machine)):
        program += _guard(number, [deny])
    program += _guard(_CLONE3[column], [_op(_RETURN, _ERRNO | errno.ENOSYS)])
    program += _guard(_CLONE[column], [_op(_LOAD, _ARG0), _op(_JSET, _CLONE_NEW_FLAGS, 0, 1), deny, allow])
    sti, linux = _TERMINAL_INJECTION
    program += _guard(_IOCTL[column], [_op(_LOAD, _ARG1), _op(_JEQ, sti, 1, 0), _op(_JEQ, linux, 0, 1), deny, allow])
    program += _devices(column, deny, allow)
    program += _sockets(column, watched, allow)
    if handover is not None:
        program += _addresses(column, handover)
    program.append(allow)
    return b"".join(program)


def names(machine: str) -> dict[int, str]:
    """{number: name} of every call that a watched filter can show."""
    column, _ = _ARCHITECTURES[machine]
    others = {
        "clone": _CLONE, "ioctl": _IOCTL, "socket": _SOCKET, "mknod": _MKNOD, "mknodat": _MKNODAT, "connect": _CONNECT,
        "bind": _BIND, "sendto": _SENDTO, "sendmsg": _SENDMSG, "sendmmsg": _SENDMMSG,
    }  # fmt: skip
    numbers = {name: pair[column] for name, pair in (_DENIED | others).items()}
    return {number: name for name, number in numbers.items() if number is not None}


def error_of(name: str, arguments: tuple[int, ...]) -> int:
    """What a shown call is denied with; 0: it may continue."""
    if name in ("connect", "bind", "sendto", "sendmsg", "sendmmsg"):
        return 0
    if name == "socket" and arguments[0] & 0xFFFFFFFF not in _SOCKET_FAMILIES:
        return errno.EAFNOSUPPORT
    return errno.EPERM
