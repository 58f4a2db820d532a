"""Signal a process of the host, by its number there."""

import os

from attack import PARAMETERS, attempt

attempt("kill", lambda: os.kill(PARAMETERS["pid"], 0))
attempt("killpg", lambda: os.killpg(PARAMETERS["pid"], 0))
attempt("pidfd_open", lambda: os.pidfd_open(PARAMETERS["pid"]))
