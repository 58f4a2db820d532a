"""Writes the policy of a run that started from a published model as a Hugging Face folder.

python experiments/export.py --run=runs/NAME --to=FOLDER [--step=CHECKPOINT]
"""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", required=True, help="the run's directory")
    parser.add_argument("--to", required=True, help="the folder to write; it must not hold weights")
    parser.add_argument("--step", type=int, help="the checkpoint's number (default: the newest)")
    arguments = parser.parse_args(argv)
    from rome.training.failures import EXPECTED_FAILURES
    from rome.training.pretrained import export_run

    try:
        step = export_run(arguments.run, arguments.to, arguments.step)
    except EXPECTED_FAILURES as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.to}: checkpoint {step} of {arguments.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
