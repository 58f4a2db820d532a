"""Parts of the supervisor on their own: output caps, control groups of version 2, the filter, the event loop."""

import errno
import os
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from rock_env import Limits, wire
from rock_env.supervisor import cgroups, seccomp, watch
from rock_env.supervisor.process import Output


@pytest.mark.parametrize("pieces", [[b"abc"], [b"x" * 100], [b"0123456789"] * 1000, [b"y" * 300_000, b"z" * 300_000]])
@pytest.mark.parametrize("limit", [16, 100, 101, 1 << 16])
def test_output_keeps_its_beginning_and_end(pieces, limit):
    output, whole = Output(limit), b"".join(pieces)
    for piece in pieces:
        output.add(piece)
    text = output.text()
    if len(whole) <= limit:
        assert (text, output.dropped) == (whole.decode(), 0)
    else:
        assert output.dropped == len(whole) - limit
        tail = limit // 2
        expected = (
            f"{whole[: limit - tail].decode()}\n[... {output.dropped} bytes dropped ...]\n{whole[-tail:].decode()}"
        )
        assert text == expected


def test_frames_survive_any_fragmentation():
    frames = [({"a": 1}, b""), ({"b": "é"}, b"\x00" * 1000), ({}, b"x")]
    data = b"".join(wire.encode(*frame) for frame in frames)
    for size in (1, 7, 100, len(data)):
        reader, got = wire.FrameReader(), []
        for start in range(0, len(data), size):
            reader.feed(data[start : start + size])
            while frame := reader.next():
                got.append(frame)
        assert got == frames


def test_oversized_frames_are_refused():
    reader = wire.FrameReader()
    reader.feed(struct.pack("!II", 1 << 31, 0))
    with pytest.raises(wire.ConnectionLost):
        reader.next()


def _version_2(directory):
    hierarchies = cgroups.Hierarchies()
    hierarchies.version = 2
    hierarchies.base = dict.fromkeys(("memory", "pids", "cpu"), str(directory))
    (directory / "rock-test").mkdir()
    return cgroups.Group.make(hierarchies, "rock-test", "box")


