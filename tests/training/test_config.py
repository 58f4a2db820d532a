import dataclasses
import json
import runpy
from pathlib import Path
from typing import Literal

import pytest
from ml_collections import ConfigDict

from rome.models.paged import Paging
from rome.models.sharding import MeshConfig
from rome.training.config import (
    ConfigError,
    check_resumed,
    config_to_dataclass,
    dump_config,
    flatten,
    load_config,
    open_run,
)
from rome.training.settings import load_settings

FILE = """
from ml_collections import ConfigDict, config_dict

def get_config():
    config = ConfigDict()
    config.seed = 1
    config.ipa = ConfigDict({"gamma": 0.95, "mismatch_lower": config_dict.placeholder(float), "baseline": "none"})
    config.data = ConfigDict({"horizons": (1, 2, 3), "families": ("a", "b"), "pack": True, "extra": None})
    return config
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--config.ipa.gamma=1", "ipa.gamma", 1.0),
        ("--config.ipa.mismatch_lower=0.2", "ipa.mismatch_lower", 0.2),
        ("--config.ipa.mismatch_lower=none", "ipa.mismatch_lower", None),
        ("--config.ipa.baseline=none", "ipa.baseline", "none"),
        ("--config.data.horizons=4,5", "data.horizons", (4, 5)),
        ("--config.data.horizons=(7,)", "data.horizons", (7,)),
        ("--config.data.horizons=()", "data.horizons", ()),
        ("--config.data.families=x, y", "data.families", ("x", "y")),
        ("--config.data.pack=false", "data.pack", False),
        ("--config.data.extra=3", "data.extra", 3),
        ("--config.data.extra=word", "data.extra", "word"),
        ("--config.seed=-7", "seed", -7),
        ("--fresh", "resume", "fresh"),
        ("--resume", "resume", "resume"),
        ("--workdir=elsewhere", "workdir", "elsewhere"),
    ],
)
def test_override_takes_the_type_of_the_value_it_replaces(file, argument, key, value):
    before = dict(flatten(load_config([f"--config={file}"])))
    after = dict(flatten(load_config([f"--config={file}", argument])))
    assert after[key] == value
    assert type(after[key]) is type(value)
    assert {name for name in after if after[name] != before[name]} <= {key}


def test_value_may_stand_in_the_next_argument(file):
    config = load_config(["--config", str(file), "--config.seed", "5", "--workdir", "here"])
    assert (config.seed, config.workdir) == (5, "here")


def test_defaults_come_from_the_file_and_its_name(file):
    config = load_config([f"--config={file}"])
    assert (config.workdir, config.resume, config.ipa.gamma) == ("runs/tiny", "auto", 0.95)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--config.ipa.gama=1", ("ipa.gama", "did you mean 'ipa.gamma'")),
        ("--config.gamma=1", ("gamma", "did you mean 'ipa.gamma'")),
        ("--config.ipa.gamma.x=1", ("ipa.gamma.x",)),
        ("--confg=x", ("--confg", "did you mean '--config'")),
        ("--workdr=x", ("--workdr", "did you mean '--workdir'")),
        ("--config.ipa=3", ("section", "ipa.gamma")),
        ("--config.seed=1.5", ("'seed'", "expected int", "'1.5'")),
        ("--config.ipa.gamma=high", ("'ipa.gamma'", "expected float", "'high'")),
        ("--config.ipa.gamma=nan", ("expected float", "'nan'")),
        ("--config.ipa.mismatch_lower=low", ("expected float", "'low'")),
        ("--config.data.pack=yes", ("expected bool", "'yes'")),
        ("--config.data.horizons=1,x", ("'data.horizons'", "int", "'1,x'")),
        ("--resume=now", ("--resume takes no value",)),
        ("--workdir=", ("--workdir", "empty")),
        ("stray", ("unexpected argument 'stray'",)),
        ("--workdir", ("--workdir: expected a value",)),
    ],
)
def test_what_is_wrong_is_named(file, argument, parts):
    with pytest.raises(ConfigError) as caught:
        load_config([f"--config={file}", argument])
    for part in parts:
        assert part in str(caught.value)


def test_bad_files_are_named(file, tmp_path):
    with pytest.raises(ConfigError, match=r"tiyn\.py.*did you mean.*tiny\.py"):
        load_config([f"--config={tmp_path}/tiyn.py"])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="defines no get_config"):
        load_config([f"--config={tmp_path}/empty.py"])
    with pytest.raises(ConfigError, match="exactly one --config"):
        load_config([])
    with pytest.raises(ConfigError, match="exclude each other"):
        load_config([f"--config={file}", "--resume", "--fresh"])


def test_config_is_locked_against_new_keys_and_types(file):
    config = load_config([f"--config={file}"])
    with pytest.raises(AttributeError):
        config.ipa.gama = 1.0
    with pytest.raises(TypeError):
        config.seed = "one"


def test_help_lists_every_key_as_it_can_be_typed(file, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config([f"--config={file}", "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    shown = [line.strip() for line in out.splitlines() if line.strip().startswith("--config.")]
    assert "--config.data.horizons=1,2,3" in shown
    assert load_config([f"--config={file}", *shown]).to_dict() == load_config([f"--config={file}"]).to_dict()


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    rates: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    level: Literal["token", "chunk"]
    inner: Inner
    lower: float | None = None
    pair: tuple[int, str] = (0, "")

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: expected at least one letter")


GOOD = {"name": "n", "level": "chunk", "inner": {"width": 3, "rates": [1, 0.5]}}


def test_dataclass_is_built_with_nested_sections_and_widened_numbers():
    built = config_to_dataclass(Outer, ConfigDict({**GOOD, "lower": 1, "pair": (1, "x")}))
    assert built == Outer("n", "chunk", Inner(3, (1.0, 0.5)), 1.0, (1, "x"))
    assert all(isinstance(rate, float) for rate in (*built.inner.rates, built.lower))
    assert config_to_dataclass(Outer, GOOD).lower is None


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"nmae": "x"}, ("ipa", "unknown key 'nmae'", "'name'")),
        ({"level": "word"}, ("ipa.level", "'token', 'chunk'", "'word'")),
        ({"name": 3}, ("ipa.name", "expected str", "3 (int)")),
        ({"name": ""}, ("ipa", "at least one letter")),
        ({"inner": {"width": 2.5}}, ("ipa.inner.width", "expected int", "2.5")),
        ({"inner": {"width": True}}, ("ipa.inner.width", "expected int", "True")),
        ({"inner": {}}, ("ipa.inner", "missing key 'width'")),
        ({"inner": {"width": 1, "rates": ["a"]}}, ("ipa.inner.rates[0]", "expected float")),
        ({"inner": {"width": 1, "rates": 1.0}}, ("ipa.inner.rates", "expected tuple")),
        ({"lower": "x"}, ("ipa.lower", "float or None", "'x'")),
        ({"pair": (1,)}, ("ipa.pair", "expected 2 values, got 1")),
    ],
)
def test_dataclass_errors_name_the_field(change, parts):
    with pytest.raises(ConfigError) as caught:
        config_to_dataclass(Outer, {**GOOD, **change}, "ipa")
    for part in parts:
        assert part in str(caught.value)


def test_dumped_config_is_the_resolved_one(file, tmp_path):
    dump_config(load_config([f"--config={file}", "--config.data.horizons=9"]), tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["data"] == {"horizons": [9], "families": ["a", "b"], "pack": True, "extra": None}


def test_resume_refuses_another_config_and_lists_what_differs(file, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    directory, resumed = open_run(load_config([f"--config={file}", workdir]))
    assert (directory, resumed) == (tmp_path / "run", False)
    _, resumed = open_run(load_config([f"--config={file}", workdir, "--resume"]))
    assert resumed
    other = load_config([f"--config={file}", workdir, "--config.ipa.gamma=0.5", "--config.data.extra=2"])
    with pytest.raises(ConfigError) as caught:
        open_run(other)
    assert "ipa.gamma: was 0.95, now 0.5" in str(caught.value)
    assert "data.extra: was null, now 2" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert open_run(other, may_change=("ipa.gamma", "data.extra"))[1]


def test_fresh_keeps_the_old_run_aside(file, tmp_path):
    arguments = [f"--config={file}", f"--workdir={tmp_path}/run"]
    directory, _ = open_run(load_config(arguments))
    (directory / "metrics.jsonl").write_text("old\n")
    directory, resumed = open_run(load_config([*arguments, "--fresh", "--config.seed=2"]))
    assert not resumed
    assert not (directory / "metrics.jsonl").exists()
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == "old\n"
    open_run(load_config([*arguments, "--fresh"]))
    assert (tmp_path / "run.old-2" / "config.json").exists()


def test_resume_needs_a_run(file, tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        open_run(load_config([f"--config={file}", f"--workdir={tmp_path}/none", "--resume"]))


def test_unreadable_saved_config_is_named(file, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        check_resumed(tmp_path / "config.json", load_config([f"--config={file}"]))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("rome_tiny_moe.py", {"rl": {"router_replay": True}}, "rl.router_replay: expected engine.record_experts"),
        (
            "rome_tiny.py",
            {"engine": {"record_experts": True}},
            "engine.record_experts: expected model.num_experts",
        ),
    ],
)
def test_router_replay_needs_experts_and_their_record(file, changes, message):
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / file))["get_config"]()
    load_settings(config)
    with config.unlocked():
        for section, values in changes.items():
            config[section].update(values)
    with pytest.raises(ConfigError, match=message):
        load_settings(config)


def test_router_replay_is_set_in_two_places():
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "rome_tiny_moe.py"))["get_config"]()
    with config.unlocked():
        config.rl.router_replay = config.engine.record_experts = True
    settings = load_settings(config)
    assert settings.rl.router_replay and settings.engine.record_experts


EIGHT = {"data": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": {"rollout": EIGHT, "train": EIGHT}},
            r"mesh: multiplex: expected train to have fewer .* \(8\), found 8",
        ),
        (
            {"mesh": {"rollout": {"data": 2, "tensor": 4}, "train": {"data": 2}}},
            r"mesh: multiplex: expected the devices that train leaves to be a multiple of 4 .* found 8 - 2 = 6",
        ),
        ({"rollout": {"async_ratio": 0.0}}, r"mesh\.multiplex: expected rollout\.async_ratio > 0 .* found 0 and 0"),
        ({"rollout": {"hosts": 2}}, r"mesh\.multiplex: expected .*rollout\.hosts = 0, found 1 and 2"),
        (
            {"mesh": {"train": {"data": 2}}},
            r"engine slots a cohort: expected a multiple of 6 \(the ways in which mesh\.rollout without mesh\.train",
        ),
        ({"engine": {"prompt_rows": 4}}, r"engine\.prompt_rows: expected a multiple of 8 .*mesh\.rollout splits"),
        ({"engine": {"page_size": 16}}, r"engine\.page_size: expected 0 with mesh\.multiplex"),
    ],
)
def test_multiplexing_needs_devices_to_lend_and_rollouts_that_go_on(changes, message):
    config = multiplexed()
    assert load_settings(config).mesh.narrow == MeshConfig(data=4)
    with config.unlocked():
        for section, values in changes.items():
            config[section].update(values)
    with pytest.raises(ConfigError, match=message):
        load_settings(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"rollout": {"data": 2}}}, r"engine\.page_size: expected 0 .*a mesh\.rollout that splits slots"),
        ({"rollout": {"agent": "native"}}, r"engine\.page_size: expected 0 with rollout\.agent = 'native', found 16"),
        ({"engine": {"pages": 30}}, r"pages: expected 0, or a multiple of cohorts of at least 32"),
    ],
)
def test_pages_where_there_can_be_none_are_refused(changes, message):
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "rome_tiny.py"))["get_config"]()
    config.engine.update(page_size=16, pages=64)
    assert load_settings(config).engine.paging == Paging(16, 32)
    with config.unlocked():
        for section, values in changes.items():
            config[section].update(values)
    with pytest.raises(ConfigError, match=message):
        load_settings(config)


def multiplexed():
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "rome_tiny.py"))["get_config"]()
    assert load_settings(config).mesh.multiplex is False
    with config.unlocked():
        config.mesh.update(multiplex=True, rollout=EIGHT, train={"data": 4})
        config.rollout.async_ratio = 1.0
        config.engine.prompt_rows = 8
    return config
