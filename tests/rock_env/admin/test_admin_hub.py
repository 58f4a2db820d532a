"""The admin's hub, over REST and by `rock hub`: tenants, digests, immutability, and what must not get in."""

import io
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from hub_tasks import write_environment, write_task
from test_rock_cli import Rock

from rock_env import Forbidden, QuotaExceeded, SpecError, hub
from rock_env.errors import EntryCorrupt, EntryNotFound, VersionTaken
from rock_env.harbor import TaskFile, read_tree
from rock_env.hub.remote import RemoteHub


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task, and another of the same name."""
    folder = tmp_path_factory.mktemp("tasks")
    return [write_task(folder / f"t{n}", instruction=f"Write answer {n}.") for n in range(2)]


@pytest.fixture(scope="module")
def ann(admin):
    return admin.new_tenant("hub-ann")


@pytest.fixture(scope="module")
def bob(admin):
    return admin.new_tenant("hub-bob")


def found(hub, query=""):
    """Entries of this module's tenants: those of others' tests may be public."""
    return [entry for entry in hub.search(query) if entry.owner.startswith("hub-")]


def test_a_tenants_versions(ann, tasks, tmp_path):
    mine = RemoteHub(ann)
    entry = mine.push(tasks[0], "answer@1.0+a")
    assert (entry.owner, entry.kind, entry.description) == ("hub-ann", "task", "Write answer 0.")
    assert mine.push(tasks[0], "answer@1.0+a") == entry
    with pytest.raises(VersionTaken, match="a version never changes"):
        mine.push(tasks[1], "answer@1.0+a")
    for reference in ("answer@1.0+a", f"answer@{entry.digest}", "hub-ann/answer@1.0+a"):
        assert mine.pull(reference, tmp_path / reference.replace("/", "_")) == entry
        assert read_tree(tmp_path / reference.replace("/", "_")) == read_tree(tasks[0])
    assert found(mine, "answer write") == found(mine) == [entry]
    assert entry in mine.list()
    assert found(mine, "nothing") == []
    with ann.start(hub.spec("answer@1.0+a", mine, remote=True)) as sandbox:
        assert sandbox.execute("cat hint.txt; ls /tests").output.startswith("the answer is 42\nls: cannot access")
    assert mine.delete("answer@1.0+a") == entry
    with pytest.raises(EntryNotFound):
        mine.fetch(f"answer@{entry.digest}")
    with pytest.raises(VersionTaken):
        mine.push(tasks[1], "answer@1.0+a")


def test_what_is_private_does_not_exist_for_others(admin, ann, bob, tasks):
    mine, theirs = RemoteHub(ann), RemoteHub(bob)
    secret, shown = mine.push(tasks[0], "secret@1"), mine.push(tasks[1], "shown@1", public=True)
    for reference in ("secret@1", "hub-ann/secret@1", f"hub-ann/secret@{secret.digest}", "shown@1", "hub-ann/shown@2"):
        for use in (theirs.fetch, theirs.delete):
            with pytest.raises(EntryNotFound):
                use(reference)
    assert found(theirs) == [shown]
    assert theirs.fetch(f"hub-ann/shown@{shown.digest}")[0] == shown
    with pytest.raises(EntryNotFound):
        theirs.delete("hub-ann/shown@1")
    # The same content of one's own is an entry of one's own, and what becomes of another's is no matter.
    own = theirs.push(tasks[0], "secret@1")
    assert (own.digest, own.owner) == (secret.digest, "hub-bob")
    mine.delete("secret@1")
    assert theirs.fetch("secret@1")[0] == own
    operator = RemoteHub(admin.client())
    assert {e.reference for e in operator.list()} >= {"hub-ann/shown@1", "hub-bob/secret@1"}
    assert operator.delete("hub-ann/shown@1") == shown
    assert found(theirs) == [own]


def test_the_hub_needs_a_tenants_key(admin, ann, tasks):
    RemoteHub(ann).push(tasks[0], "guarded@1")
    with ann.start() as box:
        token = ann.post(f"/v1/sandboxes/{box.id}/tokens", {})["token"]
        for use in (lambda h: h.list(), lambda h: h.fetch("guarded@1"), lambda h: h.push(tasks[0], "guarded@2")):
            with pytest.raises(Forbidden, match="an API key is needed"):
                use(RemoteHub(admin.client(token)))
    with admin.http("rk_0000000000000000_" + "A" * 43) as http:
        for method, at in (("GET", ""), ("GET", "/guarded/1"), ("PUT", "/guarded/1"), ("DELETE", "/guarded/1")):
            assert http.request(method, f"/v1/hub/entries{at}").status_code == 401


def _tar(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, settings in members:
            member = tarfile.TarInfo(name)
            for key, value in settings.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", "tar archive"),
        (b"nonsense" * 100, "tar archive"),
        (_tar(), "empty folder"),
        (_tar(("../../escaped", {"size": 1})), "path"),
        (_tar(("/escaped", {"size": 1})), "path"),
        (_tar(("a/./b", {"size": 1})), "path"),
        (_tar(("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})), "no links"),
        (_tar(("hard", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})), "neither a file"),
        (_tar(("device", {"type": tarfile.CHRTYPE})), "neither a file"),
        (_tar(("task.toml", {"size": 1})), "task.toml: expected TOML"),
    ],
)
def test_archives_that_are_no_entries_are_refused(admin, bob, archive, message):
    with admin.http(bob.token) as http:
        reply = http.put("/v1/hub/entries/evil/1", content=archive)
        assert reply.status_code == 422, reply.text
        assert message in reply.json()["error"]["message"]
        assert http.get("/v1/hub/entries/evil/1").status_code == 404
    assert not Path("/escaped").exists()


def test_a_sparse_archive_cannot_claim_more_than_it_holds(admin, bob):
    """200 TB in one kilobyte."""
    member = tarfile.TarInfo("huge")
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "huge",
        "GNU.sparse.realsize": str(200 << 40),
    }
    content = b"1\n0\n0\n".ljust(512, b"\0")
    member.size = len(content)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(content))
    with admin.http(bob.token) as http:
        reply = http.put("/v1/hub/entries/evil/1", content=buffer.getvalue())
        assert reply.status_code == 422
        assert "huge" in reply.json()["error"]["message"]


def test_of_concurrent_pushes_one_wins(ann, tasks):
    outcomes = []

    def push(folder):
        try:
            outcomes.append(RemoteHub(ann).push(folder, "raced@1").digest)
        except VersionTaken:
            outcomes.append(None)

    threads = [threading.Thread(target=push, args=(tasks[n % 2],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(outcomes) == 8
    assert {o for o in outcomes if o} == {RemoteHub(ann).fetch("raced@1")[0].digest}
    assert outcomes.count(None) == 4


def test_damage_on_the_admins_disk_is_told(admin, ann, tasks, tmp_path):
    entry = RemoteHub(ann).push(write_environment(tmp_path / "e", only="here"), "damaged@1")
    path = admin.directory / "hub" / "objects" / entry.digest.removeprefix("sha256:") / "files/environment/files/only"
    path.chmod(0o644)
    path.write_text("gone")
    with pytest.raises(EntryCorrupt, match=r"file environment/files/only: expected mode 644, 4 bytes, sha256:"):
        RemoteHub(ann).pull("damaged@1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_changes_on_the_way_is_noticed(ann, tasks, monkeypatch):
    """The client computes every digest again. There is no liar to ask, so what it unpacks is changed."""
    RemoteHub(ann).push(tasks[0], "sent@1")
    from rock_env.hub import remote

    unpack = remote.unpack
    monkeypatch.setattr(remote, "unpack", lambda data: {**unpack(data), "instruction.md": TaskFile(b"Do evil.\n")})
    with pytest.raises(EntryCorrupt, match=r"file instruction\.md: expected"):
        RemoteHub(ann).fetch("sent@1")


def test_a_tenant_may_keep_so_much(start_admin, tasks):
    small = start_admin(workers=0, hub_bytes=500)
    user = RemoteHub(small.new_tenant("small"))
    user.push(tasks[0], "a@1")
    with pytest.raises(QuotaExceeded, match="may keep 500 bytes"):
        user.push(tasks[1], "b@1")
    small.kill()
    small.start()
    assert RemoteHub(small.client(user._client.token)).fetch("a@1")[0].name == "a"
    small.stop()


def test_the_command(admin, tasks, tmp_path, monkeypatch):
    """`rock hub`, at an admin and in a folder; and `rock run hub://…`."""
    monkeypatch.chdir(tmp_path)
    user = admin.new_tenant("commander")
    at_admin = Rock(ROCK_URL=admin.url, ROCK_API_KEY=user.token)
    alone = Rock(ROCK_HUB=str(tmp_path / "hub"), ROCK_ADMIN_DIR=str(tmp_path), ROCK_AUDIT_DIR=str(tmp_path / "audit"))
    for rock, owner in ((at_admin, "commander"), (alone, "local")):
        pinned = rock("hub", "push", str(tasks[0]), "answer@1").strip()
        assert pinned.startswith("answer@sha256:")
        assert "a version never changes" in rock("hub", "push", str(tasks[1]), "answer@1", code=125)
        assert f"{owner}/answer@1" in rock("hub", "list")
        assert "Write answer 0." in rock("hub", "search", "answer", "write")
        assert "answer" not in rock("hub", "search", "nothing")
        rock("hub", "pull", pinned, owner)
        assert read_tree(tmp_path / owner) == read_tree(tasks[0])
        assert rock("run", "hub://answer@1", "--", "cat", "hint.txt") == "the answer is 42\n"
        greet = ("--", "sh", "-c", "echo $GREETING; exit 3")
        assert rock("run", "-e", "GREETING=hi", f"hub://{pinned}", *greet, code=3) == "hi\n"
        shell = [sys.executable, "-m", "rock_env.cli", "shell", "--image", "hub://answer@1"]
        done = subprocess.run(shell, input="./run.sh\nexit\n", capture_output=True, text=True, env=rock.env, timeout=90)
        assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
        assert "no hub entry answer@2" in rock("run", "hub://answer@2", "--", "true", code=125)
        assert "expected one after" in rock("run", "hub://answer@1", code=125)
        assert rock("hub", "delete", "answer@1") == f"{owner}/answer@1\n"
        assert "no hub entry" in rock("hub", "pull", "answer@1", code=125)
    rock("hub", "push", str(tasks[0]), "answer@2")
    rock("hub", "pull", "answer@2")
    assert (tmp_path / "answer" / "instruction.md").exists()
    with pytest.raises(SpecError, match="expected a new or an empty folder"):
        hub.LocalHub(tmp_path / "hub").pull("answer@2", "answer")
