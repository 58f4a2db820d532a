"""Open sockets that bypass the network stack or the namespace: packets, raw IP, hypervisor and kernel sockets."""

import socket

from attack import attempt

for family, kind in (("AF_PACKET", "SOCK_RAW"), ("AF_INET", "SOCK_RAW"), ("AF_INET6", "SOCK_RAW")):
    attempt(f"{family} {kind}", lambda f=family, k=kind: socket.socket(getattr(socket, f), getattr(socket, k), 1))
attempt("AF_VSOCK", lambda: socket.socket(40, socket.SOCK_STREAM))
attempt("AF_ALG", lambda: socket.socket(38, socket.SOCK_SEQPACKET))
