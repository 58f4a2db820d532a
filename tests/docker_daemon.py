"""A Docker daemon of the tests' own: its data, socket, network and mounts apart from any other, and gone at the end.

python tests/docker_daemon.py COMMAND...   runs a command with DOCKER_HOST set to such a daemon.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processes import descendants, still_there

_PROGRAMS = ("dockerd", "containerd", "runc", "iptables", "ip", "unshare", "setpriv")
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_START_SECONDS = 60.0
_END_SECONDS = 20.0
# In network and mount namespaces of its own: it finds only a loopback, and what it mounts, the memory that holds its
# images included, goes with it.
_ISOLATE = 'ip link set lo up && mount -t tmpfs -o size=2g,mode=711 rock "$0" && exec "$@"'


def missing() -> str:
    """Why no daemon can be started here; "" if one can."""
    if os.geteuid() != 0:
        return "a Docker daemon of the tests' own needs root"
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)} here: `make docker` installs them on Debian"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, timeout=20)
    return f"a Docker daemon needs namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class DockerDaemon:
    """`start` and `stop` have deadlines; `url` is its address."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rock-dockerd-", dir="/tmp"))
        self.url = f"unix://{self.directory}/docker.sock"
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        """The daemon's own process."""
        return int((self.directory / "dockerd.pid").read_text())

    def start(self) -> None:
        place = self.directory
        command = ["dockerd", f"--data-root={place}/data", f"--exec-root={place}/exec", f"--host={self.url}"]
        command += [f"--pidfile={place}/dockerd.pid", "--storage-driver=overlay2", "--default-ulimit=nofile=4096:4096"]
        os.mkdir(place / "data", 0o711)
        mortal = ["setpriv", "--pdeathsig", "TERM"]  # also when this process is killed
        isolated = [
            *mortal,
            "unshare",
            "--net",
            "--mount",
            "--propagation=private",
            "bash",
            "-c",
            _ISOLATE,
            f"{place}/data",
        ]
        with open(place / "log", "wb") as log:
            self._process = subprocess.Popen(
                [*isolated, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PATH": _PATH},
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (place / "log").read_text(errors="replace")[-3000:]
                self.stop()
                raise RuntimeError(f"dockerd did not start:\n{log}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            connection.connect(f"{self.directory}/docker.sock")
            connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b"200 OK" in connection.recv(1000)
        return False

    def stop(self) -> None:
        """End it and everything that it started, and remove its files. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            mine = _family(process.pid, str(self.directory))
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pid in still_there(mine):  # containerd and its shims, where the daemon did not take them with it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)


def _family(root: int, directory: str) -> dict[int, str]:
    """{pid: start time} of a daemon's processes: what it has started, and orphans that work in its directory."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    orphans = {pid for pid in pids if directory.encode() in _arguments(pid)} - {os.getpid()}
    found = descendants(root, *orphans)
    found.pop(root, None)
    return found


def _arguments(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def main() -> int:
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    daemon = DockerDaemon()
    try:
        daemon.start()
        return subprocess.run(sys.argv[1:], env={**os.environ, "DOCKER_HOST": daemon.url}).returncode
    finally:
        daemon.stop()


if __name__ == "__main__":
    sys.exit(main())
