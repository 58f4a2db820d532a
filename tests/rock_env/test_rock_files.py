"""Files: what is written is what is read, by the sandbox's user, and no path leads out of the sandbox."""

import contextlib
import os

import pytest

from rock_env import FileEntry, FileError, LimitExceeded, Limits, Sandbox, SandboxSpec, SpecError


def test_spec_files_are_there_before_the_first_command():
    files = {
        "a.txt": "text\n",
        "deep/er/b.bin": b"\x00\xff",
        "run.sh": FileEntry("#!/bin/sh\necho ran\n", 0o755),
        "/data/c": "c",
    }
    with Sandbox.start(SandboxSpec(files={**files, "empty/": b""}, workdir="/work/dir")) as sandbox:
        assert sandbox.execute(
            "pwd; ls; ./run.sh; cat /data/c; stat -c %U . a.txt deep/er deep/er/b.bin /data /data/c"
        ).output == ("/work/dir\na.txt\ndeep\nempty\nrun.sh\nran\ncagent\nagent\nagent\nagent\nagent\nagent\n")
        assert sandbox.read_file("deep/er/b.bin") == b"\x00\xff"
        times = sandbox.execute("stat -c %Y . a.txt deep deep/er/b.bin run.sh empty /home/agent / /data").output.split()
        assert set(times) == {"1735689600"}


def test_round_trip(box):
    data = os.urandom(1_000_000)
    box.write_file("blob", data)
    assert box.read_file("blob") == data
    assert box.read_file("/app/blob") == data
    assert box.execute("wc -c < blob").output == "1000000\n"
    box.write_file("text", "héllo")
    assert box.read_file("text").decode() == "héllo"
    box.write_files({"m/1": "1", "m/2": b"2", "m/d/": b""})
    assert [(i.name, i.kind) for i in box.list_files("m")] == [("1", "file"), ("2", "file"), ("d", "directory")]


def test_modes(box):
    box.write_file("mode", "x", mode=0o750)
    assert box.execute("stat -c %a mode").output == "750\n"
    box.write_file("mode", "y")
    assert box.execute("stat -c %a mode; stat -c %a hello.txt").output == "750\n644\n"


@pytest.mark.parametrize(
    ("path", "errno_name"),
    [("missing", "ENOENT"), ("/app", "EISDIR"), ("hello.txt/x", "ENOTDIR"), ("/dev/zero", "EINVAL")],
)
def test_read_errors_are_typed(box, path, errno_name):
    with pytest.raises(FileError) as caught:
        box.read_file(path)
    assert caught.value.errno_name == errno_name
    assert path in str(caught.value)


def test_read_does_not_block_on_a_fifo_and_is_bounded(box):
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
        f"ln -s {secret} abs; ln -s {depth}{secret} rel; ln -s / root; ln -s {tmp_path} dir; ln -s /proc/1/root magic"
    )
    for path in (str(secret), f"{depth}{secret}", "abs", "rel", f"root{secret}", f"magic{secret}", "dir/secret"):
        with pytest.raises(FileError):
            box.read_file(path)
    for path in ("dir/planted", f"{depth}{tmp_path}/planted", f"root{tmp_path}/planted"):
        try:
            box.write_file(path, "planted")
        except FileError:
            continue
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == "host secret"


def test_writing_over_a_link_replaces_the_link(box):
    box.execute("echo original > target; ln -s target link")
    box.write_file("link", "new")
    assert box.execute("cat target; test -L link; echo $?").output == "original\n1\n"


def test_a_racing_link_never_wins(fresh, tmp_path):
    (tmp_path / "x").write_text("host")
    session = fresh.session()
    session.run("mkdir d; echo inside > d/x")
    swap = f"while :; do mv d e; ln -s {tmp_path} d; rm d; mv e d; done"
    session.run(f"({swap}) >/dev/null 2>&1 &")
    for _ in range(300):
        with contextlib.suppress(FileError):
            assert fresh.read_file("d/x") == b"inside\n"
        with contextlib.suppress(FileError):
            fresh.write_file("d/y", "planted")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_read_only_parts_refuse_writes(box):
    with pytest.raises(FileError) as caught:
        box.write_file("/usr/bin/evil", "x")
    assert caught.value.errno_name == "EROFS"


def test_upload_and_download_trees(fresh, tmp_path):
    source = tmp_path / "in"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "a.sh").write_text("echo a")
    (source / "a.sh").chmod(0o755)
    (source / "sub" / "b").write_bytes(b"\x00" * 10)
    (source / "sub" / "link").symlink_to("b")
    fresh.upload(source, "tree")
    assert fresh.execute("find tree | sort; stat -c '%a %U' tree/a.sh; readlink tree/sub/link").output == (
        "tree\ntree/a.sh\ntree/sub\ntree/sub/b\ntree/sub/empty\ntree/sub/link\n755 agent\nb\n"
    )
    fresh.execute("ln -s /etc/passwd tree/out; ln -s ../../x tree/sub/up; mkfifo tree/pipe")
    left_out = fresh.download("tree", tmp_path / "back")
    assert sorted(left_out) == ["out", "pipe", "sub/up"]
    back = tmp_path / "back"
    assert sorted(str(p.relative_to(back)) for p in back.rglob("*")) == [
        "a.sh",
        "sub",
        "sub/b",
        "sub/empty",
        "sub/link",
    ]
    assert (back / "a.sh").stat().st_mode & 0o777 == 0o755
    fresh.upload(source / "a.sh", "/tmp/one")
    assert fresh.download("/tmp/one", tmp_path / "one") == []
    assert (tmp_path / "one").read_text() == "echo a"
    with pytest.raises(FileError):
        fresh.download("absent", tmp_path / "no")
    with pytest.raises(FileError):
        fresh.upload(tmp_path / "absent", "x")


