"""The `rome` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """ROME: training and serving of agentic language models."""


@app.command()
def serve(
    model: Annotated[Path, typer.Option(help="A run directory, or a Hugging Face folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="Name of the model for clients. Default: the folder's.")] = "",
    slots: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer. Default: the run's, or 2048.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of activations and cache, for a Hugging Face folder.")] = "float32",
    precision: Annotated[str, typer.Option(help="Of the weights: model, bfloat16 (and cache), or int8.")] = "model",
    queue_limit: Annotated[int, typer.Option(help="Sequences that may wait for a slot; more get a 429.")] = 64,
    request_seconds: Annotated[float, typer.Option(help="Deadline of a request.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="How long running requests may go on after SIGTERM.")] = 30.0,
    api_key_file: Annotated[Path | None, typer.Option(help="API keys, one a line (or ROME_API_KEYS=K1,K2).")] = None,
) -> None:
    """Serves a model over an OpenAI-compatible HTTP API (docs/serving.md)."""
    try:
        from rome.rollout.service import ServerConfig, ServiceConfig
        from rome.rollout.service import serve as run
    except ImportError as error:
        _fail(f"{error}; the service needs: pip install 'rome-agents[serve]'")
    from rome.rollout.stream import StreamConfig, StreamEngine

    try:
        keys = _api_keys(api_key_file)
        service = ServiceConfig(name or model.resolve().name, keys, request_seconds)
        server = ServerConfig(host, port, queue_limit, drain_seconds)
        params, config, chat, longest = _load(model, dtype)
        length = max_length or longest
        if config.max_position_embeddings and length > config.max_position_embeddings:
            raise ValueError(f"max_length: expected at most {config.max_position_embeddings}, found {length}")
        alternatives = min(20, config.vocab_size)
        settings = StreamConfig(slots, length, alternatives=alternatives, precision=precision)
        engine = StreamEngine(params, config, settings, chat.stop_ids, chat.pad_id)
        del params  # the engine has its own
    except (ValueError, OSError, RuntimeError) as error:  # what is wrong with the input, in one line
        _fail(str(error))
    engine.warmup()
    run(engine, chat, service, server)


def _fail(message: str) -> Any:
    print(f"rome serve: {message}", file=sys.stderr)
    raise typer.Exit(2)


def _api_keys(file: Path | None) -> tuple[str, ...]:
    """From the file, or the environment: a command line is there for all to read."""
    if file is None:
        return tuple(key.strip() for key in os.environ.get("ROME_API_KEYS", "").split(",") if key.strip())
    keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise ValueError(f"api_key_file: expected a key a line in {file}, found none")
    return keys


def _load(folder: Path, dtype: str) -> tuple[Any, Any, Any, int]:
    """(parameters, model config, chat format, default max_length)."""
    from rome.models import ChatRenderer, PretrainedTokenizer
    from rome.models.weights import load_pretrained
    from rome.rollout.service import RomeChat, TemplateChat

    if not (folder / "config.json").is_file():
        raise ValueError(f"model: expected a run directory or a Hugging Face folder (config.json), found {folder}")
    if (folder / "checkpoints").is_dir() or (folder / "tokenizer").is_dir():
        from rome.training.serving import load_policy

        params, config, tokenizer, longest = load_policy(folder)
        return params, config, RomeChat(ChatRenderer(tokenizer)), longest
    config, params = load_pretrained(folder, dtype=dtype)
    chat = TemplateChat(PretrainedTokenizer.from_folder(folder), config.vocab_size)
    return params, config, chat, min(2048, config.max_position_embeddings or 2048)
