"""Send datagrams to a receiver on the host that answers: connected, with sendto, with sendmsg."""

import socket

from attack import PARAMETERS, attempt

target = ("127.0.0.1", PARAMETERS["port"])


def exchange(send):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.5)
        send(client)
        return client.recv(100)


attempt("connect and send", lambda: exchange(lambda s: (s.connect(target), s.send(b"secret"))))
attempt("sendto", lambda: exchange(lambda s: s.sendto(b"secret", target)))
attempt("sendmsg", lambda: exchange(lambda s: s.sendmsg([b"secret"], [], 0, target)))
