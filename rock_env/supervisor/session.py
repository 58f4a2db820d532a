"""A persistent bash: commands arrive on one descriptor, exit codes leave on another, output has a pipe of its own.

The shell's program is a single line, so that bash's own messages always say "line 1". Commands are evaluated at top
level (not in a function), in a loop that the command's own `break` or `continue` cannot get out of. When the shell ends
(`exit`, `set -e`, a timeout) an EXIT trap hands out its variables, functions and directory, from which the next shell
is restored.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import re
import signal
import termios
import time
from typing import TYPE_CHECKING

from rock_env.supervisor import process
from rock_env.supervisor.faults import Fault
from rock_env.supervisor.loop import Event, Lock

if TYPE_CHECKING:
    from rock_env.supervisor.commands import Runner

_COMMANDS, _REPORTS = 200, 201
_STATUS, _STATE = b"S", b"D"
_ABORT = signal.SIGRTMAX
_GRACE_SECONDS = 2.0  # for a shell to hand out its state; with little CPU it is slow to
_ATTEMPTS = 5

_PROGRAM = (
    "builtin unset -v __rock_program;"
    " __rock_save() { { builtin printf 'D%s\\n' \"$PWD\"; builtin declare -p; builtin declare -f; builtin umask -p;"
    " builtin printf '\\0'; } >&201; } 2>/dev/null;"
    ' __rock_return() { builtin return "$1"; };'
    " builtin trap __rock_save EXIT; builtin trap 'builtin exit 124' RTMAX; __rock_status=0 __rock_busy=;"
    " while builtin :; do"
    " { case $__rock_busy in ?*) builtin printf 'S%s\\0' \"$__rock_status\" >&201;; esac; __rock_busy=;"
    " IFS= builtin read -r -d '' -u 200 __rock_command || builtin exit 0; __rock_busy=1;"
    " case $__rock_command in __rock_save) __rock_save; __rock_command='__rock_return $__rock_status';; esac;"
    " } 2>/dev/null;"
    ' for __rock_once in 1; do __rock_return "$__rock_status";'
    ' builtin eval "$__rock_command" 200<&- 201>&-; done;'
    " { __rock_status=$? __rock_busy=; builtin printf 'S%s\\0' \"$__rock_status\" >&201; } 2>/dev/null;"
    " done"
)
_SAVE = "__rock_save"
# Variables that bash keeps itself: some are read-only, and assigning one would end the restoration.
_OWN = (
    r"BASH\w*|COMP_WORDBREAKS|DIRSTACK|EPOCH\w+|EUID|FUNCNAME|GROUPS|HIST\w*|HOST\w+|LINENO|MACHTYPE|OPTERR|OPTIND|OSTYPE|"
    r"PIPESTATUS|PPID|PWD|RANDOM|SECONDS|SHELLOPTS|SHLVL|SRANDOM|UID|_|__rock_\w+"
)
# The proxy's variables come with each new shell, as the network policy is then.
_PROXY = (
    r"(?:https?|HTTPS?)_(?:proxy|PROXY)=\"http://127\.0\.0\.1:\d+\"|(?:no_proxy|NO_PROXY)=\"localhost,127\.0\.0\.1\""
)
_PROXY_LINE = re.compile(rf"^declare -x (?:{_PROXY})\n", re.MULTILINE)
_OWN_LINE = re.compile(rf"^declare -\S+ (?:{_OWN})(?:=.*)?\n", re.MULTILINE)


class Session:
    def __init__(self, box: Runner, name: str, state: tuple[str, str] | None = None) -> None:
        self.name = name
        self.state = state  # (directory, shell text) to restore into the next shell
        self._box = box
        self._loop = box.loop
        self._lock = Lock(box.loop)
        self._pid = 0
        self._exit_status: int | None = None
        self._fds: dict[str, int] = {}
        self._buffer = b""
        self._changed = Event(box.loop)
        self._status: int | None = None
        self._cwd: str | None = None
        self._sent = self._size = 0
        self._proxy_env: dict[str, str] = {}  # what the shell knows of
        self._is_ended = False

    @property
    def is_running(self) -> bool:
        return self._pid != 0

    @property
    def pid(self) -> int:
        return self._pid

    # -- the shell process
    def _spawn(self) -> None:
        command_read, command_write = process.pipe(False)
        report_read, report_write = process.pipe(True)
        output_read, output_write = process.pipe(True)
        box = self._box
        self._exit_status = None
        self._buffer = b""
        descriptors = {0: box.null_fd, 1: output_write, 2: output_write}
        descriptors |= {_COMMANDS: command_read, _REPORTS: report_write}
        try:
            argv = ["bash", "--norc", "--noprofile", "-c", 'eval "$__rock_program"', "bash"]
            self._proxy_env = box.proxy_env
            self._pid = box.spawn_inside(argv, {**box.env, "__rock_program": _PROGRAM}, box.workdir, descriptors)
        except BaseException:
            for fd in (command_write, report_read, output_read):
                os.close(fd)
            raise
        finally:
            for fd in (command_read, report_write, output_write):
                os.close(fd)
        self._fds = {"command": command_write, "report": report_read, "output": output_read}
        self._loop.on_exit(self._pid, self._on_exit)
        self._loop.add_reader(report_read, self._on_report)

    def _on_exit(self, status: int) -> None:
        self._exit_status = status
        self._on_report()
        self._changed.set()

    def _on_report(self) -> None:
        fd = self._fds.get("report")
        if fd is None:
            return
        while True:
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                break
            if not data:
                self._loop.remove_reader(fd)
                break
            self._buffer += data
        *records, self._buffer = self._buffer.split(b"\0")
        for record in records:
            if record[:1] == _STATUS and record[1:].isdigit():
                self._status = int(record[1:])
                self._changed.set()
            elif record[:1] == _STATE:
                directory, _, text = record[1:].decode("utf-8", "surrogateescape").partition("\n")
                self.state = (directory, _PROXY_LINE.sub("", _OWN_LINE.sub("", text)))

    def close(self) -> None:
        """Forget the shell (its process is killed with the sandbox, or has ended); keep at least its directory."""
        if self.state is None and self._cwd:
            self.state = (self._cwd, "")
        self._exit_status = None
        for fd in self._fds.values():
            self._loop.remove_reader(fd)
            os.close(fd)
        self._fds = {}
        self._pid = 0

    async def end(self, deadline: float) -> None:
        """End the shell; what it has put into the background goes on. Whoever waits for the session is told."""
        if not await self._lock.acquire(deadline):
            raise Fault("request_timeout", f"session {self.name!r}: busy with a command until the deadline")
        try:
            self._is_ended = True
            while self.is_running and self._exit_status is None and self._box.alive:
                self._changed = Event(self._loop)
                self._kill(signal.SIGKILL)
                await self._changed.wait(time.monotonic() + 0.1)
            self.close()
        finally:
            self._lock.release()

    # -- commands
    async def run(self, command: str, seconds: float, output_bytes: int) -> dict:
        deadline = time.monotonic() + seconds
        if not await self._lock.acquire(deadline):
            raise Fault("request_timeout", f"session {self.name!r}: busy with another command until the deadline")
        try:
            for _ in range(_ATTEMPTS):
                self._box.require_alive()
                if self._is_ended:
                    raise Fault("spec", f"session {self.name!r} was closed meanwhile")
                if not self.is_running:
                    await self._start_shell()
                if self._proxy_env != self._box.proxy_env:
                    await self._learn_proxy()
                    continue
                result = await self._run(command, deadline, output_bytes)
                if result is not None:
                    return result
            raise Fault(
                "error", f"session {self.name!r}: its shell was killed {_ATTEMPTS} times before it read the command"
            )
        finally:
            self._lock.release()

    async def _start_shell(self) -> None:
        self._spawn()
        state, self.state = self.state, None
        if state is not None:
            directory, text = state
            quoted = "'" + directory.replace("'", "'\\''") + "'"
            restore = f"{{ {text}\nbuiltin cd -- {quoted}; }} >/dev/null 2>&1; __rock_status=0; builtin :"
            await self._run(restore, time.monotonic() + 10, 16)
            if not self.is_running:
                self.state = None
                self._spawn()

    async def _learn_proxy(self) -> None:
        """The network policy has opened or closed since the shell started: tell it, without touching `$?`."""
        old, new = self._proxy_env, self._box.proxy_env
        gone = " ".join(sorted(old.keys() - new.keys()))
        text = f"builtin unset -v {gone}; " if gone else ""
        text += "builtin export " + " ".join(f"{k}='{v}'" for k, v in new.items()) + "; " if new else ""
        self._proxy_env = new
        await self._run(f"{text}__rock_return $__rock_status", time.monotonic() + 10, 16)

    async def save(self) -> tuple[str, str] | None:
        """The state of an idle shell; None when it has none or is busy."""
        if not self.is_running:
            return self.state
        if not await self._lock.acquire(time.monotonic() + 0.001):
            return None
        try:
            if self.is_running:
                self.state = None
                await self._run(_SAVE, time.monotonic() + 5, 16)
            return self.state
        finally:
            self._lock.release()

    def _send(self, command: str) -> bytes:
        """Write a command to the shell; returns what did not fit into the pipe."""
        data = command.encode("utf-8", "surrogateescape") + b"\0"
        fd = self._fds["command"]
        os.set_blocking(fd, False)
        self._sent, self._size = 0, len(data)
        try:
            self._sent = os.write(fd, data)
        except BlockingIOError:
            return data
        except BrokenPipeError:
            return b""  # the shell has just died; its exit is being reported
        return data[self._sent :]

    def _unread(self) -> int:
        """Bytes of commands that the shell has not read."""
        count = array.array("i", [0])
        fcntl.ioctl(self._fds["command"], termios.FIONREAD, count)
        return count[0]

    def _feed(self, rest: bytes) -> None:
        """Continue a long command as the shell reads it."""
        fd = self._fds["command"]

        def more() -> None:
            nonlocal rest
            try:
                count = os.write(fd, rest)
            except BlockingIOError:
                return
            except BrokenPipeError:
                count = len(rest)
            self._sent += count
            rest = rest[count:]
            if not rest:
                self._loop.remove_writer(fd)

        self._loop.add_writer(fd, more)

    async def _run(self, command: str, deadline: float, output_bytes: int) -> dict | None:
        """The result; None when the shell had been killed before it read all of the command (it is closed then)."""
        started = time.monotonic()
        since = process.ticks_now()
        box = self._box
        oom_before = box.oom_kills()
        output = process.Output(output_bytes)
        drain = process.Drain(self._loop, self._fds["output"], output)
        self._status = None
        self._changed = Event(self._loop)
        rest = self._send(command)
        if rest:
            self._feed(rest)
        finished = await self._changed.wait(deadline) if self._exit_status is None else True
        if not finished:
            await self._abort(since)
        if rest and self._fds:
            self._loop.remove_writer(self._fds["command"])
        drain.read_available()
        drain.close()
        if self._exit_status is not None:
            code, number = process.exit_of(self._exit_status)
            # bash reads byte by byte up to the final NUL; one that dies of a signal may still have taken a byte.
            incomplete = finished and (self._sent < self._size or self._unread() > 0)
            self.close()
            if incomplete:
                await box.settle()
                return None
        else:
            code = self._status or 0
            number = process.signal_of(code)
            self._cwd = self._directory()
        if number == signal.SIGKILL and finished:
            await box.settle()
        return box.result(code, number if finished else None, not finished, output, oom_before, started)

    async def _abort(self, since: int) -> None:
        """Kill what the command started and make the shell exit through its trap, or kill it if it will not."""
        if self._exit_status is not None:
            return
        self._cwd = self._directory()
        self._kill(_ABORT)
        give_up = time.monotonic() + _GRACE_SECONDS
        while self._exit_status is None and self._box.alive:
            process.kill_command(self._pid, since, self._box.keep(), self._box.pids)
            self._changed = Event(self._loop)
            if self._exit_status is None:
                await self._changed.wait(time.monotonic() + 0.02)
            if time.monotonic() > give_up and self._exit_status is None:
                self._kill(signal.SIGKILL)
        await self._box.end_command(self._pid, since)

    def _kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def _directory(self) -> str | None:
        try:
            return os.readlink(f"/proc/{self._pid}/cwd").removesuffix(" (deleted)")
        except OSError:
            return None

    def abandon(self) -> None:
        """The sandbox is gone: wake whoever waits."""
        self._changed.set()
