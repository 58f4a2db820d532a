"""The hub in a folder: versions never change, content is verified, nothing escapes, and kills leave it whole."""

import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_tasks import write_environment, write_task

import rock_env
from rock_env import BackendUnavailable, QuotaExceeded, SpecError, hub
from rock_env.errors import EntryCorrupt, EntryNotFound, VersionTaken
from rock_env.harbor import TaskFile, TaskFormatError, read_tree
from rock_env.hub import LocalHub, Reference

_REPOSITORY = str(Path(rock_env.__file__).parents[1])
_PUSH = """
import sys
from rock_env.errors import VersionTaken
from rock_env.hub import LocalHub
store = LocalHub(sys.argv[1])
print("ready", flush=True)
for reference in sys.argv[3:]:
    try:
        print(store.push(sys.argv[2], reference).digest, flush=True)
    except VersionTaken:
        print("taken", flush=True)
"""


def pusher(store, folder, *references):
    """A process that pushes a folder, again and again."""
    command = [sys.executable, "-c", _PUSH, str(store.folder), str(folder), *references]
    env = {**os.environ, "PYTHONPATH": _REPOSITORY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def store(tmp_path):
    return LocalHub(tmp_path / "hub")


@pytest.fixture
def task(tmp_path):
    return write_task(tmp_path / "task")


def object_of(store, entry):
    return store.folder / "objects" / entry.digest.removeprefix("sha256:")


# -- versions and digests


def test_what_was_pushed_is_pulled(store, task, tmp_path):
    entry = store.push(task, "answer@1.0")
    assert (entry.reference, entry.kind, entry.public, entry.files) == ("local/answer@1.0", "task", False, 7)
    assert entry.description == "Write the answer that hint.txt gives into answer.txt."
    assert entry.size == sum(len(file.content) for file in read_tree(task).values())
    for reference in ("answer@1.0", "hub://answer@1.0", "local/answer@1.0", f"answer@{entry.digest}"):
        target = tmp_path / "pulled" / reference.replace("/", "_") / "here"
        assert store.pull(reference, target) == entry
        assert read_tree(target) == read_tree(task)  # modes as well
    environment = store.push(write_environment(tmp_path / "environment"), "bare@1")
    assert (environment.kind, environment.description) == ("environment", "")


def test_a_digest_is_of_paths_modes_and_bytes_alone(store, task, tmp_path):
    """As documented: computed here by other means."""
    rows = []
    for path in sorted((p for p in task.rglob("*") if p.is_file()), key=lambda p: p.relative_to(task).as_posix()):
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        rows.append([path.relative_to(task).as_posix(), path.stat().st_mode & 0o777, len(data), sha256])
    expected = "sha256:" + hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
    assert store.push(task, "a@1").digest == expected
    other = write_task(tmp_path / "elsewhere")
    os.utime(other / "task.toml", (1, 1))
    (other / "environment" / "empty").mkdir()
    assert store.push(other, "b@1").digest == expected
    seen = {expected}
    (other / "environment" / "files" / "run.sh").chmod(0o700)
    seen.add(store.push(other, "b@2").digest)
    (other / "environment" / "files" / "hint.txt").write_text("the answer is 43\n")
    seen.add(store.push(other, "b@3").digest)
    os.rename(other / "tests" / "secret.txt", other / "tests" / "secret")
    seen.add(store.push(other, "b@4").digest)
    assert len(seen) == 4


def test_a_version_never_changes(store, task):
    first = store.push(task, "answer@1")
    assert store.push(task, "answer@1") == first
    (task / "instruction.md").write_text("Something else.\n")
    with pytest.raises(VersionTaken, match=f"answer@1 is {first.digest}.*choose another for sha256:"):
        store.push(task, "answer@1")
    assert store.fetch("answer@1")[1]["instruction.md"].content.startswith(b"Write")
    second = store.push(task, "answer@2")
    assert [e.digest for e in store.list()] == [first.digest, second.digest]
    store.delete("answer@1")
    with pytest.raises(EntryNotFound, match="no hub entry answer@1"):
        store.fetch("answer@1")
    with pytest.raises(VersionTaken, match="was deleted"):
        store.push(task, "answer@1")
    (task / "instruction.md").write_bytes(b"Write the answer that hint.txt gives into answer.txt.\n")
    assert store.push(task, "answer@1").digest == first.digest
    assert store.fetch(f"answer@{first.digest}")[0].version == "1"


def test_deleting_leaves_what_others_still_name(store, task):
    entry = store.push(task, "a@1")
    assert store.push(task, "b@1").digest == entry.digest
    store.delete("a@1")
    assert store.fetch("b@1")[0].digest == entry.digest
    assert object_of(store, entry).is_dir()
    store.delete(f"b@{entry.digest}")
    assert list((store.folder / "objects").iterdir()) == []
    assert store.list() == []
    with pytest.raises(EntryNotFound):
        store.delete("b@1")


def test_search_looks_for_every_word(store, task, tmp_path):
    store.push(task, "answer@1")
    store.push(task, "answer@2")
    store.push(write_environment(tmp_path / "e"), "tools@1")
    assert [e.reference for e in store.search("HINT.txt task")] == ["local/answer@1", "local/answer@2"]
    assert [e.reference for e in store.search("environment")] == ["local/tools@1"]
    assert [e.reference for e in store.search("answer@2")] == ["local/answer@2"]
    assert store.search("hint nothing") == []
    assert len(store.list()) == 3


def test_owners_see_their_own_and_what_is_public(tmp_path, task):
    ann, bob = (LocalHub(tmp_path / "hub", name) for name in ("ann", "bob"))
    mine = ann.push(task, "answer@1")
    for reference in ("answer@1", "ann/answer@1", f"ann/answer@{mine.digest}"):
        with pytest.raises(EntryNotFound):
            bob.fetch(reference)
    assert bob.list() == []
    assert ann.push(task, "answer@1", public=True).public
    assert not mine.public
    assert ann.push(task, "answer@1").public  # what was published stays so
    assert [e.reference for e in bob.list()] == ["ann/answer@1"]
    assert bob.fetch(f"ann/answer@{mine.digest}")[0].owner == "ann"
    with pytest.raises(EntryNotFound):  # never in place of a missing one of one's own
        bob.fetch("answer@1")
    with pytest.raises(EntryNotFound, match="of bob"):
        bob.delete("ann/answer@1")
    operator = LocalHub(tmp_path / "hub", "root", is_operator=True)
    assert operator.delete("ann/answer@1").owner == "ann"
    assert bob.list() == []


def test_an_owner_has_a_quota(tmp_path, task):
    small = LocalHub(tmp_path / "hub", "ann", max_bytes=500)
    small.push(task, "a@1")
    with pytest.raises(QuotaExceeded, match=r"500 bytes; 394 are used, 394 asked"):
        small.push(task, "b@1")
    small.push(task, "a@1")
    LocalHub(tmp_path / "hub", "bob", max_bytes=500).push(task, "b@1")
    small.delete("a@1")
    small.push(task, "b@1")


# -- damage


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _link(path):
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(copy)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("files/environment/Dockerfile", _flip),
        ("files/tests/test.sh", lambda path: path.unlink()),
        ("files/tests/secret.txt", lambda path: path.write_bytes(path.read_bytes() + b"more")),
        ("files/environment/files/hint.txt", _link),
        ("manifest.json", _flip),
        ("manifest.json", lambda path: path.unlink()),
    ],
)
def test_damage_is_found_and_named_and_healed_by_the_same_push(store, task, tmp_path, name, damage):
    entry = store.push(task, "answer@1")
    path = object_of(store, entry) / name
    whole = path.read_bytes()
    path.chmod(0o644)
    damage(path)
    with pytest.raises(EntryCorrupt) as caught:
        store.pull("answer@1", tmp_path / "out")
    message = str(caught.value)
    if name == "manifest.json":
        assert "its manifest" in message
        assert entry.digest in message
    else:
        assert f"file {name.removeprefix('files/')}: expected" in message
        assert hashlib.sha256(whole).hexdigest() in message
        if damage is _flip:
            assert hashlib.sha256(path.read_bytes()).hexdigest() in message
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []
    with pytest.raises(EntryCorrupt):
        hub.spec("answer@1", store)
    assert store.push(task, "answer@1") == entry
    assert store.fetch("answer@1")[0] == entry


