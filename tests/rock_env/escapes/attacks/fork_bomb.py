"""Fork without end, for half a second."""

import os
import signal
import time

from attack import attempt

signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def fork_on():
    parent, made, end = os.getpid(), 0, time.monotonic() + 0.5
    while time.monotonic() < end and made < 500:
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        made += 1
    return parent and made


attempt("500 processes", fork_on)
