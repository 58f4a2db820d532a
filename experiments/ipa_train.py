"""Trains a ROME policy end to end: demonstrations → CPT → SFT → IPA → report.

    python experiments/ipa_train.py --config=configs/rome_tiny.py [--config.ipa.gamma=0.9] [--workdir=DIR] [--fresh]

Run the same command again to continue a run that was interrupted, however it was. `--help` lists every key.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def main(argv: list[str]) -> int:
    from rome.training.config import ConfigError, load_config

    console = Console()
    try:
        config = load_config(argv)
        # imported late, so that a typo in the command line is answered at once
        from rome.training.run import train

        results = train(config)
    except ConfigError as error:
        console.print(f"[bold red]config error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues from the last checkpoint")
        return 130
    except Exception as error:
        from rome.training.failures import EXPECTED_FAILURES

        if not isinstance(error, EXPECTED_FAILURES):
            raise
        message = escape(" ".join(str(error).split()))
        console.print(f"[bold red]{type(error).__name__}:[/] {message}", soft_wrap=True)
        return 2
    show(console, results)
    console.print(f"report: {config.workdir}/report.html", soft_wrap=True)
    return 0


def show(console: Console, results: dict) -> None:
    """Success by family and by horizon, for each evaluation."""
    for name, result in results.items():
        table = Table(title=f"{name}: {result['success']:.3f} [{result['low']:.3f}, {result['high']:.3f}]")
        horizons = sorted({h for row in result["cells"].values() for h in row}, key=int)
        for title in ("family", *(f"h={h}" for h in horizons), "all"):
            table.add_column(title)
        for family, row in result["cells"].items():
            cells = [f"{row[h]:.2f}" if h in row else "" for h in horizons]
            table.add_row(family, *cells, f"{result['by_family'][family]:.2f}")
        table.add_row("all", *(f"{result['by_horizon'].get(h, float('nan')):.2f}" for h in horizons), "")
        console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
