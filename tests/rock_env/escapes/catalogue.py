"""Every attack of the suite: what stops it and where it is on record. docs/security.md shows it as a table.

python tests/rock_env/escapes/catalogue.py writes that table; a test compares the two.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rock_env.supervisor import seccomp

DOCUMENT = Path(__file__).parents[3] / "docs" / "security.md"
_BEGIN, _END = "<!-- attacks: written by tests/rock_env/escapes/catalogue.py -->", "<!-- end of attacks -->"
NOT_RECORDED = "no: nothing there is touched"


@dataclass(frozen=True)
class Attack:
    """One row.

    Attributes:
      title: the attack, in words.
      program: its file in attacks/, without ".py".
      stopped_by: what stops it.
      records: audit records that it must leave, each as the fields that matter: {"event": ..., ...}.
      lines: how many attempts the program reports (None: depends on the machine).
      control: the program also runs outside, where each of its attempts must succeed: the attack itself is sound.
      needs: a backend without this capability refuses to start such a sandbox at all.
      docker: what stops it in a Docker container, where that is something else. What is on record is the same.
    """

    title: str
    program: str
    stopped_by: str
    records: tuple[dict, ...] = ()
    lines: int | None = 1
    control: bool = False
    needs: str = "network_closed"
    docker: str = ""


def _denied(*names: str) -> tuple[dict, ...]:
    return tuple({"event": "syscall_denied", "syscall": name} for name in names)


def _called(*names: str) -> tuple[dict, ...]:
    return tuple({"event": "network_call", "syscall": name, "scope": "loopback"} for name in names)


# Arguments with which each call would do something, or fail otherwise than with EPERM, were it let through.
CALL_GROUPS: dict[str, dict[str, list]] = {
    "mounts and namespaces": {
        "mount": ["none", "/tmp", "tmpfs", 0, ""], "umount2": ["/tmp", 2], "pivot_root": ["/", "/tmp"],
        "chroot": ["/tmp"], "unshare": [0x10000000], "setns": [0, 0], "clone": [0x10000011, 0, 0, 0, 0],
        "fsopen": ["tmpfs", 0], "open_tree": [-100, "/", 1], "move_mount": [-100, "/", -100, "/tmp", 0],
    },
    "other processes' memory": {
        "ptrace": [0, 0, 0, 0], "process_vm_readv": [1, 0, 0, 0, 0, 0], "process_vm_writev": [1, 0, 0, 0, 0, 0],
        "pidfd_getfd": [0, 0, 0], "kcmp": [1, 1, 0, 0, 0],
    },
    "kernel keyrings": {
        "add_key": ["user", "x", "secret", 6, -3], "keyctl": [0, -3, 0], "request_key": ["user", "x", 0, -3],
    },
    "bpf, perf, userfaultfd, io_uring": {
        "bpf": [0, 0, 0], "perf_event_open": [0, 0, -1, -1, 0], "userfaultfd": [1], "io_uring_setup": [1, 0],
    },
    "file handles, keystrokes, the machine": {
        "open_by_handle_at": [-100, 0, 0], "name_to_handle_at": [-100, "/", 0, 0, 0], "ioctl": [0, 0x5412, 0],
        "reboot": [0, 0, 0], "init_module": [0, 0, ""], "kexec_load": [0, 0, 0, 0], "swapoff": ["/none"],
        "settimeofday": [0, 0], "sethostname": ["evil", 4], "syslog": [3, 0, 0],
    },
}  # fmt: skip


def calls_of(group: str) -> dict[str, list]:
    """The parameters of system_calls.py for a group: {name: [number, arguments]}."""
    numbers = {name: number for number, name in seccomp.names(os.uname().machine).items()}
    return {name: [numbers[name], arguments] for name, arguments in CALL_GROUPS[group].items() if name in numbers}


_NAMESPACE = "network namespace with only `lo`"
ATTACKS = (
    Attack("files of the host", "host_files", "own root, mount namespace", lines=5, control=True),
    Attack(
        "another sandbox's files, processes, servers", "other_sandboxes", "own root, pid and network namespaces",
        _called("connect"), lines=3,
    ),
    Attack("the kernel's settings and memory, the first process, by /proc", "proc", "user namespace, Landlock",
           lines=10, docker="a user of its own, read-only or hidden /proc and /sys, a rocklet that is not dumpable"),
    *(
        Attack(group, "system_calls", "seccomp, no capabilities", _denied(*calls), lines=len(calls))
        for group, calls in CALL_GROUPS.items()
    ),
    Attack("device nodes and the host's devices", "devices", "seccomp, Landlock, user namespace, private /dev",
           _denied("mknodat"), lines=10, docker="seccomp, Landlock, no capabilities, private /dev"),
    Attack("raw, packet, hypervisor and kernel sockets", "raw_sockets", "seccomp, no capabilities",
           _denied("socket"), 5),
    Attack("TCP to a listener on the host", "tcp", _NAMESPACE, _called("connect"), 2, control=True),
    Attack("UDP to a receiver on the host", "udp", _NAMESPACE, _called("connect", "sendto", "sendmsg"), 3,
           control=True),
    Attack("DNS: a secret in a query's name", "dns", f"{_NAMESPACE}, no resolver", _called("sendto"), None,
           control=True),
    Attack(
        "DNS: a secret in a name for the egress proxy", "dns_by_proxy", "the proxy resolves only what a rule names",
        ({"event": "egress", "verdict": "denied", "reason": "no rule allows it"},), 2, needs="network_allowlist",
    ),
    Attack("reverse SSH tunnel", "reverse_ssh", _NAMESPACE, _called("connect"), None, control=True),
    Attack(
        "reverse SSH tunnel through the egress proxy, to a host that a rule names for https", "reverse_ssh",
        "the proxy lets only TLS for that host through",
        ({"event": "egress", "verdict": "denied", "reason": "the tunnel does not begin with TLS"},),
        needs="network_allowlist",
    ),
    Attack("abstract unix sockets of the host", "abstract_sockets", "network namespace",
           ({"event": "network_call", "syscall": "connect", "scope": "abstract"},), control=True),
    Attack("signals to the host's processes", "signals", "pid namespace", lines=3, control=True),
    Attack("fork bomb", "fork_bomb", "pids limit", ({"event": "limit_hit", "limit": "pids"},)),
    Attack("memory bomb", "memory_bomb", "memory limit", ({"event": "limit_hit", "limit": "memory_bytes"},)),
    Attack("disk fill", "disk_fill", "size of the writable layer", ({"event": "limit_hit", "limit": "disk_bytes"},), 2,
           docker="read-only root, size of each writable place"),
    Attack("a miner's CPU use", "miner", "CPU limit", ({"event": "limit_hit", "limit": "cpus"},)),
    Attack("links and archives planted for the host to follow", "links",
           "openat2(RESOLVE_IN_ROOT); no link is followed", lines=0),
)  # fmt: skip


def name_of(attack: Attack) -> str:
    """The test's name for an attack."""
    return re.sub(r"[^a-z0-9]+", "-", attack.title.lower()).strip("-")


def _records_of(attack: Attack) -> str:
    texts: dict[str, list[str]] = {}
    for record in attack.records:
        rest = [str(value) for key, value in record.items() if key not in ("event", "scope")]
        texts.setdefault(record["event"], []).append(" ".join(rest))
    return "; ".join(f"`{event}`: {', '.join(rest)}" for event, rest in texts.items()) or NOT_RECORDED


def table() -> str:
    """The attacks as a Markdown table."""
    lines = ["| attack | what stops it | on record | in Docker | test |", "|---|---|---|---|---|"]
    for attack in ATTACKS:
        docker = attack.docker or ("alike" if attack.needs == "network_closed" else "refused: no allowlist there")
        row = (attack.title, attack.stopped_by, _records_of(attack), docker, f"`{name_of(attack)}`")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def split_document() -> tuple[str, str, str]:
    """(before, table, after) of docs/security.md."""
    before, begin, rest = DOCUMENT.read_text().partition(f"{_BEGIN}\n")
    shown, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT}: expected the lines {_BEGIN} and {_END}")
    return before + begin, shown, end + after


if __name__ == "__main__":
    before, _, after = split_document()
    DOCUMENT.write_text(before + table() + after)
