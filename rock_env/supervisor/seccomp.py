"""The system call filter of a sandbox, as classic BPF.

Assembled here instead of by libseccomp, so that it needs no native library and cannot be missing. Denied calls fail
with EPERM (clone3 with ENOSYS, on which C libraries fall back to clone): programs see an ordinary error.
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
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_CLONE_NEW_FLAGS = 0x7E020000  # every CLONE_NEW* of clone(2)
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_SOCKET_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink. Not vsock: no namespace confines it

_LOAD, _JEQ, _JSET, _JGE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARG0, _ARG1 = 0, 4, 16, 24


def _op(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)


def _guard(number: int, body: list[bytes]) -> list[bytes]:
    """`body` runs for system call `number`; it must end in a return. Afterwards the number is still loaded."""
    return [_op(_JEQ, number, 0, len(body)), *body]


def supported(machine: str) -> bool:
    return machine in _ARCHITECTURES


def build(machine: str) -> bytes:
    """The filter for an architecture, as an array of struct sock_filter."""
    column, architecture = _ARCHITECTURES[machine]
    deny, allow = _op(_RETURN, _ERRNO | errno.EPERM), _op(_RETURN, _ALLOW)
    program = [
        _op(_LOAD, _ARCHITECTURE),
        _op(_JEQ, architecture, 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":  # the x32 table would bypass every number below
        program += [_op(_JGE, 0x40000000, 0, 1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            program += _guard(number, [deny])
    program += _guard(_CLONE3[column], [_op(_RETURN, _ERRNO | errno.ENOSYS)])
    program += _guard(_CLONE[column], [_op(_LOAD, _ARG0), _op(_JSET, _CLONE_NEW_FLAGS, 0, 1), deny, allow])
    sti, linux = _TERMINAL_INJECTION
    program += _guard(_IOCTL[column], [_op(_LOAD, _ARG1), _op(_JEQ, sti, 1, 0), _op(_JEQ, linux, 0, 1), deny, allow])
    families = [_op(_JEQ, family, len(_SOCKET_FAMILIES) - i) for i, family in enumerate(_SOCKET_FAMILIES)]
    refuse = _op(_RETURN, _ERRNO | errno.EAFNOSUPPORT)
    program += _guard(_SOCKET[column], [_op(_LOAD, _ARG0), *families, refuse, allow])
    program.append(allow)
    return b"".join(program)
