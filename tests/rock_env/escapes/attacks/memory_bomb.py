"""Take four times the memory limit, in a child that the kernel will kill."""

import os
import signal

from attack import PARAMETERS, Refused, attempt


def take():
    pid = os.fork()
    if pid == 0:
        kept = []
        for _ in range(4 * PARAMETERS["mebibytes"]):
            kept.append(bytearray(b"x") * (1 << 20))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        raise Refused("killed")
    return status


attempt("four times the limit", take)
