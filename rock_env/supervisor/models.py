"""The supervisor's side of the model endpoints: one process for all sandboxes, started when the first one wants one.

See rock_env.model_proxy.process for what it does, and rock_env.supervisor.egress for its like.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from rock_env.supervisor import helpers
from rock_env.supervisor.channel import Channel
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.journal import AuditLog
from rock_env.supervisor.loop import Event, Loop

if TYPE_CHECKING:
    from rock_env.supervisor.box import Box

_PORT = 8011  # on the sandbox's loopback
_UID = 1_499_999_998  # below the egress proxy's
_OPEN_SECONDS = 20.0
_SLACK_SECONDS = 10.0
_RESTART_SECONDS = 1.0
_SHOWN = ("mode", "url", "models", "record", "replay")
_NO_KEY = "sandbox"  # what clients send, who refuse to start without one


class Models:
    """Gives sandboxes their endpoints, passes requests of whoever answers on, and records what the process reports."""

    def __init__(self, loop: Loop, log: AuditLog, privileged: bool) -> None:
        self._loop = loop
        self._log = log
        self._uid = _UID if privileged else 0
        self._pid = 0
        self._descriptors: socket.socket | None = None
        self._socket: socket.socket | None = None
        self._channel: Channel | None = None
        self._open: dict[str, Box] = {}
        self._serial = 0
        self._waiting: dict[int, tuple[Event, list]] = {}

    async def open(self, box: Box) -> None:
        """Give a sandbox the endpoint that its spec asks for, and programs their names for it."""
        settings = box.spec["model_proxy"]
        self._log.record("model_proxy", sandbox=box.name, **{name: settings[name] for name in _SHOWN})
        port = await self._connect(box, settings)
        base = f"http://127.0.0.1:{port}"
        names = {"OPENAI_BASE_URL": f"{base}/v1", "OPENAI_API_BASE": f"{base}/v1", "ANTHROPIC_BASE_URL": base}
        names |= {"OPENAI_API_KEY": _NO_KEY, "ANTHROPIC_API_KEY": _NO_KEY}
        box.env = {**names, **box.env}

    async def _connect(self, box: Box, settings: dict) -> int:
        port, listener = await helpers.listen(self._loop, box, _PORT)
        fds = {"listener": listener.fileno()}
        try:
            if settings["record"] is not None:
                fds["record"] = _open_file("record", settings["record"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            if settings["replay"] is not None:
                fds["replay"] = _open_file("replay", settings["replay"], os.O_RDONLY)
            box.require_alive()
            self._ensure_started()
            self._open[box.name] = box
            try:
                socket.send_fds(self._descriptors, [b"+"], list(fds.values()))
            except OSError as error:
                self.stop()
                raise Fault("unavailable", f"model_proxy: its process has failed: {error}") from error
            blob = json.dumps(settings).encode()
            await self._ask("open", _OPEN_SECONDS, blob, sandbox=box.name, kinds=list(fds))
        except Fault:
            self._open.pop(box.name, None)
            raise
        finally:
            listener.close()
            for name in fds.keys() - {"listener"}:
                os.close(fds[name])
        return port

    def forget(self, box: Box) -> None:
        """A sandbox has ended."""
        if self._open.pop(box.name, None) is not None and self._channel is not None:
            self._loop.spawn(self._close(box))

    async def _close(self, box: Box) -> None:
        with contextlib.suppress(Fault):
            await self._ask("close", _SLACK_SECONDS, b"", sandbox=box.name)

    async def call(self, box: Box, op: str, limit: float, blob: bytes, **arguments: object) -> tuple[dict, bytes]:
        """Pass on what whoever answers asks for."""
        if not box.spec.get("model_proxy"):
            raise Fault("spec", "model_proxy: expected one in the spec of the sandbox; it has none")
        if box.name not in self._open or self._channel is None:
            raise Fault("unavailable", "model_proxy: its process has failed, and is being replaced")
        reply = await self._ask(op, limit + _SLACK_SECONDS, blob, sandbox=box.name, **arguments)
        box.require_alive()
        return reply

    async def _ask(self, op: str, limit: float, blob: bytes, **arguments: object) -> tuple[dict, bytes]:
        self._serial += 1
        serial, answered, reply = self._serial, Event(self._loop), []
        self._waiting[serial] = answered, reply
        self._channel.send({"rid": serial, "op": op, **arguments}, blob)
        await answered.wait(time.monotonic() + limit)
        self._waiting.pop(serial, None)
        if not reply:
            raise Fault("unavailable", "model_proxy: its process does not answer")
        header, data = reply
        if "error" in header:
            error = header["error"]
            raise Fault(error["code"], error["message"], error["errno"])
        return header, data

    # -- the process
    def _ensure_started(self) -> None:
        if self._channel is not None:
            return
        descriptors, their_descriptors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = socket.socketpair()
        pid = helpers.start(
            "rock_env.model_proxy.process", {3: their_descriptors.fileno(), 4: theirs.fileno()}, self._uid
        )
        their_descriptors.close()
        theirs.close()
        descriptors.setblocking(False)
        self._pid, self._descriptors, self._socket = pid, descriptors, ours
        self._loop.on_exit(pid, self._on_exit)
        channel = self._channel = Channel(self._loop, ours.fileno(), ours.fileno())
        channel.on_frame = self._on_frame
        channel.on_end = lambda: self._loop.remove_reader(ours.fileno())

    def _on_frame(self, header: dict, blob: bytes) -> None:
        if "report" in header:
            report = header["report"]
            self._log.record(report.pop("event"), **report)
            return
        answered, reply = self._waiting.pop(header.pop("rid"), (None, None))
        if answered is not None:
            reply += [header, blob]
            answered.set()

    def _on_exit(self, status: int) -> None:
        """The process has ended, and every endpoint with it. Those who had one get a new one."""
        waiting, self._waiting = self._waiting, {}
        for answered, _ in waiting.values():
            answered.set()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._descriptors.close()
        self._pid, self._channel, self._socket, self._descriptors = 0, None, None, None
        self._log.record("model_proxy_ended", status=status)
        if self._open and not self._log.fault:
            self._loop.call_at(time.monotonic() + _RESTART_SECONDS, lambda: self._loop.spawn(self._reopen()))

    async def _reopen(self) -> None:
        boxes, self._open = list(self._open.values()), {}
        for box in boxes:
            if box.alive:
                try:
                    await self._connect(box, box.spec["model_proxy"])
                except Fault as fault:
                    self._log.record("model_proxy_not_reopened", sandbox=box.name, reason=str(fault))

    def stop(self) -> None:
        """End the process: no sandbox has a model."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)


def _open_file(name: str, path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise Fault("spec", f"model_proxy.{name}: {path}: {os.strerror(error.errno or 0)}") from error
