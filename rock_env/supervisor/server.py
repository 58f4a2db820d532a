"""Requests: one coroutine per connection, one request at a time on each, many connections at once."""

from __future__ import annotations

import os
import socket

from rock_env import wire
from rock_env.supervisor.box import Box
from rock_env.supervisor.egress import Egress
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.journal import AuditLog
from rock_env.supervisor.loop import Event, Loop
from rock_env.supervisor.machine import Machine
from rock_env.supervisor.models import Models
from rock_env.supervisor.operations import Operations, Reply

_FIRST_UID = 1_500_000_000  # far from the ids of people, services and sub-uid ranges
_REMEMBERED_DEATHS = 10_000


class Snapshot:
    def __init__(self, box: Box, layer: str, states: dict[str, tuple[str, str]]) -> None:
        self.lower = [layer, *box.lower]
        self.uid = box.uid
        self.image = box.spec["image"]
        self.states = states


class Server(Operations):
    def __init__(self, loop: Loop, machine: Machine, control: socket.socket, log: AuditLog) -> None:
        self.loop = loop
        self.log = log
        self.machine = machine
        self.boxes: dict[str, Box] = {}
        self.deaths: dict[str, str] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self._layer_users: dict[str, int] = {}
        self._uids = 0
        self._names = 0
        self.egress = Egress(loop, log, machine.privileged)
        self.models = Models(loop, log, machine.privileged)
        log.on_fault = self._on_log_fault
        self._control = control
        self._finishing = False
        control.setblocking(False)
        loop.add_reader(control.fileno(), self._on_control)
        if machine.listeners is not None:
            loop.add_reader(machine.listeners.fileno(), self._on_listener)

    def _on_log_fault(self) -> None:
        """What cannot be recorded may not happen."""
        self.egress.stop()
        self.models.stop()

    # -- connections
    def _on_control(self) -> None:
        try:
            fds = wire.receive_fds(self._control)
        except BlockingIOError:
            return
        except OSError:
            fds = None
        if fds is None:
            self.loop.remove_reader(self._control.fileno())
            self.finish()
            return
        for fd in fds:
            connection = socket.socket(fileno=fd)
            connection.setblocking(False)
            self.loop.spawn(self._serve(connection))

    def _on_listener(self) -> None:
        """A new process of a sandbox has been confined: watch over what it calls."""
        arrived = self.machine.receive_listener()
        if arrived is not None:
            name, listener = arrived
            box = self.boxes.get(name)
            if box is not None and not box.died.is_set:
                box.watcher.add(listener)
            else:
                os.close(listener)

    async def _serve(self, connection: socket.socket) -> None:
        reader = wire.FrameReader()
        fd = connection.fileno()
        try:
            while True:
                frame = reader.next()
                while frame is None:
                    readable = Event(self.loop)
                    self.loop.add_reader(fd, readable.set)
                    await readable.wait()
                    self.loop.remove_reader(fd)
                    try:
                        data = connection.recv(1 << 16)
                    except BlockingIOError:  # a stale event of a descriptor with the same number
                        continue
                    if not data:
                        return
                    reader.feed(data)
                    frame = reader.next()
                await self._send(connection, wire.encode(*await self.answer(*frame)))
        except (OSError, wire.ConnectionLost):
            return
        finally:
            self.loop.remove_reader(fd)
            connection.close()

    async def _send(self, connection: socket.socket, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[connection.send(view) :]
            except BlockingIOError:
                writable = Event(self.loop)
                self.loop.add_writer(connection.fileno(), writable.set)
                await writable.wait()
                self.loop.remove_writer(connection.fileno())

    def box(self, name: str) -> Box:
        box = self.boxes.get(name)
        if box is None:
            if name in self.deaths:
                raise Fault("dead", f"sandbox {name} has ended: {self.deaths[name]}")
            raise Fault("not_found", f"no sandbox {name!r}")
        box.require_alive()
        return box

    # -- sandboxes
    async def do_start(self, blob: bytes, *, spec: dict, entries: list[dict], snapshot: str | None = None) -> Reply:
        self.machine.check(spec["limits"])
        lower: list[str] = []
        states: dict[str, tuple[str, str]] = {}
        uid = self._new_uid()
        if snapshot is not None:
            origin = self._snapshot(snapshot)
            if origin.image != spec["image"]:
                message = f"image: the snapshot was taken on {origin.image!r}, the spec has {spec['image']!r}"
                raise Fault("spec", message)
            lower, uid, states = list(origin.lower), origin.uid, dict(origin.states)
        self._names += 1
        box = Box(f"{self._names}", spec, self.machine, self.loop, lower, uid, self.log)
        box.on_death = self._on_death
        self._use(lower, +1)
        self.boxes[box.name] = box
        shown = {name: spec[name] for name in ("image", "limits", "readonly_binds")}
        self.log.record("sandbox_starting", sandbox=box.name, snapshot=snapshot, uid=uid, **shown)
        await box.start(entries, blob, states)
        try:
            if self.log.fault:
                raise Fault("unavailable", self.log.fault)
            if spec["network"]:
                await self._set_policy(box, spec["network"])
            if spec["model_proxy"]:
                await self.models.open(box)
        except (Fault, OSError) as error:
            await box.stop(f"start failed: {error}")
            raise
        return {"id": box.name}, b""

    def _new_uid(self) -> int:
        """One user per sandbox; a snapshot's sandboxes share their origin's, which owns the files."""
        if not self.machine.privileged:
            return 0  # the only id that exists in the supervisor's user namespace
        self._uids += 1
        return _FIRST_UID + self._uids % 400_000_000

    def _on_death(self, box: Box) -> None:
        if self.boxes.pop(box.name, None) is None:
            return
        self._use(box.lower, -1)
        self.egress.forget(box)
        self.models.forget(box)
        self.deaths[box.name] = box.death
        if len(self.deaths) > _REMEMBERED_DEATHS:
            del self.deaths[next(iter(self.deaths))]
        if self._finishing and not self.boxes:
            self.loop.stop()

    async def _set_policy(self, box: Box, policy: list[list]) -> None:
        box.policy = policy
        self.log.record("network_policy", sandbox=box.name, allow=policy)
        await self.egress.set_policy(box, policy)

    async def do_network(self, blob: bytes, *, id: str, policy: list[list]) -> Reply:
        await self._set_policy(self.box(id), policy)
        return {}, b""

    async def do_model_next(self, blob: bytes, *, id: str, seconds: float) -> Reply:
        return await self.models.call(self.box(id), "next", seconds, blob, seconds=seconds)

    async def do_model_status(self, blob: bytes, *, id: str) -> Reply:
        return await self.models.call(self.box(id), "status", 0.0, blob)

    async def do_model_answer(self, blob: bytes, *, id: str, **arguments: object) -> Reply:
        return await self.models.call(self.box(id), "answer", 0.0, blob, **arguments)

    async def do_stop(self, blob: bytes, *, id: str) -> Reply:
        box = self.boxes.get(id)
        if box is not None:
            await box.stop("it was stopped")
        return {}, b""

    async def do_alive(self, blob: bytes, *, id: str) -> Reply:
        box = self.boxes.get(id)
        return {"alive": box is not None and box.alive}, b""

    # -- snapshots
    def _snapshot(self, name: str) -> Snapshot:
        if name not in self.snapshots:
            raise Fault("not_found", f"no snapshot {name!r}")
        return self.snapshots[name]

    def _use(self, lower: list[str], change: int) -> None:
        """Count the users of layers; one that nobody uses any more is deleted."""
        for layer in lower:
            count = self._layer_users.get(layer, 0) + change
            if count > 0:
                self._layer_users[layer] = count
            else:
                self._layer_users.pop(layer, None)
                self.machine.store.drop_layer(layer)

    async def do_snapshot(self, blob: bytes, *, id: str) -> Reply:
        box = self.box(id)
        layer, states = await box.snapshot()
        self._names += 1
        snapshot = Snapshot(box, layer, states)
        self.snapshots[f"s{self._names}"] = snapshot
        self._use(snapshot.lower, +1)
        self.log.record("snapshot_taken", sandbox=id, snapshot=f"s{self._names}")
        return {"id": f"s{self._names}"}, b""

    async def do_drop_snapshot(self, blob: bytes, *, id: str) -> Reply:
        snapshot = self.snapshots.pop(id, None)
        if snapshot is not None:
            self._use(snapshot.lower, -1)
            self.log.record("snapshot_dropped", snapshot=id)
        return {}, b""

    async def do_ping(self, blob: bytes) -> Reply:
        return {"boxes": len(self.boxes), "snapshots": len(self.snapshots)}, b""

    # -- end
    def finish(self) -> None:
        """The client has gone: end every sandbox, then the loop."""
        if self._finishing:
            return
        self._finishing = True
        if not self.boxes:
            self.loop.stop()
        for box in list(self.boxes.values()):
            self.loop.spawn(box.stop("its client has gone"))
