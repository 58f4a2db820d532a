"""Connect to an abstract unix socket of the host."""

import socket

from attack import PARAMETERS, attempt


def connect():
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        client.connect("\0" + PARAMETERS["name"])


attempt("connect", connect)
