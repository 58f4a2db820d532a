"""The supervisor's side of the egress proxy: one process for all sandboxes, started when the first policy opens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from rock_env.supervisor import helpers
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.journal import AuditLog
from rock_env.supervisor.loop import Event, Lock, Loop

if TYPE_CHECKING:
    from rock_env.supervisor.box import Box

PROXY_UID = 1_499_999_999  # just below those of the sandboxes
_PORT = 3128  # by custom a proxy's; another one if a program of the sandbox has it
_APPLY_SECONDS = 10.0  # of which the proxy's start takes a tenth of a second
_RESTART_SECONDS = 1.0
_MESSAGE_BYTES = 1 << 20
_AT_ONCE = 64
_REPEATABLE = ("denied", "failed")


class Egress:
    """Opens and closes sandboxes' ways out, and records what the proxy reports."""

    def __init__(self, loop: Loop, log: AuditLog, privileged: bool) -> None:
        self._loop = loop
        self._log = log
        self._uid = PROXY_UID if privileged else 0
        self._pid = 0
        self._control: socket.socket | None = None
        self._open: dict[str, Box] = {}
        self._turn = Lock(loop)  # of policies: one is in force before the next is looked at
        self._serial = 0
        self._waiting: dict[int, Event] = {}  # for a policy to be in force, by the serial number of its message

    async def set_policy(self, box: Box, policy: list[list]) -> None:
        """Open, change or close a sandbox's way out. The change is in force when this returns."""
        await self._turn.acquire()
        try:
            await self._set_policy(box, policy)
        finally:
            self._turn.release()

    async def _set_policy(self, box: Box, policy: list[list]) -> None:
        if self._log.fault:
            raise Fault("unavailable", self._log.fault)
        if not policy:
            box.set_proxy(None)
            if self._open.pop(box.name, None) is not None and self._control is not None:
                await self._tell(box, policy, [])
            return
        if box.name in self._open and self._control is not None:
            await self._tell(box, policy, [])
            return
        port, listener = await helpers.listen(self._loop, box, _PORT)
        try:
            box.require_alive()
            box.set_proxy(port)
            self._ensure_started()
            self._open[box.name] = box
            await self._tell(box, policy, [listener.fileno()])
        finally:
            listener.close()

    def forget(self, box: Box) -> None:
        """A sandbox has ended."""
        if self._open.pop(box.name, None) is not None and self._control is not None:
            self._loop.spawn(self._tell_gone(box))

    async def _tell_gone(self, box: Box) -> None:
        with contextlib.suppress(Fault):
            await self._tell(box, [], [])

    async def _tell(self, box: Box, policy: list[list], fds: list[int]) -> None:
        """Send a policy to the proxy and wait until it is in force. A proxy that does not answer is ended: closed."""
        self._serial += 1
        serial, applied = self._serial, Event(self._loop)
        self._waiting[serial] = applied
        self._send({"sandbox": box.name, "policy": policy, "serial": serial}, fds)
        await applied.wait(time.monotonic() + _APPLY_SECONDS)
        if self._waiting.pop(serial, None) is not None:
            self.stop()
            raise Fault("unavailable", "network: the egress proxy has failed; the sandbox has no way out")

    def _send(self, message: dict, fds: list[int]) -> None:
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)
        except OSError as error:  # it has ended, or does not read: then it is of no use to anybody
            self.stop()
            raise Fault("unavailable", f"network: the egress proxy has failed: {error}") from error

    # -- the process
    def _ensure_started(self) -> None:
        if self._control is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES)
        pid = helpers.start("rock_env.egress.proxy", {3: theirs.fileno()}, self._uid)
        theirs.close()
        ours.setblocking(False)
        self._pid, self._control = pid, ours
        self._loop.on_exit(pid, self._on_exit)
        self._loop.add_reader(ours.fileno(), self._on_report)

    def _on_report(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                data = self._control.recv(_MESSAGE_BYTES) if self._control else b""
            except (BlockingIOError, ConnectionError):
                return
            if not data:
                if self._control:
                    self._loop.remove_reader(self._control.fileno())
                return
            report = json.loads(data)
            if "applied" in report:
                waiter = self._waiting.pop(report["applied"], None)
                if waiter is not None:
                    waiter.set()
                continue
            event, box = report.pop("event"), self._open.get(report["sandbox"])
            if box is not None and report.get("verdict") in _REPEATABLE:
                del report["sandbox"]
                box.notes.note(event, **report)
            else:
                self._log.record(event, **report)

    def _on_exit(self, status: int) -> None:
        """The proxy has ended, and every way out with it. Those who had one get a new one."""
        self._on_report()
        self._pid = 0
        for waiter in self._waiting.values():
            waiter.set()
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        self._log.record("egress_proxy_ended", status=status)
        if self._open and not self._log.fault:
            self._loop.call_at(time.monotonic() + _RESTART_SECONDS, lambda: self._loop.spawn(self._reopen()))

    async def _reopen(self) -> None:
        boxes, self._open = list(self._open.values()), {}
        for box in boxes:
            if box.alive and box.policy:
                try:
                    await self.set_policy(box, box.policy)
                except Fault as fault:
                    self._log.record("egress_not_reopened", sandbox=box.name, reason=str(fault))

    def stop(self) -> None:
        """End the proxy: no sandbox has a way out."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
