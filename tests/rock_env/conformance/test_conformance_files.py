"""What every backend does with files, and what it does not: no path, link or archive leads out of a sandbox."""

import os
import socket

import pytest

from rock_env import FileEntry, FileError, LimitExceeded, RockError, Sandbox, SandboxNotFound


def test_files_of_the_spec_are_there_before_the_first_command(start):
    files = {
        "a.txt": "text\n", "deep/er/b.bin": b"\x00\xff", "run.sh": FileEntry("#!/bin/sh\necho ran\n", 0o755),
        "/data/c": "c", "empty/": b"",
    }  # fmt: skip
    with start(files=files, workdir="/work/dir") as sandbox:
        seen = sandbox.execute("pwd; ls; ./run.sh; cat /data/c; stat -c %U . a.txt deep/er deep/er/b.bin /data/c")
        assert seen.output == ("/work/dir\na.txt\ndeep\nempty\nrun.sh\nran\ncagent\nagent\nagent\nagent\nagent\n")
        assert sandbox.read_file("deep/er/b.bin") == b"\x00\xff"
        times = sandbox.execute("stat -c %Y . a.txt deep deep/er/b.bin run.sh empty /data/c").output.split()
        assert set(times) == {"1735689600"}


def test_binary_files_and_directories(box):
    data = os.urandom(1_000_000)
    box.write_file("blob", data)
    assert box.read_file("/app/blob") == data
    assert box.execute("sha256sum < blob; wc -c < blob").output.endswith("1000000\n")
    box.write_files({"m/1": "1", "m/2": b"2", "m/d/": b"", "m/d/e/f": "f"})
    assert [(i.name, i.kind, i.size) for i in box.list_files("m") if i.kind == "file"] == [
        ("1", "file", 1),
        ("2", "file", 1),
    ]
    assert sorted(i.name for i in box.list_files("m", recursive=True)) == ["1", "2", "d", "d/e", "d/e/f"]
    box.write_file("mode", "x", mode=0o750)
    box.write_file("mode", "y")
    assert box.execute("stat -c %a mode; stat -c '%a %U' hello.txt").output == "750\n644 agent\n"


@pytest.mark.parametrize(
    ("path", "errno_name"),
    [("missing", "ENOENT"), ("/app", "EISDIR"), ("hello.txt/x", "ENOTDIR"), ("/dev/zero", "EINVAL")],
)
def test_read_errors_are_typed(box, path, errno_name):
    with pytest.raises(FileError) as caught:
        box.read_file(path)
    assert caught.value.errno_name == errno_name


def test_reading_is_bounded_and_does_not_block(box):
    box.execute("mkfifo fifo; head -c 1000 /dev/zero > big")
    with pytest.raises(FileError):
        box.read_file("fifo")
    with pytest.raises(FileError) as caught:
        box.read_file("big", max_bytes=999)
    assert caught.value.errno_name == "EFBIG"
    assert len(box.read_file("big", max_bytes=1000)) == 1000


