"""Carry a secret out in a name that the egress proxy would have to resolve."""

import socket

from attack import PARAMETERS, Refused, attempt


def ask(request):
    with socket.create_connection(("127.0.0.1", PARAMETERS["proxy"]), timeout=3) as client:
        client.sendall(request.encode())
        answer = client.recv(1000).partition(b"\r\n")[0]
        if b" 403 " in answer:
            raise Refused(answer.decode())
        return answer


name = PARAMETERS["name"]
attempt("CONNECT", lambda: ask(f"CONNECT {name}:443 HTTP/1.1\r\n\r\n"))
attempt("GET", lambda: ask(f"GET http://{name}/ HTTP/1.1\r\n\r\n"))
