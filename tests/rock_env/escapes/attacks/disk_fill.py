"""Write four times the disk limit."""

from attack import PARAMETERS, attempt


def fill(path):
    with open(path, "wb", 0) as file:
        for _ in range(4 * PARAMETERS["mebibytes"]):
            if file.write(b"x" * (1 << 20)) < 1 << 20:
                file.write(b"x")


for path in ("/app/fill", "/tmp/fill"):
    attempt(path, lambda path=path: fill(path))
