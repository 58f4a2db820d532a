"""`python -m rome`: the `rome` command."""

from rome.cli import app

app()
