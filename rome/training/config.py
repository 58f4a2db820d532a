"""Run configuration: one Python file a run, typed overrides on the command line, and nothing silently ignored.

A config file defines `get_config() -> ml_collections.ConfigDict`. Every override is parsed with the type of the value
that it replaces, an unknown name is an error that suggests the nearest valid one, and the result is locked.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import json
import math
import os
import runpy
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from rome.files import atomic_write

T = TypeVar("T")

RESUME_MODES = ("auto", "resume", "fresh")
# Where and how a run is started says nothing about what it computes: never compared on resume.
LAUNCH_KEYS = ("workdir", "resume")


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key, the value and what was expected."""


def load_config(argv: Sequence[str]) -> ConfigDict:
    """Reads `--config=FILE.py`, `--config.KEY=VALUE`…, `--workdir=DIR`, `--resume`, `--fresh` into a locked ConfigDict.

    Args:
        argv: the arguments, without the program's name (`sys.argv[1:]`). `--flag value` works too.

    Returns:
        The file's config with the overrides applied, and two launch keys at the top level: `workdir` (default:
        `runs/` + the config file's stem) and `resume`, one of `auto` (continue if the run exists), `resume` (it must
        exist), `fresh` (start again; the old run is kept aside). See `open_run`.

    Raises:
        ConfigError: unknown flag or key, a value of the wrong type, a file that is missing or has no `get_config`.
        SystemExit: with status 0 after `--help`.
    """
    flags = list(_split_flags(argv))
    files = [value for name, value in flags if name == "config"]
    if len(files) != 1 or not files[0]:
        raise ConfigError(f"expected exactly one --config=FILE.py, got {len(files)}")
    config = _load_file(Path(files[0]))
    with config.unlocked():
        config.workdir = config.get("workdir", str(Path("runs") / Path(files[0]).stem))
        config.resume = config.get("resume", "auto")
    config.lock()
    if any(name == "help" for name, _ in flags):
        print(_usage(config))
        raise SystemExit(0)
    modes = {name for name, _ in flags if name in ("resume", "fresh")}
    if len(modes) == 2:
        raise ConfigError("--resume and --fresh exclude each other")
    for name, value in flags:
        if name.startswith("config."):
            set_key(config, name.removeprefix("config."), value)
        elif name == "workdir":
            if not value:
                raise ConfigError("--workdir: expected a directory, got an empty string")
            config.workdir = value
    if modes:
        config.resume = modes.pop()
    if config.resume not in RESUME_MODES:
        raise ConfigError(f"resume: expected one of {', '.join(RESUME_MODES)}, got {config.resume!r}")
    return config


