"""Requests about one sandbox, the same for a supervisor with many and for a rocklet with one."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable

from rock_env.supervisor import files
from rock_env.supervisor.commands import Runner
from rock_env.supervisor.faults import Fault

Reply = tuple[dict, bytes]


class Operations:
    """`do_NAME` answers the request {"op": NAME, ...}."""

    def box(self, name: str) -> Runner:
        """The live sandbox of that name; raises Fault."""
        raise NotImplementedError(f"{type(self).__name__}.box")

    async def answer(self, request: dict, blob: bytes) -> Reply:
        try:
            handler: Callable[..., Awaitable[Reply]] = getattr(self, f"do_{request.pop('op')}")
            return await handler(blob, **request)
        except Fault as fault:
            return {"error": fault.to_wire()}, b""
        except Exception as error:  # a defect of ours must reach the caller, not end every sandbox
            traceback.print_exc()
            return {"error": Fault("error", f"supervisor: {type(error).__name__}: {error}").to_wire()}, b""

    async def do_execute(
        self, blob: bytes, *, id: str, argv: list[str], env: dict, cwd: str | None, seconds: float, output_bytes: int
    ) -> Reply:
        box = self.box(id)
        return await box.execute(argv, env, self._inside(box, cwd or ""), seconds, output_bytes), b""

    async def do_run(self, blob: bytes, *, id: str, session: str, seconds: float, output_bytes: int) -> Reply:
        command = blob.decode("utf-8", "surrogateescape")
        return await self.box(id).session(session).run(command, seconds, output_bytes), b""

    async def do_session_list(self, blob: bytes, *, id: str) -> Reply:
        return {"sessions": self.box(id).session_names()}, b""

    async def do_session_open(self, blob: bytes, *, id: str, session: str) -> Reply:
        self.box(id).open_session(session)
        return {}, b""

    async def do_session_close(self, blob: bytes, *, id: str, session: str, seconds: float) -> Reply:
        await self.box(id).close_session(session, seconds)
        return {}, b""

    # -- jobs
    async def do_job_start(
        self,
        blob: bytes,
        *,
        id: str,
        job: str,
        argv: list[str],
        env: dict,
        cwd: str | None,
        seconds: float | None,
        stdin: bool,
        size: list[int] | None,
        buffer_bytes: int,
    ) -> Reply:
        box = self.box(id)
        place = self._inside(box, cwd or "")
        window = (size[0], size[1]) if size else None
        started = await box.jobs.start(job, argv, env, place, seconds, stdin, window, buffer_bytes)
        return started.status(), b""

    async def do_job_list(self, blob: bytes, *, id: str) -> Reply:
        return {"jobs": [job.status() for job in self.box(id).jobs]}, b""

    async def do_job_status(self, blob: bytes, *, id: str, job: str, seconds: float) -> Reply:
        return await self.box(id).jobs.get(job).wait(seconds), b""

    async def do_job_read(self, blob: bytes, *, id: str, job: str, seq: int, seconds: float, max_bytes: int) -> Reply:
        return await self.box(id).jobs.get(job).read(seq, seconds, max_bytes)

    async def do_job_write(
        self, blob: bytes, *, id: str, job: str, at: int | None, close: bool, seconds: float
    ) -> Reply:
        return await self.box(id).jobs.get(job).write(blob, at, close, seconds), b""

    async def do_job_signal(self, blob: bytes, *, id: str, job: str, number: int) -> Reply:
        return {"delivered": self.box(id).jobs.get(job).signal(number)}, b""

    async def do_job_resize(self, blob: bytes, *, id: str, job: str, size: list[int]) -> Reply:
        self.box(id).jobs.get(job).resize((size[0], size[1]))
        return {}, b""

    # -- forwarded connections
    async def do_forward_open(self, blob: bytes, *, id: str, connection: str, port: int) -> Reply:
        await self.box(id).tunnels.open(connection, port)
        return {}, b""

    async def do_forward_read(
        self, blob: bytes, *, id: str, connection: str, seq: int, seconds: float, max_bytes: int
    ) -> Reply:
        return await self.box(id).tunnels.read(connection, seq, seconds, max_bytes)

    async def do_forward_write(
        self, blob: bytes, *, id: str, connection: str, at: int, close: bool, seconds: float
    ) -> Reply:
        return await self.box(id).tunnels.write(connection, blob, at, close, seconds), b""

    async def do_forward_close(self, blob: bytes, *, id: str, connection: str) -> Reply:
        self.box(id).tunnels.close(connection, "it was closed")
        return {}, b""

    async def do_kill_all(self, blob: bytes, *, id: str) -> Reply:
        await self.box(id).kill_all()
        return {}, b""

    async def do_stats(self, blob: bytes, *, id: str) -> Reply:
        return self.box(id).stats(), b""

    # -- files
    async def do_put(self, blob: bytes, *, id: str, entries: list[dict]) -> Reply:
        box = self.box(id)
        files.put(box.root_fd, entries, blob, box.uid, box.workdir)
        return {}, b""

    async def do_read(self, blob: bytes, *, id: str, path: str, max_bytes: int) -> Reply:
        box = self.box(id)
        return {}, files.read_file(box.root_fd, self._inside(box, path), max_bytes)

    async def do_list(self, blob: bytes, *, id: str, path: str, recursive: bool) -> Reply:
        box = self.box(id)
        listing = files.walk if recursive else files.list_directory
        return {"entries": listing(box.root_fd, self._inside(box, path))}, b""

    @staticmethod
    def _inside(box: Runner, path: str) -> str:
        return path if path.startswith("/") else f"{box.workdir}/{path}"