def test_a_damaged_record_is_named(store, task):
    store.push(task, "answer@1")
    record = store.folder / "owners" / "local" / "answer" / "1.json"
    record.write_text("{}")
    with pytest.raises(EntryCorrupt, match=r"answer/1\.json: expected JSON"):
        store.fetch("answer@1")


# -- what must not get in or out


@pytest.mark.parametrize(
    "path",
    ["../out", "/out", "a/../../out", "a//b", "./a", "a/.", "a/..", "", "a\nb", "a\x1b[0m", "\udcff", "x" * 256,
     "/".join(["d" * 200] * 6), "task.toml/below"],
)  # fmt: skip
def test_paths_that_could_lead_elsewhere_are_refused(store, task, path):
    tree = {**read_tree(task), path: TaskFile(b"evil")}
    with pytest.raises(SpecError, match="path"):
        store.publish(tree, "answer", "1")
    assert store.list() == []


@pytest.mark.parametrize(
    "reference",
    ["answer", "answer@", "@1", "../answer@1", "answer@../1", "a/b/answer@1", "answer@1/../../x", "/answer@1", ".a@1",
     "answer@sha256:12", "answer@.1", "answer@1\n", "*@1", "answer@*", None, 7],
)  # fmt: skip
def test_references_are_names_and_no_paths(store, task, reference):
    for use in (store.fetch, store.delete, Reference.parse, lambda r: store.push(task, r)):
        with pytest.raises(SpecError, match=r"expected \[OWNER/\]NAME@VERSION"):
            use(reference)


