"""Connect to a listener on the host."""

import socket

from attack import PARAMETERS, attempt

for host in ("127.0.0.1", "::ffff:127.0.0.1"):
    attempt(f"connect to {host}", lambda host=host: socket.create_connection((host, PARAMETERS["port"]), timeout=2))