def test_version_2_limits_and_statistics(tmp_path):
    """The files that a version 2 hierarchy offers; the machine at hand may only have version 1."""
    group = _version_2(tmp_path)
    place = tmp_path / "rock-test" / "box"
    assert group.directories == [str(place)]
    for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max"):
        (place / name).write_text("")
    limits = Limits(memory_bytes=64 << 20, pids=33, cpus=0.5)
    group.apply(limits.memory_bytes, limits.pids, limits.cpus)
    written = {p.name: p.read_text() for p in place.iterdir()}
    expected = {"memory.max": "67108864", "memory.swap.max": "0", "pids.max": "33", "cpu.max": "50000 100000"}
    assert written == expected
    (place / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (place / "memory.current").write_text("1000\n")
    (place / "memory.peak").write_text("2000\n")
    (place / "pids.current").write_text("3\n")
    (place / "memory.events").write_text("low 0\noom 2\noom_kill 4\n")
    assert group.usage() == {"cpu_seconds": 2.5, "memory_bytes": 1000, "memory_peak_bytes": 2000, "pids": 3}
    assert group.oom_kills() == 4


@pytest.mark.parametrize(
    ("membership", "mountinfo", "version", "memory"),
    [  # as a container sees them: version 2 in a cgroup namespace; version 1, named as the host sees it
        ("0::/\n", "30 20 0:5 / {0} ro,nosuid - cgroup2 cgroup ro\n", 2, "{0}"),
        (
            "4:memory:/docker/abc\n3:pids:/docker/abc\n0::/docker/abc\n",
            "31 20 0:6 /docker/abc {0}/memory ro - cgroup cgroup ro,memory\n"
            "32 20 0:7 /docker/abc {0}/pids ro - cgroup cgroup ro,pids\n",
            1,
            "{0}/memory",
        ),
        ("0::/\n4:memory:/elsewhere\n", "31 20 0:6 / {0}/memory ro - cgroup cgroup ro,memory\n", 1, "{0}/memory"),
    ],
)
def test_a_container_finds_its_own_group(membership, mountinfo, version, memory, tmp_path, monkeypatch):
    for name in ("memory", "pids"):
        (tmp_path / name).mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids hugetlb\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 5\n")
    texts = {"/proc/self/cgroup": membership, "/proc/self/mountinfo": mountinfo.format(tmp_path)}
    read = cgroups._read
    monkeypatch.setattr(cgroups, "_read", lambda path: texts.get(path) or read(path))
    group = cgroups.Group.own()
    assert group.version == version
    expected = memory.format(tmp_path)
    for file in ("memory.current", "memory.usage_in_bytes"):
        Path(expected, file).write_text("77\n")
    assert group.usage()["memory_bytes"] == 77
    assert expected in group.directories


def test_version_2_freezer_on_a_real_hierarchy(tmp_path):
    """The core of version 2 (freezing) needs no controller, so machines with both versions can test it."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
    if not points or not os.access(points[0], os.W_OK):
        pytest.skip("no writable cgroup2 mount")
    hierarchies = cgroups.Hierarchies()
    hierarchies.version = 2
    hierarchies.base = {"freezer": points[0]}
    supervisor = f"rock-test-{os.getpid()}"
    os.mkdir(f"{points[0]}/{supervisor}")
    group = cgroups.Group.make(hierarchies, supervisor, "box")
    process = subprocess.Popen(["bash", "-c", "while :; do :; done"])
    try:
        Path(group.directories[0], "cgroup.procs").write_text(str(process.pid))
        assert group.pids() == [process.pid]
        assert group.freeze(True)
        ticks = Path(f"/proc/{process.pid}/stat").read_text().split()[13]
        time.sleep(0.2)
        assert Path(f"/proc/{process.pid}/stat").read_text().split()[13] == ticks
        assert group.freeze(False)
        assert not group.remove()
    finally:
        assert cgroups.remove_tree(f"{points[0]}/{supervisor}", kill=True)
        process.wait(60)


def _run_filter(program, number, architecture, arguments=(0, 0)):
    """A classic BPF interpreter for the few instructions in use: what the kernel would answer."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", program))
    at, accumulator = 0, 0
    while True:
        operation, true, false, value = code[at]
        at += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x06:
            return value
        else:
            taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
            at += true if taken else false


@pytest.mark.parametrize(("machine", "architecture", "column"), [("x86_64", 0xC000003E, 0), ("aarch64", 0xC00000B7, 1)])
def test_filter_of_both_architectures(machine, architecture, column):
    program = seccomp.build(machine)
    allow, eperm, enosys, eafnosupport = 0x7FFF0000, 0x00050001, 0x00050026, 0x00050061
    denied = {numbers[column] for numbers in seccomp._DENIED.values()} - {None}
    clone, clone3, ioctl, sock = (pair[column] for pair in ((56, 220), (435, 435), (16, 29), (41, 198)))
    for number in range(500):
        if number in denied:
            assert _run_filter(program, number, architecture) == eperm
        elif number == clone3:
            assert _run_filter(program, number, architecture) == enosys
        elif number != sock:
            assert _run_filter(program, number, architecture) == allow
    assert _run_filter(program, clone, architecture, (0x11, 0)) == allow
    assert _run_filter(program, clone, architecture, (0x10000011, 0)) == eperm
    assert _run_filter(program, ioctl, architecture, (0, 0x5412)) == eperm
    assert _run_filter(program, ioctl, architecture, (0, 0x5401)) == allow
    families = {n for n in range(50) if _run_filter(program, sock, architecture, (n, 0)) == allow}
    assert families == {1, 2, 10, 16}
    assert _run_filter(program, sock, architecture, (40, 0)) == eafnosupport
    types = {n for n in range(16) if _run_filter(program, sock, architecture, (2, n | 0o2000000)) == allow}
    assert types == set(range(16)) - {3, 10}  # no SOCK_RAW, no SOCK_PACKET, whatever the flags beside it
    assert _run_filter(program, sock, architecture, (16, 3)) == allow  # netlink is always raw
    mknodat = (259, 33)[column]
    for mode, answer in ((0o020666, eperm), (0o060666, eperm), (0o010666, allow), (0o100666, allow), (0o140666, allow)):
        assert _run_filter(program, mknodat, architecture, (0, 0, mode)) == answer
    assert _run_filter(program, 1, 0x40000003) == 0x80000000  # another architecture's table
    if machine == "x86_64":
        assert _run_filter(program, 0x40000000 | 165, architecture) == enosys