def test_nothing_leads_out_of_the_sandbox(box, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("host secret")
    depth = "../" * 12
    box.execute(
        f"mkdir out; cd out; ln -s {secret} abs; ln -s {depth}{secret} rel; ln -s / root; ln -s {tmp_path} dir;"
        "ln -s /proc/1/root magic"
    )
    for path in (str(secret), f"{depth}{secret}", "out/abs", "out/rel", f"out/root{secret}", f"out/magic{secret}"):
        with pytest.raises(FileError):
            box.read_file(path)
    for path in ("out/dir/planted", f"{depth}{tmp_path}/planted", f"out/root{tmp_path}/planted"):
        try:
            box.write_file(path, "planted")
        except FileError:
            continue
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == "host secret"
    box.execute("echo original > target; ln -s target link")
    box.write_file("link", "new")
    assert box.execute("cat target; test -L link; echo $?").output == "original\n1\n"


def test_a_racing_link_never_wins(box, tmp_path):
    (tmp_path / "x").write_text("host")
    session = box.session("race")
    session.run("mkdir race; cd race; mkdir d; echo inside > d/x")
    swap = f"while :; do mv d e; ln -s {tmp_path} d; rm d; mv e d; done"
    session.run(f"({swap}) >/dev/null 2>&1 & swapper=$!")
    for _ in range(100):
        try:
            assert box.read_file("race/d/x") != b"host"
            box.write_file("race/d/y", "y")
        except FileError:
            continue
    session.run("kill $swapper")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_upload_and_download(box, tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "empty").mkdir()
    (source / "sub" / "data").write_bytes(bytes(range(256)))
    (source / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (source / "run.sh").chmod(0o755)
    (source / "link").symlink_to("run.sh")
    box.upload(source, "copy")
    assert box.execute("copy/run.sh; readlink copy/link; stat -c %a copy/run.sh; ls copy").output == (
        "ran\nrun.sh\n755\nempty\nlink\nrun.sh\nsub\n"
    )
    box.execute("ln -s /etc/passwd copy/out; ln -s ../../../etc copy/sub/up; mkfifo copy/p")
    left_out = box.download("copy", tmp_path / "back")
    assert sorted(left_out) == ["out", "p", "sub/up"]
    back = tmp_path / "back"
    assert (back / "sub" / "data").read_bytes() == bytes(range(256))
    assert os.readlink(back / "link") == "run.sh"
    assert (back / "run.sh").stat().st_mode & 0o777 == 0o755
    assert sorted(p.name for p in back.iterdir()) == ["empty", "link", "run.sh", "sub"]
    box.download("copy", back)  # again, over what is there
    box.download("copy/run.sh", back / "empty")
    assert (back / "empty" / "run.sh").read_text() == "#!/bin/sh\necho ran\n"
    (back / "run.sh").unlink()
    (back / "run.sh").mkdir()
    with pytest.raises(FileError, match=r"/run\.sh: Is a directory") as refused:
        box.download("copy", back)
    assert refused.value.errno_name == "EISDIR"
    with pytest.raises(FileError, match="File exists"):
        box.download("copy", back / "sub" / "data")
    assert sorted(p.name for p in back.iterdir()) == ["empty", "link", "run.sh", "sub"]


def test_links_of_a_copy_never_lead_out_of_it(box, tmp_path):
    """One whose text seems to stay inside, but goes up from where another one leads; then a directory in its place."""
    box.execute(
        "mkdir -p stairs/a/b/c stairs/x; ln -s ../../../x stairs/a/b/c/low; ln -s a/b/c/low/../.. stairs/out;"
        "ln -s a/b stairs/in"
    )
    outside = tmp_path / "outside"
    assert box.download("stairs", outside / "copy") == ["out"]
    assert os.readlink(outside / "copy" / "in") == "a/b"
    assert (outside / "copy" / "a" / "b" / "c" / "low").resolve() == outside / "copy" / "x"
    box.execute("rm stairs/out stairs/in; mkdir stairs/out stairs/in; echo evil | tee stairs/out/evil stairs/in/evil")
    (outside / "copy" / "out").symlink_to("..")  # as if it had been copied
    (outside / "none").mkdir()
    assert box.download("stairs", outside / "none" / ".." / "copy") == []
    assert sorted(path.name for path in outside.iterdir()) == ["copy", "none"]
    assert (outside / "copy" / "out" / "evil").read_text() == "evil\n"
    assert not (outside / "copy" / "a" / "b" / "evil").exists()


def test_an_archive_cannot_be_unpacked_outside(box):
    """An archive with `..` and absolute names, unpacked by the sandbox itself, reaches its own files only."""
    code = (
        "import io, tarfile; t = tarfile.open('evil.tar', 'w')\n"
        "for n in ('../../../../../tmp/up', '/tmp/absolute', 'fine'):\n"
        "    i = tarfile.TarInfo(n); i.size = 1; t.addfile(i, io.BytesIO(b'x'))\n"
        "t.close()"
    )
    result = box.execute(f'mkdir -p unpack && cd unpack && python3 -c "{code}" && tar -xPf evil.tar; ls')
    assert "fine" in result.output
    assert not os.path.exists("/tmp/up")
    assert not os.path.exists("/tmp/absolute")


def test_nothing_is_reachable_but_the_loopback(box):
    """A listener of ours on the host's loopback, and one inside: only the second answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = (
            "import socket, sys\n"
            f"print(socket.socket().connect_ex(('127.0.0.1', {port})))\n"
            "s = socket.create_server(('127.0.0.1', 0))\n"
            "print(socket.socket().connect_ex(s.getsockname()))\n"
            "print(sorted(n for _, n in socket.if_nameindex()))"
        )
        refused, own, interfaces = box.execute(["python3", "-c", code]).output.splitlines()
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert (refused, own) == ("111", "0")
    assert "'lo'" in interfaces
    assert box.execute("cat /proc/net/route | tail -n +2").output == ""


def test_processes_are_confined(box):
    status = box.execute("cat /proc/self/status").output
    fields = dict(line.split(":", 1) for line in status.splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"
    assert "0" not in fields["Uid"].split()
    written = "for d in / /etc /usr /usr/bin /usr/lib /sys /proc; do : > $d/planted && echo $d; done 2>/dev/null"
    assert box.execute(f"{written}; true").output == ""


def test_forks_are_independent_and_restore_everything(fresh):
    session = fresh.session()
    session.run("mkdir -p d/e; echo base > d/e/f; echo gone > gone; cd d; export A=1; x=2; f() { echo fun; }")
    fresh.execute(
        "mkdir a; echo 1 > a/x; ln a/x a/hard; ln -s x a/soft; chmod 640 a/x; touch -d @1000000000 a/x; mkfifo a/p;"
        "echo hidden > a/h; chmod 000 a/h; mkdir a/closed; echo z > a/closed/z; chmod 500 a/closed; echo t > /tmp/t"
    )
    (one,) = fresh.fork()
    with one:
        assert one.session().run("pwd; cat e/f; echo $A $x; f").output == "/app/d\nbase\n1 2\nfun\n"
        look = (
            "stat -c '%n %a %h %Y' a/x a/hard; stat -c '%n %a' a/h a/closed; cat a/hard a/closed/z /tmp/t;"
            "readlink a/soft; test -p a/p && echo fifo; stat -c %U d/e/f"
        )
        expected = "a/x 640 2 1000000000\na/hard 640 2 1000000000\na/h 0\na/closed 500\n1\nz\nt\nx\nfifo\nagent\n"
        assert fresh.execute(look).output == expected
        assert one.execute(look).output == expected
        one.session().run("echo one > e/f; rm ../gone; mv e moved")
        session.run("echo original > e/f")
        assert one.execute("cat d/moved/f; ls").output == "one\na\nd\n"
        assert fresh.execute("cat d/e/f; ls").output == "original\na\nd\ngone\n"


def test_a_snapshot_is_of_one_moment_and_outlives_its_sandbox(start):
    """Two files that a running process keeps equal (but for one step) are so in the snapshot; the process goes on."""
    with start(files={"f": "start"}) as sandbox:
        sandbox.session().run("(i=0; while :; do i=$((i+1)); echo $i > a; echo $i > b; done) >/dev/null 2>&1 &")
        sandbox.session().run("until test -s b; do :; done; sleep 0.1")
        snapshot = sandbox.snapshot()
        grown = 'old=$(cat b); until new=$(cat b); [ "${new:-0}" -gt "${old:-0}" ]; do :; done'
        assert sandbox.execute(grown).exit_code == 0
    with Sandbox.start(snapshot=snapshot) as copy:
        a, b = (copy.read_file(name).decode().strip() or "0" for name in "ab")
        assert b == "0" or a == "0" or 0 <= int(a) - int(b) <= 1
        assert copy.read_file("f") == b"start"
    snapshot.delete()
    snapshot.delete()
    with pytest.raises(SandboxNotFound):
        Sandbox.start(snapshot=snapshot)


def test_a_full_disk_is_a_typed_error(start):
    with start(limits={"disk_bytes": 4 << 20}) as sandbox:
        with pytest.raises(LimitExceeded):
            sandbox.write_file("big", bytes(5 << 20))
        assert sandbox.execute("ls -A").output == ""
        with pytest.raises(RockError):
            sandbox.write_file("/proc/planted", "x")