def test_download_does_not_follow_a_link_that_the_sandbox_made(fresh, tmp_path):
    """A directory that is replaced by a link while it is downloaded, at worst, is refused."""
    outside = tmp_path / "outside"
    outside.mkdir()
    fresh.execute(f"mkdir t; ln -s {outside} t/evil")
    assert fresh.download("t", tmp_path / "copy") == ["evil"]
    assert list(outside.iterdir()) == []


def test_a_full_disk_is_a_typed_error_and_leaves_nothing_half_written():
    limits = Limits(disk_bytes=1 << 20)
    with Sandbox.start(SandboxSpec(limits=limits)) as sandbox:
        sandbox.write_file("kept", "old")
        for name in ("kept", "new"):
            with pytest.raises(LimitExceeded, match="disk_bytes"):
                sandbox.write_file(name, b"x" * (2 << 20))
        assert sandbox.read_file("kept") == b"old"
        assert [i.name for i in sandbox.list_files()] == ["kept"]
        sandbox.write_file("fits", b"x" * (1 << 19))
    with pytest.raises(LimitExceeded, match="disk_bytes"):
        Sandbox.start(SandboxSpec(files={"big": b"x" * (2 << 20)}, limits=limits))


@pytest.mark.parametrize("bad", ["", "a\0b", 5, None])
def test_bad_paths_are_refused(box, bad):
    with pytest.raises(SpecError, match="path"):
        box.read_file(bad)
    with pytest.raises((SpecError, AttributeError)):
        box.write_file(bad, "x")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"workdir": "relative"}, "workdir"),
        ({"network": "host"}, "network"),
        ({"env": {"A B": "1"}}, "env"),
        ({"env": {"A": 1}}, "env"),
        ({"files": {"a": 5}}, "files"),
        ({"files": {"": "x"}}, "files"),
        ({"limits": None}, "limits"),
        ({"readonly_binds": {"rel": "/x"}}, "readonly_binds"),
    ],
)
def test_bad_specs_name_the_field(arguments, field):
    with pytest.raises(SpecError, match=field):
        SandboxSpec(**arguments)


@pytest.mark.parametrize("name", ["memory_bytes", "pids", "cpus", "disk_bytes", "output_bytes", "command_seconds"])
def test_bad_limits_name_the_field(name):
    for bad in (-1, "1", float("nan")):
        with pytest.raises(SpecError, match=name):
            Limits(**{name: bad})


def test_missing_image_and_bind_are_typed(tmp_path):
    with pytest.raises(SpecError, match="image"):
        Sandbox.start(SandboxSpec(image=str(tmp_path / "none")))
    with pytest.raises(SpecError, match="readonly_binds"):
        Sandbox.start(SandboxSpec(readonly_binds={str(tmp_path / "none"): "/x"}))


def test_readonly_bind_of_a_private_directory(tmp_path):
    tools = tmp_path / "tools"  # below a directory that only its owner may search
    tools.mkdir()
    (tools / "tool").write_text("#!/bin/sh\necho tool\n")
    (tools / "tool").chmod(0o755)
    with Sandbox.start(SandboxSpec(readonly_binds={str(tools): "/opt/tools"})) as sandbox:
        assert sandbox.execute("/opt/tools/tool").output == "tool\n"
        assert "Read-only" in sandbox.execute("echo x > /opt/tools/y").output
    assert [p.name for p in tools.iterdir()] == ["tool"]


def test_image_directory(tmp_path):
    """A root file system of our own: the host's libraries copied, and its files protected from writes."""
    import re
    import shutil
    import subprocess

    root = tmp_path / "rootfs"
    (root / "bin").mkdir(parents=True)
    for program in ("bash", "ls", "cat", "id"):
        source = shutil.which(program, path="/usr/bin:/bin")
        shutil.copy(source, root / "bin" / program)
        for library in re.findall(r"(/\S+)", subprocess.run(["ldd", source], capture_output=True, text=True).stdout):
            target = root / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
    (root / "marker").write_text("image\n")
    with Sandbox.start(SandboxSpec(image=str(root), files={"f": "f"})) as sandbox:
        assert (
            sandbox.session()
            .run("cat /marker f; pwd; id -un; ls /usr 2>&1 | cat")
            .output.startswith("image\nf/app\nagent\n")
        )
        sandbox.write_file("/marker", "changed")
        assert sandbox.execute("cat /marker").output == "changed"
    assert (root / "marker").read_text() == "image\n"
    assert not (root / "app").exists()