@pytest.mark.parametrize(("machine", "architecture", "column"), [("x86_64", 0xC000003E, 0), ("aarch64", 0xC00000B7, 1)])
def test_watched_filter_shows_what_it_denies_and_every_address(machine, architecture, column):
    """Against the plain filter: it shows exactly the denied calls, and beside them those that name an address."""
    plain, watched = seccomp.build(machine), seccomp.build(machine, handover=4096)
    notify, names = 0x7FC00000, seccomp.names(machine)
    answers = {0x00050001: errno.EPERM, 0x00050061: errno.EAFNOSUPPORT}
    addressed = {n for n, name in names.items() if name in ("connect", "bind", "sendmsg", "sendmmsg", "sendto")}
    for number in range(500):
        for arguments in ((0, 0), (2, 3, 0), (40, 1), (2, 1), (0x10000000, 0x5412, 0o020666), (0, 0o060000, 0o060000)):
            before = _run_filter(plain, number, architecture, arguments)
            after = _run_filter(watched, number, architecture, arguments)
            if before in answers:
                assert after == notify
                assert seccomp.error_of(names[number], arguments) == answers[before]
            elif number not in addressed:
                assert after == before
    for number in addressed:
        assert seccomp.error_of(names[number], (0,) * 6) == 0
    by_name = {name: n for n, name in names.items()}
    for pointer, answer in ((0, 0x7FFF0000), (1, notify), (1 << 40, notify)):
        assert _run_filter(watched, by_name["sendto"], architecture, (3, 0, 0, 0, pointer, 16)) == answer
    assert _run_filter(watched, by_name["sendmsg"], architecture, (4096, 0)) == 0x7FFF0000
    assert _run_filter(watched, by_name["sendmsg"], architecture, (4095, 0)) == notify


def test_addresses_are_read_as_the_kernel_reads_them():
    inet = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s", 53, bytes([127, 0, 0, 9])) + bytes(8)
    assert watch.parse_address(inet, sends=False) == ("127.0.0.9", 53)
    six = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", 443, 0) + socket.inet_pton(socket.AF_INET6, "::1")
    assert watch.parse_address(six + bytes(4), sends=True) == ("::1", 443)
    assert watch.parse_address(six[:20], sends=True) is None
    unspecified = bytes(2) + inet[2:]
    assert watch.parse_address(unspecified, sends=True) == ("127.0.0.9", 53)
    assert watch.parse_address(unspecified, sends=False) is None  # connect: disconnects
    unix = struct.pack("=H", socket.AF_UNIX)
    assert watch.parse_address(unix + b"\0x11 \xff\n\0" + bytes(90), sends=False) == ("@x11 \\xff\\n", 0)
    for other in (unix + b"/tmp/socket", unix, inet[:7], b"", b"\2"):
        assert watch.parse_address(other, sends=True) is None
    inside = ("127.0.0.1", "127.255.0.3", "::1", "::ffff:127.0.0.1")
    assert [h for h in (*inside, "128.0.0.1", "::2", "1.127.0.1") if watch.is_loopback(h)] == list(inside)