def test_only_files_of_a_valid_task_get_in(store, task, tmp_path):
    with pytest.raises(SpecError, match="push: expected NAME@VERSION"):
        store.push(task, "bob/answer@1")
    (task / "link").symlink_to("/etc/passwd")
    with pytest.raises(TaskFormatError, match=r"^link: expected a regular file"):
        store.push(task, "answer@1")
    (task / "link").unlink()
    os.mkfifo(task / "tests" / "pipe")
    with pytest.raises(TaskFormatError, match=r"^tests/pipe: expected a regular file"):
        store.push(task, "answer@1")
    (task / "tests" / "pipe").unlink()
    (task / "tests" / "secret.txt").chmod(0o4755)
    with pytest.raises(TaskFormatError, match="mode"):
        store.push(task, "answer@1")
    (task / "tests" / "secret.txt").chmod(0o644)
    for name in ("task.toml", "instruction.md", "tests/test.sh", "environment/Dockerfile"):
        whole = (task / name).read_bytes()
        (task / name).unlink()
        with pytest.raises(TaskFormatError, match=f"^{name}: expected"):
            store.push(task, "answer@1")
        (task / name).write_bytes(whole)
    for text in ("docker_image = '/etc'", "docker_image = '../x'", "docker_image = 3", "backend = 3", "cpus = 1e400"):
        (task / "task.toml").write_text(f"[environment]\n{text}\n")
        with pytest.raises(TaskFormatError, match=r"^task\.toml: environment\."):
            store.push(task, "answer@1")
    (task / "task.toml").write_text("a = " + "[" * 5000)
    with pytest.raises(TaskFormatError, match=r"^task\.toml: expected TOML"):
        store.push(task, "answer@1")
    (task / "task.toml").write_text("")
    (task / "environment" / "Dockerfile").write_text("FROM x\nENV 1BAD=x\n")
    with pytest.raises(SpecError, match="env: expected names"):
        store.push(task, "answer@1")
    with pytest.raises(TaskFormatError, match="expected a folder"):
        store.push(tmp_path / "none", "answer@1")
    assert store.list() == []


def test_a_pull_never_writes_over_or_through_anything(store, task, tmp_path):
    store.push(task, "answer@1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    for name in ("full", "link", "file"):
        with pytest.raises(SpecError, match="expected a new or an empty folder"):
            store.pull("answer@1", tmp_path / name)
    assert list((tmp_path / "empty").iterdir()) == []
    store.pull("answer@1", tmp_path / "empty")
    assert read_tree(tmp_path / "empty") == read_tree(task)


def test_a_place_that_cannot_be_used_is_named(tmp_path, task):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendUnavailable, match=r"file: Not a directory"):
        LocalHub(tmp_path / "file").push(task, "answer@1")


# -- many at once, and kills


