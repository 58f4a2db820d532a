"""What the soak does in sandboxes, and what must come of it: each tenant keeps a model of its sandboxes.

A request that a fault cut off may or may not have been acted on. So the model holds, for each file and variable, every
value that it may have; an answer that is none of them is wrong, and one that is leaves only itself.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from rock_env import FileError, Limits, NetworkPolicy, NetworkRule, RockError, Sandbox, SandboxSpec
from rock_env.errors import BackendUnavailable, NoCapacity, NotReady, RequestTimeout, SandboxDead, SandboxNotFound
from rock_env.remote import Client

MIB = 1 << 20
LIMITS = Limits(memory_bytes=96 * MIB, pids=48, disk_bytes=8 * MIB, command_seconds=120.0, lifetime_seconds=7200.0)
INTERRUPTIONS = (BackendUnavailable, NoCapacity, NotReady, RequestTimeout, SandboxDead, SandboxNotFound)
MAX_BOXES = 5
MAX_EGRESS = 300  # requests to our own listener, by each tenant
_MEMORY_BOMB = "python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 20))'"
_FORK_BOMB = "bomb() { bomb | bomb & bomb; }; bomb 2>/dev/null"
_GET = (
    "import urllib.request as u; o = u.build_opener(u.ProxyHandler({{'http': 'http://127.0.0.1:3128'}}));"
    " print(o.open('http://127.0.0.2:{port}/{word}', timeout=30).read().decode())"
)
_ECHO = (
    "import socket; s = socket.create_server(('127.0.0.1', {port})); print('ready', flush=True); c = s.accept()[0]\n"
    "while data := c.recv(65536): c.sendall(data)"
)


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


class Wrong(Exception):
    """A result that no order of events explains."""


@dataclass
class Box:
    """A live sandbox as it should be."""

    sandbox: Sandbox
    worker: str
    since: float
    files: dict[str, set[bytes | None]] = field(default_factory=dict)
    variable: set[str] = field(default_factory=lambda: {""})
    is_bombed: bool = False  # a fork bomb may not be over yet
    is_stopping: bool = False  # we have asked for its end, and may not have heard the answer


@dataclass
class Fault:
    kind: str
    worker: str  # "": the admin
    begun: float = field(default_factory=time.monotonic)
    over: float = float("inf")  # when all workers were up again


class Faults:
    """What was done to whom, and when; to tell an error that it explains from one that nothing does."""

    GRACE = 5.0

    def __init__(self) -> None:
        self.log: list[Fault] = []

    def explain(self, since: float, worker: str | None = None) -> bool:
        """Whether a fault (of this worker) was in effect at any time since then."""
        return any(f.over + self.GRACE >= since and worker in (None, f.worker) for f in list(self.log))


class Tenant:
    """One thread's share of the soak. `run` returns at `deadline`; then everything of it has ended."""

    def __init__(self, number: int, seed: int, client: Client, faults: Faults, port: int) -> None:
        self.number = number
        self.random = random.Random(f"{seed}-{number}")
        self.client = client
        self.faults = faults
        self.port = port
        self.boxes: list[Box] = []
        self.counts: Counter[str] = Counter()  # "operation: outcome"
        self.wrong: list[str] = []
        self.slowest = 0.0
        self.egress = 0

    def run(self, deadline: float) -> None:
        actions = (
            [self.execute, self.session, self.exit_in_session, self.write, self.read, self.missing] * 3
            + [self.snapshot, self.fork, self.job, self.killed_job, self.forward, self.stop] * 2
            + [self.network, self.hung, self.memory_bomb, self.fork_bomb]
        )
        while time.monotonic() < deadline:
            if not self.boxes or (len(self.boxes) < MAX_BOXES and self.random.random() < 0.2):
                self.attempt(self.start, None)
            else:
                self.attempt(self.random.choice(actions), self.random.choice(self.boxes))
        for box in list(self.boxes):
            self.attempt(self.stop, box)

    # -- outcomes
    def attempt(self, action: Callable, box: Box | None) -> None:
        began, name = time.monotonic(), action.__name__
        try:
            if box is not None and box.is_bombed:
                self.calm(box)
            action() if box is None else action(box)
            outcome = "right"
        except INTERRUPTIONS as error:
            outcome = self.judge(began, box, error)
        except (Wrong, RockError) as error:
            outcome = "WRONG"
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")
        self.counts[f"{name}: {outcome}"] += 1
        self.slowest = max(self.slowest, time.monotonic() - began)

    def judge(self, began: float, box: Box | None, error: RockError) -> str:
        """What an error means: the sandbox is lost, or only the request is; either has to have a cause."""
        ended = self.end_of(box) if box is not None else ""
        if box is not None and ended:
            self.boxes.remove(box)
            if self.faults.explain(box.since, box.worker):
                return "lost with its worker"
            if box.is_stopping and self.faults.explain(box.since, ""):
                return "cut off by a fault"
            self.wrong.append(f"sandbox {box.sandbox.id} is {ended} without a cause ({error})")
            return "WRONG"
        if self.faults.explain(began):
            time.sleep(0.2)
            return "cut off by a fault"
        self.wrong.append(f"without a cause: {type(error).__name__}: {error}")
        return "WRONG"

    def end_of(self, box: Box) -> str:
        """Its state and why, if it has ended; waits for the admin to be back, and for it to know."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(BackendUnavailable, RequestTimeout):
                row = self.client.get(f"/v1/sandboxes/{box.sandbox.id}")
                if row["ended_at"] is not None:
                    return f"{row['state']}: {row['reason']}"
                with contextlib.suppress(NotReady, SandboxDead, SandboxNotFound):
                    box.sandbox.stats()
                    return ""
            time.sleep(0.2)
        raise Wrong(f"sandbox {box.sandbox.id}: the admin cannot tell what has become of it")

    def expect(self, what: str, found: object, *expected: object) -> None:
        if found not in expected:
            raise Wrong(f"{what}: expected {' or '.join(repr(e)[:200] for e in expected)}, got {found!r:.400}")

    # -- operations
    def adopt(self, sandbox: Sandbox, like: Box | None = None, since: float | None = None) -> Box:
        row = self.client.get(f"/v1/sandboxes/{sandbox.id}")
        box = Box(sandbox, row["worker"], time.monotonic() if since is None else since)
        if like is not None:
            box.files = {path: set(values) for path, values in like.files.items()}
            box.variable = set(like.variable)
        self.boxes.append(box)
        return box

    def start(self) -> None:
        began = time.monotonic()
        data = self.random.randbytes(self.random.randrange(2000))
        sandbox = self.client.start(SandboxSpec(files={"first": data}, limits=LIMITS), idle_seconds=3600)
        self.adopt(sandbox, since=began).files["first"] = {data}

    def execute(self, box: Box) -> None:
        a, b, code = self.random.randrange(10**6), self.random.randrange(10**6), self.random.randrange(100)
        result = box.sandbox.execute(f"echo $(({a} * {b})) é; exit {code}")
        self.expect("execute", (result.exit_code, result.output), (code, f"{a * b} é\n"))

    def session(self, box: Box) -> None:
        value = f"v{self.random.randrange(10**6)}"
        seen = box.sandbox.session().run('echo "$V"').output.strip()
        self.expect("variable", seen, *box.variable)
        box.variable = {seen, value}
        self.expect("assignment", box.sandbox.session().run(f"V={value}; echo $V").output, f"{value}\n")
        box.variable = {value}

    def exit_in_session(self, box: Box) -> None:
        code = self.random.randrange(1, 100)
        self.expect("exit in a session", box.sandbox.session().run(f"exit {code}").exit_code, code)

    def write(self, box: Box) -> None:
        path, data = f"d/f{self.random.randrange(8)}", self.random.randbytes(self.random.randrange(200_000))
        box.files[path] = box.files.get(path, {None}) | {data}
        box.sandbox.write_file(path, data)
        box.files[path] = {data}

    def read(self, box: Box) -> None:
        self.verify_files(box, box.sandbox)

    def verify_files(self, box: Box, sandbox: Sandbox) -> None:
        for path in self.random.sample(sorted(box.files), min(3, len(box.files))):
            try:
                found: bytes | None = sandbox.read_file(path)
            except FileError as error:
                if error.errno_name != "ENOENT":
                    raise
                found = None
            if found not in box.files[path]:
                raise Wrong(f"{path} has {len(found or b'')} bytes that were never written there")
            if sandbox is box.sandbox:
                box.files[path] = {found}

    def missing(self, box: Box) -> None:
        try:
            box.sandbox.read_file("not/there")
        except FileError as error:
            self.expect("a missing file", error.errno_name, "ENOENT")
            return
        raise Wrong("a file that was never written could be read")

    def snapshot(self, box: Box) -> None:
        with box.sandbox.snapshot() as snapshot:
            began = time.monotonic()
            copy = self.adopt(self.client.start(snapshot=snapshot), box, began)
            self.verify_files(copy, copy.sandbox)
            self.stop(copy)

    def fork(self, box: Box) -> None:
        began = time.monotonic()
        copies = [self.adopt(fork, box, began) for fork in self.client.fork(box.sandbox.id, self.random.randint(1, 2))]
        for copy in copies:
            self.verify_files(copy, copy.sandbox)
            self.session(copy)
        for copy in copies if len(self.boxes) > MAX_BOXES else copies[1:]:
            self.stop(copy)

    def job(self, box: Box) -> None:
        count, code = self.random.randrange(1, 3000), self.random.randrange(100)
        job = box.sandbox.start_job(f"seq {count}; echo end >&2; exit {code}", timeout=120)
        streams = {"stdout": b"", "stderr": b""}
        for piece in job.stream():
            if not hasattr(piece, "data"):
                raise Wrong("a job's output was dropped while it was read")
            streams[piece.stream] += piece.data
        numbers = "".join(f"{n}\n" for n in range(1, count + 1)).encode()
        self.expect("a job's output", streams, {"stdout": numbers, "stderr": b"end\n"})
        self.expect("a job's exit code", job.status().exit_code, code)

    def killed_job(self, box: Box) -> None:
        job = box.sandbox.start_job("sleep 600")
        job.kill()
        self.expect("a killed job's exit code", job.status(wait=60).exit_code, 137)

    def network(self, box: Box) -> None:
        if self.egress >= MAX_EGRESS:
            return
        self.egress += 1
        word = f"w{self.random.randrange(10**6)}"
        get = ["python3", "-c", _GET.format(port=self.port, word=word)]
        box.sandbox.set_network_policy(NetworkPolicy((NetworkRule("127.0.0.2", self.port, "http"),)))
        self.expect("an allowed request", box.sandbox.execute(get).output, f"/{word}\n")
        box.sandbox.set_network_policy(NetworkPolicy())
        self.expect("a request of a closed sandbox", box.sandbox.execute(get).exit_code, 1)

    def forward(self, box: Box) -> None:
        """A server for one connection, which echoes; reached from here."""
        port = self.random.randrange(10_000, 60_000)
        job = box.sandbox.start_job(["python3", "-c", _ECHO.format(port=port)], timeout=120)
        if b"ready" not in b"".join(piece.data for piece in job.read(wait=30).pieces):
            self.expect("a server's state", job.status().state, "exited")  # the port was taken
            return
        data = self.random.randbytes(self.random.randrange(1, 300_000))
        with box.sandbox.forward(port) as forward:
            with socket.create_connection(("127.0.0.1", forward.local_port), timeout=120) as connection:
                sender = threading.Thread(target=_send, args=(connection, data))
                sender.start()
                got = b""
                with contextlib.suppress(OSError):
                    while piece := connection.recv(1 << 16):
                        got += piece
                sender.join()
        if forward.failure is not None:
            raise forward.failure
        self.expect("an echo", got == data, True)

    def hung(self, box: Box) -> None:
        box.sandbox.session("hung").run("true")
        result = box.sandbox.session("hung").run("echo begun; sleep 600", timeout=2)
        begun = result.output.startswith("begun\n")  # the shell may add that its child was killed
        self.expect("a hung command", (result.timed_out, result.exit_code, begun), (True, 124, True))
        self.expect("after it", box.sandbox.session("hung").run("echo ok").output, "ok\n")

    def memory_bomb(self, box: Box) -> None:
        result = box.sandbox.execute(_MEMORY_BOMB)
        self.expect("a memory bomb", (result.exit_code, result.oom_killed), (137, True))
        self.execute(box)

    def fork_bomb(self, box: Box) -> None:
        box.is_bombed = True
        result = box.sandbox.session("bomb").run(_FORK_BOMB, timeout=1)
        if not result.timed_out and result.exit_code == 0:
            raise Wrong("a fork bomb succeeded")
        self.calm(box)
        self.execute(box)

    def calm(self, box: Box) -> None:
        """A fork bomb ends with its command's timeout."""
        deadline = time.monotonic() + 60
        while box.sandbox.stats().pids > 24:
            if time.monotonic() > deadline:
                raise Wrong("a fork bomb goes on after its command has ended")
            time.sleep(0.1)
        box.is_bombed = False

    def stop(self, box: Box) -> None:
        box.is_stopping = True
        box.sandbox.stop()
        if box in self.boxes:
            self.boxes.remove(box)