def set_key(config: ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` to `text`, parsed with the type of the present value.

    Raises:
        ConfigError: no such key, a key that is a whole section, or text of another type.
    """
    valid = dict(flatten(config))
    section: Any = config
    *parents, leaf = key.split(".")
    for part in parents:
        if not isinstance(section, ConfigDict) or part not in section:
            raise ConfigError(f"unknown config key {key!r}{_nearest(key, valid)}")
        section = section[part]
    if not isinstance(section, ConfigDict) or leaf not in section:
        raise ConfigError(f"unknown config key {key!r}{_nearest(key, valid)}")
    if isinstance(section[leaf], ConfigDict):
        raise ConfigError(
            f"config key {key!r} is a section: set one of {', '.join(f'{key}.{k}' for k in section[leaf])}"
        )
    expected = section.get_type(leaf)
    section[leaf] = _parse(key, text, section[leaf], expected)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `(dotted key, value)` for every leaf; an empty section is a leaf."""
    for key in config:
        value = config[key]
        if isinstance(value, (ConfigDict, Mapping)) and len(value):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_to_dataclass(cls: type[T], section: Mapping[str, Any] | ConfigDict, name: str = "") -> T:
    """Builds the dataclass `cls` from a config section, strictly.

    Nested dataclasses are built from nested sections, lists become tuples where the field says so, and an int is
    accepted where a float is expected. Fields with a default may be left out.

    Args:
        name: dotted path of the section, for messages (default: the name of the class).

    Raises:
        ConfigError: an unknown key, a missing field without a default, or a value of another type; names the field.
    """
    name = name or cls.__name__
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in section:
        if key not in fields:
            raise ConfigError(f"{name}: unknown key {key!r}{_nearest(key, fields)}")
    values = {}
    for key, field in fields.items():
        if key in section:
            values[key] = _coerce(section[key], hints[key], f"{name}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{name}: missing key {key!r} ({_type_name(hints[key])})")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # the class's own validation, told with the section's name
        raise error if isinstance(error, ConfigError) else ConfigError(f"{name}: {error}") from error


def dump_config(config: ConfigDict | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the resolved config as JSON, atomically as `rome.files.atomic_write` does. Tuples become lists."""
    atomic_write(path, json.dumps(_plain(config), indent=2) + "\n")


def differing_keys(old: Mapping[str, Any], new: ConfigDict | Mapping[str, Any]) -> list[str]:
    """Lists `key: was A, now B` for every leaf in which two configs differ, launch keys left out."""
    before, after = dict(flatten(_plain(old))), dict(flatten(_plain(new)))
    keys = [key for key in {**before, **after} if key.split(".")[0] not in LAUNCH_KEYS]
    show = {key: (before.get(key, _Absent), after.get(key, _Absent)) for key in keys}
    return [f"{key}: was {_show(was)}, now {_show(now)}" for key, (was, now) in show.items() if not _same(was, now)]


def check_resumed(path: str | os.PathLike[str], config: ConfigDict, may_change: Iterable[str] = ()) -> None:
    """Refuses to continue a run whose `config.json` at `path` differs from `config`.

    Args:
        may_change: dotted keys that may differ (a longer schedule, how often to log).

    Raises:
        ConfigError: lists every differing key with both values; or the file cannot be read.
    """
    try:
        old = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config of the run to resume: {path}: {error}") from error
    allowed = set(may_change)
    differences = [line for line in differing_keys(old, config) if line.split(":", 1)[0] not in allowed]
    if differences:
        listing = "\n  ".join(differences)
        raise ConfigError(
            f"{Path(path).parent} was started with another config:\n  {listing}\n"
            "Use the same values to resume, another --workdir, or --fresh to start again."
        )


def open_run(config: ConfigDict, may_change: Iterable[str] = ()) -> tuple[Path, bool]:
    """Opens the run directory of `config.workdir` as `config.resume` asks, and writes `config.json` there.

    `fresh` never deletes: an existing run is renamed to `NAME.old-1`, `NAME.old-2`, ….

    Returns:
        The directory, and whether it holds an earlier part of this run.

    Raises:
        ConfigError: `resume` without a run, or a run that was started with another config (see `check_resumed`).
    """
    directory = Path(config.workdir)
    saved = directory / "config.json"
    exists = saved.is_file()
    if config.resume == "resume" and not exists:
        raise ConfigError(f"--resume: no run to resume in {directory} (no config.json)")
    if config.resume == "fresh" and directory.exists() and any(directory.iterdir()):
        number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}.old-{n}").exists())
        directory.rename(directory.with_name(f"{directory.name}.old-{number}"))
        exists = False
    if exists:
        check_resumed(saved, config, may_change)
    directory.mkdir(parents=True, exist_ok=True)
    dump_config(config, saved)
    return directory, exists


# ---------------------------------------------------------------- command line


def _split_flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    known = ("config", "workdir", "resume", "fresh", "help")
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            argument = "--help"
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}: expected --config=FILE.py, --config.KEY=VALUE, …")
        name, equals, value = argument[2:].partition("=")
        if name not in known and not name.startswith("config."):
            raise ConfigError(f"unknown flag --{name}{_nearest(name, known, '--')}")
        if name in ("resume", "fresh", "help"):
            if equals:
                raise ConfigError(f"--{name} takes no value, got {value!r}")
        elif not equals:
            if not arguments or arguments[0].startswith("--"):
                raise ConfigError(f"--{name}: expected a value")
            value = arguments.pop(0)
        yield name, value


def _load_file(path: Path) -> ConfigDict:
    if not path.is_file():
        siblings = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(f"--config: no such file: {path}{_nearest(str(path), siblings)}")
    get_config = runpy.run_path(str(path)).get("get_config")
    if not callable(get_config):
        raise ConfigError(f"--config: {path} defines no get_config()")
    config = get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config: get_config() of {path} returned {type(config).__name__}, expected ConfigDict")
    return config


def _usage(config: ConfigDict) -> str:
    lines = [f"  --config.{key}={_typed(value)}" for key, value in flatten(config) if key not in LAUNCH_KEYS]
    return "\n".join(
        [
            "usage: --config=FILE.py [--workdir=DIR] [--resume | --fresh] [--config.KEY=VALUE ...]",
            f"  --workdir={config.workdir}",
            "  --resume  the run must exist (default: resume if it exists)",
            "  --fresh   start again; the old run is kept aside",
            "config keys and their values:",
            *lines,
        ]
    )


def _typed(value: Any) -> str:
    """The value as one would type it on the command line."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(_typed, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _nearest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    if not close:  # the right leaf under another section is the likeliest slip
        close = [key for key in valid if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return f" (did you mean {prefix + close[0]!r}?)" if close else ""


# ---------------------------------------------------------------- values


def _parse(key: str, text: str, current: Any, expected: type) -> Any:
    """Parses `text` as `expected`; a value that is None now also takes `none`, and any literal if it has no type."""
    if current is None and text.strip().lower() == "none":
        return None
    if expected is type(None):
        return _literal(text)
    if issubclass(expected, (tuple, list)):
        return expected(_parse_items(key, text, current or ()))
    try:
        return _parse_scalar(text, expected)
    except (ValueError, TypeError):
        raise ConfigError(f"config key {key!r}: expected {expected.__name__}, got {text!r}") from None


def _parse_scalar(text: str, expected: type) -> Any:
    """Raises ValueError or TypeError."""
    if expected is bool:
        return {"true": True, "1": True, "false": False, "0": False}[_one_of(text, ("true", "1", "false", "0"))]
    if expected is float and math.isnan(float(text)):
        raise ValueError(text)
    if expected in (str, int, float):
        return expected(text)
    raise TypeError(expected)


def _one_of(text: str, choices: Sequence[str]) -> str:
    word = text.strip().lower()
    if word not in choices:
        raise ValueError(text)
    return word


def _parse_items(key: str, text: str, current: Sequence[Any]) -> list[Any]:
    body = text.strip()
    if body[:1] in "([" and body[-1:] in ")]":
        body = body[1:-1]
    items = [item.strip().strip("'\"") for item in body.split(",") if item.strip()]
    kinds = {type(item) for item in current}
    if len(kinds) != 1:
        return [_literal(item) for item in items]
    kind = kinds.pop()
    try:
        return [_parse_scalar(item, kind) for item in items]
    except (ValueError, TypeError):
        raise ConfigError(f"config key {key!r}: expected {kind.__name__} values, got {text!r}") from None


def _literal(text: str) -> Any:
    lowered = text.strip().lower()
    if lowered in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[lowered]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """Returns `value` as the annotation `hint` wants it, or raises ConfigError naming the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, arguments, name)
    if origin in (tuple, list) or hint in (tuple, list):
        return _coerce_items(value, origin or hint, arguments, name)
    if dataclasses.is_dataclass(hint) and isinstance(value, (ConfigDict, Mapping)):
        return config_to_dataclass(hint, value, name)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise ConfigError(f"{name}: expected one of {[m.value for m in hint]}, got {value!r}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind = origin or hint
    if isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ConfigError(f"{name}: expected {_type_name(hint)}, got {value!r} ({type(value).__name__})")
    return value


def _coerce_union(value: Any, options: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in options:
        return None
    exact = [option for option in options if isinstance(option, type) and type(value) is option]
    for option in exact or [option for option in options if option is not type(None)]:
        try:
            return _coerce(value, option, name)
        except ConfigError:
            continue
    expected = " or ".join(_type_name(option) for option in options)
    raise ConfigError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")


def _coerce_items(value: Any, kind: type, arguments: tuple[Any, ...], name: str) -> Any:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r} ({type(value).__name__})")
    if not arguments:
        return kind(value)
    if kind is tuple and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise ConfigError(f"{name}: expected {len(arguments)} values, got {len(value)}")
        hints: Sequence[Any] = arguments
    else:
        hints = [arguments[0]] * len(value)
    return kind(_coerce(item, hint, f"{name}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _type_name(hint: Any) -> str:
    return (
        "None" if hint is type(None) else hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    )


class _Absent:
    """Stands for a key that one of two configs does not have."""


def _show(value: Any) -> str:
    return "absent" if value is _Absent else json.dumps(_plain(value))


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _plain(value: Any) -> Any:
    """JSON's view of a config value: sections as dicts, tuples as lists."""
    if isinstance(value, (ConfigDict, Mapping)):
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"a config holds plain values only, got {value!r} ({type(value).__name__})")
