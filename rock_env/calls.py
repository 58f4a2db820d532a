"""The calls that every backend makes in the same way: by frames (rock_env.wire), to a supervisor or to a rocklet."""

from __future__ import annotations

from collections.abc import Mapping

from rock_env.spec import CommandResult, FileEntry, FileInfo, SandboxStats

SLACK_SECONDS = 15.0  # beyond a command's own deadline, before the supervisor itself counts as hung
REQUEST_SECONDS = 60.0


def entries_of(files: Mapping[str, bytes | str | FileEntry], links: Mapping[str, str]) -> tuple[list[dict], bytes]:
    """The supervisor's form of files to write: descriptions, and their contents one after another."""
    entries: list[dict] = []
    pieces: list[bytes] = []
    for path, entry in files.items():
        entry = entry if isinstance(entry, FileEntry) else FileEntry(entry)
        data = entry.data
        kind = "directory" if path.endswith("/") else "file"
        entries.append({"path": path, "kind": kind, "mode": entry.mode, "size": len(data)})
        pieces.append(data)
    entries += [{"path": path, "kind": "symlink", "target": target} for path, target in links.items()]
    return entries, b"".join(pieces)


class WireCalls:
    """What of rock_env.backend.Backend is one request about one sandbox."""

    def _call(
        self, handle: str, op: str, seconds: float = REQUEST_SECONDS, blob: bytes = b"", /, **arguments: object
    ) -> tuple[dict, bytes]:
        """Ask whoever has the sandbox, and wait at most `seconds`."""
        raise NotImplementedError(f"{type(self).__name__}._call")

    def execute(
        self, sandbox: str, argv: list[str], seconds: float, cwd: str | None, env: Mapping[str, str], output_bytes: int
    ) -> CommandResult:
        limit = seconds + SLACK_SECONDS
        arguments = {"argv": argv, "seconds": seconds, "cwd": cwd, "env": dict(env), "output_bytes": output_bytes}
        reply, _ = self._call(sandbox, "execute", limit, **arguments)
        return CommandResult(**reply)

    def run(self, sandbox: str, session: str, command: str, seconds: float, output_bytes: int) -> CommandResult:
        data = command.encode("utf-8", "surrogateescape")
        arguments = {"session": session, "seconds": seconds, "output_bytes": output_bytes}
        reply, _ = self._call(sandbox, "run", seconds + SLACK_SECONDS, data, **arguments)
        return CommandResult(**reply)

    def call(
        self, sandbox: str, op: str, seconds: float, blob: bytes = b"", /, **arguments: object
    ) -> tuple[dict, bytes]:
        return self._call(sandbox, op, seconds + SLACK_SECONDS, blob, **arguments)

    def put(self, sandbox: str, files: Mapping[str, FileEntry], links: Mapping[str, str]) -> None:
        entries, blob = entries_of(files, links)
        self._call(sandbox, "put", REQUEST_SECONDS, blob, entries=entries)

    def read(self, sandbox: str, path: str, max_bytes: int) -> bytes:
        return self._call(sandbox, "read", path=path, max_bytes=max_bytes)[1]

    def list(self, sandbox: str, path: str, recursive: bool) -> list[FileInfo]:
        reply, _ = self._call(sandbox, "list", path=path, recursive=recursive)
        return [FileInfo(**entry) for entry in reply["entries"]]

    def kill_all(self, sandbox: str) -> None:
        self._call(sandbox, "kill_all")

    def stats(self, sandbox: str) -> SandboxStats:
        return SandboxStats(**self._call(sandbox, "stats")[0])
