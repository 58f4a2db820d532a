"""Find another sandbox's file, process and listening socket."""

import os
import socket
from pathlib import Path

from attack import PARAMETERS, Refused, attempt

marker = PARAMETERS["marker"]


def find_file():
    for folder, below, names in os.walk("/"):
        if marker in names:
            return os.path.join(folder, marker)
        below[:] = [name for name in below if os.path.join(folder, name) not in ("/proc", "/usr")]
    raise Refused("no such file anywhere")


def find_process():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if PARAMETERS["command"] in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                return pid
        except FileNotFoundError:
            continue
    raise Refused("no such process")


attempt("find its file", find_file)
attempt("find its process", find_process)
attempt("connect to its server", lambda: socket.create_connection(("127.0.0.1", PARAMETERS["port"]), timeout=2))
