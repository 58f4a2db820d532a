"""Real admins for tests: processes that listen on loopback, with worker processes and sandboxes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

import rock_env
from rock_env.remote import Client

_REPOSITORY = Path(rock_env.__file__).parents[1]
_BOOT = """
import json, sys
from pathlib import Path
from rock_env.admin.server import AdminConfig, serve
settings = json.loads(sys.argv[1])
for name in ("directory", "certificate", "private_key"):
    if name in settings:
        settings[name] = Path(settings[name])
settings["joined"] = tuple(map(tuple, settings.get("joined", ())))
serve(AdminConfig(**settings))
"""


class AdminProcess:
    """An admin in `directory`, which can be killed and started again."""

    def __init__(self, directory, env=None, **settings):
        self.directory = Path(directory)
        defaults = {"port": 0, "workers": 1, "reconcile_seconds": 0.2, "worker_seconds": 3.0, "orphan_seconds": 5.0}
        self.settings = {"directory": str(directory), **defaults, **settings}
        self._env = {**os.environ, "PYTHONPATH": str(_REPOSITORY), **(env or {})}
        self.log = self.directory.with_suffix(".log")
        self.process = None
        self._clients = []

    def start(self):
        (self.directory / "url").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", _BOOT, json.dumps(self.settings)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._env, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (self.directory / "url").exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.url = (self.directory / "url").read_text().strip()
        self.key = (self.directory / "admin.key").read_text().strip()
        return self

    def client(self, token=None, **settings):
        self._clients.append(Client(self.url, token or self.key, **settings))
        return self._clients[-1]

    def http(self, token=None):
        headers = {"Authorization": f"Bearer {token or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def new_tenant(self, name, **quota):
        """A client with a key of a new tenant; `.token` is the key."""
        admin = self.client()
        admin.post("/v1/tenants", {"name": name, **quota})
        key = admin.post(f"/v1/tenants/{name}/keys", {})
        client = self.client(key["key"])
        client.token = key["key"]
        return client

    def worker_pid(self, name="w1"):
        return int((self.directory / "workers" / name / "lock").read_text())

    def kill(self):
        self.process.kill()
        self.process.wait(60)

    def stop(self):
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(60)
        for lock in self.directory.glob("workers/*/lock"):  # of a test that failed half-way
            with contextlib.suppress(OSError, ValueError):
                pid = int(lock.read_text())
                if b"worker_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
