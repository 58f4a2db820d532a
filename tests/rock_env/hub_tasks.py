"""Folders in Harbor format for the tests of the hub and of the GEM API, written by hand."""

from pathlib import Path

DOCKERFILE = "FROM debian:bookworm-slim\nWORKDIR /app\nENV GREETING=hello\nCOPY files/ /app/\n"
TOML = 'version = "1.0"\n[environment]\ncpus = 1\nmemory_mb = 128\nstorage_mb = 32\n'
# 1 for the right answer; else the share of its characters that are right, so that rewards are no mere flags.
TEST_SH = """#!/bin/sh
secret=$(cat /tests/secret.txt)
if [ "$(cat answer.txt 2>/dev/null)" = "$secret" ]; then echo 1; else echo 0.25; fi > /logs/verifier/reward.txt
"""


def write_environment(folder, **files):
    """A folder with an environment alone; `files` of its own, by name."""
    folder = Path(folder)
    (folder / "environment" / "files").mkdir(parents=True)
    (folder / "task.toml").write_text(TOML)
    (folder / "environment" / "Dockerfile").write_text(DOCKERFILE)
    for name, text in {"hint.txt": "the answer is 42\n", **files}.items():
        (folder / "environment" / "files" / name).write_text(text)
    script = folder / "environment" / "files" / "run.sh"
    script.write_text("#!/bin/sh\necho ran\n")
    script.chmod(0o755)
    return folder


def write_task(folder, instruction="Write the answer that hint.txt gives into answer.txt.", test=TEST_SH, **files):
    """A task: the answer is 42, and a secret of the tests says so."""
    folder = write_environment(folder, **files)
    (folder / "instruction.md").write_text(f"{instruction}\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "test.sh").write_text(test)
    (folder / "tests" / "test.sh").chmod(0o755)
    (folder / "tests" / "secret.txt").write_text("42\n")
    return folder