def test_of_many_pushes_of_one_version_one_wins(store, tmp_path):
    folders = [write_task(tmp_path / f"t{n}", instruction=f"Task {n}.") for n in range(4)]
    versions = [f"answer@{n}" for n in range(5)]
    processes = [pusher(store, folder, *versions) for folder in folders]
    outcomes = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    for number, version in enumerate(versions):
        won = [outcome[number] for outcome in outcomes if outcome[number] != "taken"]
        assert len(won) == 1
        assert store.fetch(version)[0].digest == won[0]
    assert list((store.folder / "tmp").iterdir()) == []


def test_pushes_pulls_and_deletions_side_by_side(store, task):
    """Every outcome is a whole entry, or that there is none."""
    problems = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(12):
            reference = f"n{rng.randrange(2)}@1"
            try:
                action = rng.choice((lambda r: store.push(task, r), store.fetch, store.delete, lambda r: store.list()))
                action(reference)
            except EntryNotFound:
                pass
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert problems == []
    assert list((store.folder / "tmp").iterdir()) == []
    for entry in store.list():
        store.fetch(entry.reference)


def test_a_push_killed_before_it_is_published_leaves_nothing(store, task):
    """It has written everything and waits for the lock, which this test holds."""
    store.push(task, "other@1")
    (task / "instruction.md").write_text("Another.\n")
    with open(store.folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = pusher(store, task, "answer@1")
        deadline = time.monotonic() + 60
        while not list((store.folder / "tmp").glob("*/object/manifest.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
    assert [e.reference for e in store.list()] == ["local/other@1"]
    assert len(list((store.folder / "tmp").iterdir())) == 1
    assert store.push(task, "answer@1").version == "1"
    assert list((store.folder / "tmp").iterdir()) == []
    store.fetch("answer@1")


def test_kills_at_any_moment_leave_the_hub_whole(store, tmp_path):
    folder = write_task(tmp_path / "t", **{f"f{n}.txt": str(n) * 1000 for n in range(30)})
    rng = random.Random(0)
    for number in range(8):
        references = [f"answer@{number}.{part}" for part in range(50)]
        process = pusher(store, folder, *references)
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        said = process.communicate(timeout=60)[0].split()
        for reference, digest in zip(references, said, strict=False):  # what was said to be published is
            assert store.fetch(reference)[0].digest == digest
        for entry in store.list():
            assert len(store.fetch(entry.reference)[1]) == entry.files
    store.push(folder, "answer@last")
    assert list((store.folder / "tmp").iterdir()) == []
    for entry in store.list():
        store.delete(entry.reference)
    assert list((store.folder / "objects").iterdir()) == []


# -- what starts from it


def test_a_sandbox_starts_from_an_entry(store, task, monkeypatch):
    entry = store.push(task, "answer@1")
    with hub.start(f"answer@{entry.digest}", store) as sandbox:
        assert sandbox.execute("pwd; cat hint.txt; ./run.sh; echo $GREETING").output == (
            "/app\nthe answer is 42\nran\nhello\n"
        )
        assert sandbox.execute("ls /tests /app/tests").exit_code == 2
        assert sandbox.spec.limits.memory_bytes == 128 << 20
        assert sandbox.spec.limits.disk_bytes == 32 << 20
    monkeypatch.setenv("ROCK_HUB", str(store.folder))
    assert hub.spec("hub://answer@1").env == {"GREETING": "hello"}


def test_what_an_entry_asks_for_is_given_or_refused(store, tmp_path):
    folder = write_environment(tmp_path / "e")
    (folder / "task.toml").write_text("[environment]\ndocker_image = 'team/tools:2'\ncpus = 0.5\n")
    store.push(folder, "tools@1")
    with pytest.raises(SpecError, match="image: 'team/tools:2' stands for no root file system here"):
        hub.start("tools@1", store)
    assert hub.spec("tools@1", store, images={"team/tools:2": "/srv/tools"}).image == "/srv/tools"
    assert hub.spec("tools@1", store, backend="docker").image == "team/tools:2"
    assert hub.spec("tools@1", store, remote=True).image == "team/tools:2"
    assert hub.spec("tools@1", store, remote=True).limits.cpus == 0.5
    (folder / "task.toml").write_text("[environment]\nbackend = 'docker'\n[metadata]\nprograms = ['no-such-program']\n")
    store.push(folder, "tools@2")
    assert hub.spec("tools@2", store, remote=True).backend == "docker"
    with pytest.raises(BackendUnavailable, match="no-such-program"):
        hub.spec("tools@2", store)
