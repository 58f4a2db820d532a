"""Isolation: no network, no host files, no other sandboxes, no privileges."""

import os
import socket

import pytest

from rock_env import Limits, Sandbox, SandboxSpec


def _python(sandbox, code, timeout=60):
    return sandbox.execute(["/usr/bin/python3", "-c", code], timeout=timeout)


def test_no_network_to_the_host(box):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(0.2)
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
        result = _python(box, code)
        assert result.exit_code == 1
        assert "Connection refused" in result.output
        with pytest.raises(TimeoutError):
            listener.accept()
        interfaces = box.execute("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '").output.split()
        assert interfaces == ["lo"]
        assert box.execute("tail -n +2 /proc/net/route").output == ""


def test_loopback_works_inside(box):
    code = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname());"
        "print(s.accept()[1][0])"
    )
    assert _python(box, code).output == "127.0.0.1\n"


@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_ALG", "AF_PACKET"])
def test_other_socket_families_are_refused(box, family):
    result = _python(
        box, f"import socket; socket.socket(socket.{family}, socket.SOCK_STREAM if 'VS' in '{family}' else 5)"
    )
    assert result.exit_code == 1
    assert "Address family not supported" in result.output


def test_abstract_sockets_of_the_host_are_out_of_reach(box):
    name = f"\0rock-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        result = _python(box, f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})")
        assert "Connection refused" in result.output


def test_host_files_are_invisible(box, tmp_path):
    (tmp_path / "secret").write_text("secret")
    home = os.path.expanduser("~")
    for path in (
        tmp_path,
        tmp_path / "secret",
        f"{home}/.bashrc",
        os.getcwd(),
        "/etc/shadow",
        "/etc/ssh",
        "/var/lib",
        "/boot",
    ):
        assert box.execute(["test", "-e", str(path)]).exit_code == 1, path
    expected = {
        "app",
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "mnt",
        "opt",
        "proc",
        "root",
        "run",
        "sbin",
        "srv",
        "sys",
        "tmp",
    }
    assert {i.name for i in box.list_files("/")} - {"lib32", "lib64"} == expected | {"usr", "var"}
    assert box.execute("cat /etc/passwd | wc -l; cat /etc/hostname").output == "3\nsandbox\n"


def test_mount_table_does_not_name_host_paths(box):
    table = box.execute("cat /proc/self/mountinfo").output
    for path in ("/tmp/rock", os.path.expanduser("~"), os.getcwd()):
        assert path not in table


def test_no_descriptor_is_inherited(box):
    listing = "for f in /proc/*/fd/*; do readlink $f; done | grep -v pipe: | sort -u"
    assert set(box.execute(listing).output.split()) <= {"/dev/null", "/proc/1/fd"}
    assert set(box.session("fds").run(listing).output.split()) <= {"/dev/null", "/proc/1/fd"}
    # fd 0 is the read end of /dev/null, 1 and 2 the output; ls opens one more
    assert box.session("fds").run("ls /proc/self/fd | wc -l").output.strip() in ("4", "5")


def test_other_processes_are_invisible(box):
    with Sandbox.start() as other:
        other.session().run("sleep 55 &")
        for sandbox in (box, other):
            names = sandbox.execute("cat /proc/[0-9]*/comm | sort -u").output.split()
            assert set(names) <= {"bash", "cat", "sleep", "sort"}
        assert "sleep" not in box.execute("cat /proc/[0-9]*/cmdline").output
        assert box.execute("kill -0 1").exit_code == 0  # its own first process
        assert len(box.execute("ls /proc | grep '^[0-9]'").output.split()) < 12


def test_sandboxes_have_different_users_and_separate_files(box):
    with Sandbox.start() as other:
        other.write_file("/tmp/mine", "x")
        other.execute("mkdir /dev/shm/d")
        assert box.execute("ls /tmp /dev/shm").output.find("mine") < 0
        if os.geteuid() == 0:
            owners = {os.fstat(_host_root(sandbox)).st_uid for sandbox in (box, other)}
            assert len(owners) == 2
            assert 0 not in owners


def _host_root(sandbox):
    """A descriptor of the work directory of a sandbox, by way of the host's view of one of its processes."""
    import subprocess

    marker = f"sleep 3.{id(sandbox)}"
    sandbox.session("marker").run(f"{marker} &")
    pid = subprocess.run(["pgrep", "-f", f"^{marker}"], capture_output=True, text=True).stdout.split()[0]
    return os.open(f"/proc/{pid}/cwd", os.O_RDONLY)


def test_no_capabilities_and_no_way_back(box):
    for run in (box.session("caps").run, box.execute):
        status = dict(
            line.split(":\t")
            for line in run("grep -E '^(Cap|NoNew|Seccomp:|Uid)' /proc/self/status").output.splitlines()
        )
        assert {status[k] for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert set(status["Uid"].split()) == {"1000"}
    first = box.execute("grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/1/status").output
    assert first == "CapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n"


@pytest.mark.parametrize(
    "command",
    [
        "unshare -U true",
        "unshare -n true",
        "mount -t tmpfs x /tmp",
        "chroot / true",
        "mknod /tmp/n c 1 3",
        "hostname evil",
        "date -s 2020-01-01",
        "dmesg",
        "test $(nice -n -5 nice) -lt $(nice)",
        "echo 1 > /proc/sys/vm/drop_caches",
        "echo b > /proc/sysrq-trigger",
        "echo x > /sys/kernel/x",
        "cat /proc/kcore",
        "chown root /app/hello.txt",
        "su -c true",
    ],
)
def test_privileged_acts_fail(box, command):
    assert box.execute(f"{{ {command}; }} >/dev/null 2>&1").exit_code != 0


def test_system_calls_are_filtered(box):
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
numbers = {"x86_64": (101, 321, 425, 272, 250, 56), "aarch64": (117, 280, 425, 97, 219, 220)}[os.uname().machine]
for number, argument in zip(numbers, (0, 0, 1, 0x20000, 0, 0x10000000 | 17)):
    print(libc.syscall(number, argument, 0, 0, 0, 0), ctypes.get_errno())
"""
    assert _python(box, code).output == "-1 1\n" * 6


def test_setuid_programs_gain_nothing(box):
    options = [line.split()[3] for line in box.execute("cat /proc/mounts").output.splitlines()]
    assert options
    assert all("nosuid" in option.split(",") for option in options)


def test_the_first_process_cannot_be_killed_from_inside(box):
    box.execute("kill -9 1; kill -15 1; kill -2 1; kill -17 1")
    assert box.execute("cat /proc/1/comm").output == "cat\n"


def test_suicide_is_noticed_and_typed():
    """The one process that holds a sandbox up can be ended from inside only by exhausting it: the client is told."""
    from rock_env import SandboxDead

    with Sandbox.start(SandboxSpec(limits=Limits(lifetime_seconds=0.2))) as sandbox:
        with pytest.raises(SandboxDead):
            for _ in range(1000):
                sandbox.execute("true")
        sandbox.stop()
        with pytest.raises(SandboxDead):
            sandbox.read_file("x")
