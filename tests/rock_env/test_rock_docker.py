"""What is particular to the Docker backend: how containers are made, images, rocklets, what is left after faults."""

import contextlib
import io
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from waiting import wait_until

import rock_env
from rock_env import (
    BackendUnavailable,
    FileError,
    LimitExceeded,
    LimitNotEnforceable,
    Limits,
    RockError,
    Sandbox,
    SandboxDead,
    SandboxSpec,
    SpecError,
    get_backend,
    wire,
)
from rock_env.audit import read_audit_log, verify_audit_log
from rock_env.docker import backend as docker_backend
from rock_env.docker import channel, engine, places, rootfs

_REPOSITORY = Path(rock_env.__file__).parents[1]
MIB = 1 << 20


@pytest.fixture(scope="module")
def docker(docker_daemon):
    return get_backend("docker")


@pytest.fixture(scope="module")
def box(docker):
    with Sandbox.start(SandboxSpec(backend="docker")) as sandbox:
        yield sandbox


def _api(docker):
    return docker._connect().api


def _containers(docker):
    return {container["Id"][:12] for container in _api(docker).containers(all=True)}


def _gone(docker, container, seconds=15):
    deadline = time.monotonic() + seconds
    while container in _containers(docker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# -- the container
def test_the_container_is_what_was_promised(docker, box):
    container = _api(docker).inspect_container(box.id.partition(":")[0])
    host = container["HostConfig"]
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"]
    assert not host["Privileged"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["Memory"] == host["MemorySwap"] == 256 * MIB
    assert (host["PidsLimit"], host["CpuQuota"] / host["CpuPeriod"]) == (64, 1.0)
    assert host["AutoRemove"]
    assert host["LogConfig"]["Type"] == "none"
    assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"])
    assert any(option.startswith("seccomp={") for option in host["SecurityOpt"])
    user = int(container["Config"]["User"].partition(":")[0])
    assert user > 1_000_000
    assert not container["Mounts"]


def test_two_sandboxes_have_different_users(docker):
    spec = SandboxSpec(backend="docker")
    with Sandbox.start(spec) as one, Sandbox.start(spec) as two:
        assert one.execute("id -u").output != two.execute("id -u").output
        assert len(_containers(docker) & {one.id.partition(":")[0], two.id.partition(":")[0]}) == 2


def test_the_rocklet_cannot_be_touched(box):
    """Its own user's programs can neither stop, end, trace nor read it, nor speak in its name."""
    before = box.execute("cut -d' ' -f22 /proc/1/stat").output
    box.execute("for s in KILL STOP INT TERM HUP QUIT SEGV TRAP CHLD WINCH; do kill -$s 1; done")
    for path in ("/proc/1/mem", "/proc/1/environ", "/proc/1/fd/0", "/proc/1/fd/1", "/proc/1/root/etc", "/proc/1/cwd"):
        assert "Permission denied" in box.execute(["ls", path] if "root" in path else ["cat", path]).output, path
    assert "Permission denied" in box.execute("echo forged > /proc/1/fd/1").output
    assert "Permission denied" in box.execute("echo -1000 > /proc/1/oom_score_adj").output
    assert box.execute("cut -d' ' -f22 /proc/1/stat").output == before
    assert box.execute("ls /proc/self/fd").output == "0\n1\n2\n3\n"  # 3: of ls itself


def test_only_what_is_writable_is_written_to(box):
    with pytest.raises(FileError) as caught:
        box.write_file("/etc/planted", "x")
    assert caught.value.errno_name == "EROFS"
    assert box.execute("ls -A /sys/kernel /sys/class /sys/devices | grep -v : | sort -u").output == "\n"


def test_a_call_whose_address_is_hidden_is_on_record_as_such(docker):
    """A program that makes its memory unreadable is recorded all the same: the rocklet has no privileges to look."""
    code = "import ctypes, socket\nctypes.CDLL(None).prctl(4, 0)\nprint(socket.socket().connect_ex(('127.0.0.1', 9)))"
    with Sandbox.start(SandboxSpec(backend="docker")) as sandbox:
        assert sandbox.execute(["python3", "-c", code]).output == "111\n"
    name = sandbox.id.partition(":")[2]
    calls = [r for r in read_audit_log(docker.audit_log) if r.get("sandbox") == name and r["event"] == "network_call"]
    assert [(r["syscall"], r["scope"]) for r in calls] == [("connect", "hidden")]
    assert verify_audit_log(docker.audit_log).ok


def test_a_sparse_file_does_not_make_a_snapshot_endless(box):
    box.execute("truncate -s 10G sparse")
    start = time.monotonic()
    with pytest.raises(LimitExceeded, match="holes"):
        box.snapshot()
    assert time.monotonic() - start < 60
    assert box.execute("rm sparse; echo on").output == "on\n"


def test_programs_that_take_every_process_and_all_the_cpu_are_still_ended(docker):
    """The rocklet shares both limits with them. A command that cannot start is told as by a shell."""
    limits = Limits(pids=24, cpus=0.2, memory_bytes=128 * MIB)
    with Sandbox.start(SandboxSpec(backend="docker", limits=limits)) as sandbox:
        session = sandbox.session()
        session.run("cd /tmp")
        hog = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        start = time.monotonic()
        result = session.run(f"(setsid python3 -c '{hog}' &) ; while :; do :; done", timeout=2)
        assert result.timed_out
        refused = [sandbox.execute("echo started"), sandbox.session("another").run("echo started")]
        assert {(r.exit_code, r.output) for r in refused} == {(254, "rock: fork: Resource temporarily unavailable\n")}
        assert sandbox.stats().pids == 24
        with sandbox.snapshot() as snapshot:
            assert snapshot.id
        sandbox.kill_all()
        assert time.monotonic() - start < 90
        # variables too, if the shell gets the CPU to hand them out in time
        assert session.run("pwd").output == "/tmp\n"
    records = read_audit_log(docker.audit_log)
    limits_hit = {r["limit"] for r in records if r.get("sandbox") == sandbox.id.partition(":")[2] and "limit" in r}
    assert limits_hit >= {"pids", "command_seconds"}


def test_a_deep_tree_is_copied(box):
    code = "import os\nfor i in range(300): os.mkdir('d'); os.chdir('d')\nopen('leaf', 'w').write('x')"
    assert box.execute(["python3", "-c", code]).exit_code == 0
    (fork,) = box.fork()
    with fork:
        assert fork.execute("find d -name leaf | wc -l; find d | wc -l").output == "1\n301\n"
    box.execute("rm -r d")


# -- what is refused
def test_limits_that_cannot_be_enforced_are_refused_by_name(docker, monkeypatch):
    """The daemon of a machine without these controls says so in its `info`; here the entry is taken away."""
    connected = docker._connect()
    for limit, entry in (("memory_bytes", "MemoryLimit"), ("pids", "PidsLimit"), ("cpus", "CpuCfsQuota")):
        with monkeypatch.context() as patch:
            patch.setitem(connected.info, entry, False)
            with pytest.raises(LimitNotEnforceable, match=rf"limits\.{limit}.*{entry}"):
                docker.create(SandboxSpec(backend="docker"))
            assert {"memory_bytes": "memory"}.get(limit, limit) not in docker.capabilities
            assert not docker.doctor()[limit]["ok"]
    before = _containers(docker)
    for limits, field in ((Limits(memory_bytes=8 * MIB), "memory_bytes"), (Limits(disk_bytes=64 << 10), "disk_bytes")):
        with pytest.raises(LimitNotEnforceable, match=field):
            docker.create(SandboxSpec(backend="docker", limits=limits))
    assert _containers(docker) == before


def test_a_container_that_is_not_confined_is_not_used():
    right = {
        "uid": 5, "groups": [5], "capabilities": 0, "no_new_privileges": True, "seccomp": True, "routes": [],
        "readonly_root": True, "first_process": True,
    }  # fmt: skip
    docker_backend._require_confined(right, 5)
    wrong = {
        "uid": 0, "groups": [5, 27], "capabilities": 1, "no_new_privileges": False, "seccomp": False,
        "routes": ["eth0"], "readonly_root": False, "first_process": False,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(LimitNotEnforceable, match=name):
            docker_backend._require_confined({**right, name: value}, 5)


def test_places_and_their_shares():
    spec = SandboxSpec(files={"in": "", "/data/sub/f": "", "/opt/made/": b"", "../app/other": ""}, workdir="/app")
    assert places.places_of(spec) == [
        "/app",
        "/tmp",
        "/home/agent",
        "/var/tmp",
        "/logs",
        "/tests",
        "/data/sub",
        "/opt/made",
    ]
    assert places.places_of(SandboxSpec(workdir="/tmp/work"))[0] == "/tmp"
    assert "/home/agent" not in places.places_of(SandboxSpec(workdir="/home"))
    for bad in (SandboxSpec(workdir="/"), SandboxSpec(files={"/marker": ""}), SandboxSpec(files={"/proc/x/y": ""})):
        with pytest.raises(SpecError):
            places.places_of(bad)
    shares = places.shares_of(places.places_of(spec), 64 * MIB)
    assert shares["/app"] == 32 * MIB
    assert sum(shares.values()) <= 64 * MIB
    assert set(places.shares_of(["/app", "/tmp"], None).values()) == {None}
    with pytest.raises(LimitNotEnforceable, match="disk_bytes=100000"):
        places.shares_of(["/app", "/tmp", "/x"], 100_000)


# -- images
def test_a_private_interpreter_gets_a_public_place():
    """One below /root, say, which no user of a sandbox may enter; its library goes to where loaders look."""
    tree = rootfs._Tree()
    tree.moved["/root/python"] = "/opt/python"
    assert tree.place("/root/python/lib/python3.13/os.py") == "/opt/python/lib/python3.13/os.py"
    assert tree.place("/root/python/lib/libpython3.13.so.1.0") == "/usr/lib/libpython3.13.so.1.0"
    assert tree.place("/root/python-other/x") == "/root/python-other/x"
    assert rootfs.find_python().version >= channel.LEAST_PYTHON


def test_an_image_with_too_old_a_python_is_refused():
    old = channel.BOOT.replace("(3, 9)", "(99, 0)")
    result = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert "found 3." in result.stderr


@contextlib.contextmanager
def _image_from(docker, files, changes=()):
    """An image like the one of this machine, with these files too; by name."""
    made = _api(docker).create_container(docker._images.prepare(None), command=["true"])["Id"]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _api(docker).put_archive(made, "/", stream.getvalue())
    name = f"ours:{secrets.token_hex(4)}"
    _api(docker).commit(made, repository="ours", tag=name.partition(":")[2], changes=list(changes))
    _api(docker).remove_container(made)
    yield name
    _api(docker).remove_image(name, noprune=True)


def test_an_image_keeps_what_it_has_in_writable_places(docker):
    """Its files are there, those in writable places are writable, its accounts are kept, its variables are set."""
    files = {
        "app/sub/of-the-image": b"content\n",
        "etc/passwd": b"root:x:0:0::/root:/bin/sh\nthe-images:x:77:77::/:/bin/sh",
    }
    with _image_from(docker, files, ["ENV COLOUR=green SIZE=7", "WORKDIR /elsewhere"]) as image:
        spec = SandboxSpec(backend="docker", image=image, files={"added": "x"}, env={"SIZE": "8"})
        with Sandbox.start(spec) as sandbox:
            seen = sandbox.execute("cat sub/of-the-image added; echo; id -un; grep -c the-images /etc/passwd; pwd")
            assert seen.output == "content\nx\nagent\n1\n/app\n"
            assert sandbox.session().run("echo $COLOUR $SIZE").output == "green 8\n"
            sandbox.execute("echo changed > sub/of-the-image")
            (fork,) = sandbox.fork()
            with fork:
                assert fork.execute("cat sub/of-the-image; echo $COLOUR").output == "changed\ngreen\n"
        with Sandbox.start(spec) as again:
            assert again.execute("cat sub/of-the-image").output == "content\n"


def test_an_image_whose_writable_places_do_not_fit_is_refused(docker):
    before = _containers(docker)
    with _image_from(docker, {"app/large": os.urandom(3 * MIB)}) as image, pytest.raises(LimitExceeded, match="disk"):
        Sandbox.start(SandboxSpec(backend="docker", image=image, limits=Limits(disk_bytes=2 * MIB)))
    assert _containers(docker) == before


@pytest.mark.slow
def test_an_image_that_is_a_directory(docker, tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    made = _api(docker).create_container(docker._images.prepare(None), command=["true"])["Id"]
    with subprocess.Popen(["tar", "-x", "-C", folder], stdin=subprocess.PIPE) as unpack:
        for piece in _api(docker).export(made):
            unpack.stdin.write(piece)
    _api(docker).remove_container(made)
    (folder / "app").mkdir()
    (folder / "app" / "of-the-image").write_text("content\n")
    with Sandbox.start(SandboxSpec(backend="docker", image=str(folder))) as sandbox:
        assert (
            sandbox.execute("cat of-the-image; echo changed > of-the-image; stat -c %U /usr").output
            == "content\nroot\n"
        )
    assert (folder / "app" / "of-the-image").read_text() == "content\n"
    shutil.rmtree(folder)


def test_images_that_cannot_be_used_are_told(docker, tmp_path):
    with pytest.raises(SpecError, match="docker pull"):
        Sandbox.start(SandboxSpec(backend="docker", image="no-such-image:1"))
    (tmp_path / "root/etc").mkdir(parents=True)
    before = _containers(docker)
    with pytest.raises(SpecError, match="python3"):
        Sandbox.start(SandboxSpec(backend="docker", image=str(tmp_path / "root")))
    assert _containers(docker) == before


# -- the channel
def _boot(tag, requests):
    """Run a rocklet as an ordinary process with `requests`; returns its frames."""
    data = channel.bundle()[8:].replace(sys.implementation.cache_tag.encode(), tag)
    data = len(data).to_bytes(8, "big") + data + b"".join(wire.encode(request) for request in requests)
    command = [sys.executable, "-I", "-S", "-c", channel.BOOT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(data)
        process.stdin.flush()
        reader, frames = wire.FrameReader(), []
        while len(frames) < len(requests):
            piece = process.stdout.read1(1 << 16)
            assert piece, process.stderr.read().decode()
            reader.feed(piece)
            while (frame := reader.next()) is not None:
                frames.append(frame[0])
        process.stdin.close()
        assert process.wait(60) == 0
    return frames


@pytest.mark.parametrize("tag", [sys.implementation.cache_tag.encode(), b"x" * len(sys.implementation.cache_tag)])
def test_a_rocklet_boots_from_its_channel(tag):
    """Also under a Python that does not know our compiled form; it ends with its input."""
    frames = _boot(tag, [{"rid": 1, "op": "stats", "id": "x"}, {"rid": 2, "op": "nonsense"}])
    assert frames[0]["rid"] == 1
    assert frames[0]["error"]["code"] == "not_found"
    assert frames[1]["error"]["code"] == "error"


def test_a_slow_start_is_not_disturbed_by_pings():
    """The modules come first, however long the container takes; then pings, as long as nothing else is said."""
    ours, theirs = socket.socketpair()
    one = channel.Channel(ours, ours, lambda event, fields: None, lambda reason, usage: None, 0.05)
    theirs.settimeout(0.4)
    with pytest.raises(TimeoutError):
        theirs.recv(1)
    sender = threading.Thread(target=one.boot)
    sender.start()
    received = b""
    while len(received) < len(channel.bundle()) + 30:
        received += theirs.recv(1 << 16)
    sender.join()
    assert received.startswith(channel.bundle())
    assert b'"op":"ping"' in received[len(channel.bundle()) :]
    one.close()
    theirs.close()


def test_many_threads_share_a_channel(box):
    from concurrent.futures import ThreadPoolExecutor

    def work(number):
        data = os.urandom(300_000)
        box.write_file(f"shared/{number}", data)
        return box.read_file(f"shared/{number}") == data and box.execute(f"echo {number}").output == f"{number}\n"

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(24)))
    box.execute("rm -r shared")


def test_nothing_of_an_ended_sandbox_stays_open(docker):
    """Neither of one that was stopped nor of one whose container has ended by itself."""
    Sandbox.start(SandboxSpec(backend="docker")).stop()
    before = _open_sockets(docker)
    threads = threading.active_count()
    for number in range(4):
        sandbox = Sandbox.start(SandboxSpec(backend="docker"))
        assert _open_sockets(docker) == before + 1
        if number % 2:
            _api(docker).kill(sandbox.id.partition(":")[0])
            assert _gone(docker, sandbox.id.partition(":")[0])
        sandbox.stop()
    wait_until(lambda: _open_sockets(docker) <= before and threading.active_count() <= threads, 60)
    assert _open_sockets(docker) == before
    assert threading.active_count() <= threads


def _open_sockets(docker):
    """Without the connections that the package keeps for later requests (at most 25)."""
    _api(docker).close()
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return count


# -- faults
_CLIENT = f"""
import sys; sys.path.insert(0, {str(_REPOSITORY)!r})
from rock_env import *
box = Sandbox.start(SandboxSpec(backend="docker"))
box.session().run("sleep 100 &")
print(box.id, get_backend("docker").audit_log, flush=True)
import time; time.sleep(60)
"""


def test_a_killed_client_leaves_no_container(docker, docker_daemon):
    env = {**os.environ, "DOCKER_HOST": docker_daemon.url}
    process = subprocess.Popen([sys.executable, "-c", _CLIENT], stdout=subprocess.PIPE, text=True, env=env)
    id, log = process.stdout.readline().split()
    container = id.partition(":")[0]
    assert container in _containers(docker)
    process.kill()
    process.wait()
    process.stdout.close()
    assert _gone(docker, container)
    assert verify_audit_log(log).ok


def test_a_killed_container_is_a_dead_sandbox(docker):
    sandbox = Sandbox.start(SandboxSpec(backend="docker"))
    container = sandbox.id.partition(":")[0]
    _api(docker).kill(container)
    with pytest.raises(SandboxDead, match="container has ended"):
        sandbox.execute("sleep 30")
    assert not sandbox.is_alive
    sandbox.stop()
    assert _gone(docker, container)
    ends = [r for r in read_audit_log(docker.audit_log) if r["event"] == "sandbox_ended"]
    assert ends[-1]["sandbox"] == sandbox.id.partition(":")[2]


def test_what_an_earlier_process_left_is_removed(docker):
    """A container whose owner has ended is swept; one of a live owner, or of another machine, is not."""
    mine = engine.owner()
    boot, namespace, *_ = mine.split("/")
    child = subprocess.Popen(["true"])
    child.wait()
    dead = f"{boot}/{namespace}/{child.pid}/1"
    labels = {"dead": dead, "mine": mine, "foreign": f"other/{namespace}/{child.pid}/1", "odd": "text"}
    image = docker._images.prepare(None)
    made = {
        name: _api(docker).create_container(image, command=["true"], labels={engine.LABEL: label})["Id"][:12]
        for name, label in labels.items()
    }
    try:
        assert docker._connect().sweep() == 1
        assert _containers(docker) & set(made.values()) == {made["mine"], made["foreign"], made["odd"]}
    finally:
        for name in ("mine", "foreign", "odd"):
            docker._connect().remove(made[name])


def test_no_daemon_and_no_package_are_told(monkeypatch):
    backend = docker_backend.DockerBackend("unix:///no/such/socket")
    with pytest.raises(BackendUnavailable, match="no daemon answers"):
        backend.create(SandboxSpec(backend="docker"))
    assert not backend.doctor()["backend"]["ok"]
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(BackendUnavailable, match="pip install"):
        docker_backend.DockerBackend().create(SandboxSpec(backend="docker"))


def test_no_log_no_container(docker_daemon, docker, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROCK_AUDIT_DIR", str(tmp_path / "file" / "below"))
    before = _containers(docker)
    with pytest.raises(BackendUnavailable, match="below"):
        docker_backend.DockerBackend(docker_daemon.url).create(SandboxSpec(backend="docker"))
    assert _containers(docker) == before


def _processes_of(user):
    """The machine's processes of a user id."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += [path.name] if f"Uid:\t{user}\t" in (path / "status").read_text() else []
    return found


@pytest.mark.slow
def test_a_daemon_that_dies_takes_its_sandboxes_along(monkeypatch):
    """The caller is told at once, and the container, whose input nobody closes then, ends by itself."""
    import docker_daemon

    if docker_daemon.missing():
        pytest.skip(docker_daemon.missing())
    daemon = docker_daemon.DockerDaemon()
    daemon.start()
    monkeypatch.setattr(docker_backend, "_SILENCE_SECONDS", 4.0)
    backend = docker_backend.DockerBackend(daemon.url)
    try:
        id = backend.create(SandboxSpec(backend="docker"))
        time.sleep(5)
        user = backend.execute(
            id, ["id", "-u"], 30, None, {}, 1000
        ).output.strip()  # it is not given up while we are here
        assert _processes_of(user)
        os.kill(daemon.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RockError):
            backend.execute(id, ["sleep", "60"], 60, None, {}, 1000)
        assert time.monotonic() - start < 40
        assert not backend.is_alive(id)
        with pytest.raises(BackendUnavailable):
            backend.create(SandboxSpec(backend="docker"))
        wait_until(lambda: not _processes_of(user), 60)
    finally:
        with contextlib.suppress(RockError):
            backend.close()
        daemon.stop()
    assert not daemon.directory.exists()


@pytest.mark.slow
def test_a_daemon_of_killed_tests_ends(docker_daemon):
    """The fixture's own: tests that are killed leave no daemon behind."""
    command = [sys.executable, str(_REPOSITORY / "tests/docker_daemon.py"), "sh", "-c", "echo $DOCKER_HOST; sleep 60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    folder = Path(process.stdout.readline().strip().removeprefix("unix://")).parent
    daemon = int((folder / "dockerd.pid").read_text())
    assert Path(f"/proc/{daemon}/comm").read_text() == "dockerd\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_until(lambda: not Path(f"/proc/{daemon}").exists(), 60)
    shutil.rmtree(folder)
