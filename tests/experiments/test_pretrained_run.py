"""A run that starts from a published model: a tiny random one that transformers wrote, tokenizer and template too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from training_run import records

from rome.envs import draft_task, expert_actions
from rome.models import ConfigError as ModelConfigError
from rome.models import PretrainedTokenizer, TokenizerError, forward
from rome.models.lora import adapt, merge
from rome.models.weights import WeightsError, load_pretrained
from rome.training.checkpoint import Checkpointer, CheckpointError
from rome.training.config import ConfigError, load_config
from rome.training.pretrained import adopt, export_run, first_params, kept_config, kept_tokenizer
from rome.training.settings import PretrainedModel, load_settings
from rome.training.state import init_state, make_optimizer
from rome.trajectory import load_trajectories

torch = pytest.importorskip("torch", reason="needs the oracle torch")
transformers = pytest.importorskip("transformers", reason="needs the oracle transformers")

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parents[1] / "experiments"
CONFIG = f"--config={HERE / 'pretrained_run.py'}"
DEADLINE = 280.0  # of one run; on an idle core it takes less than a minute
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 520  # a few more than the tokenizer has, as published models do


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A Llama with random weights, in a folder of transformers' making."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tasks = [draft_task(family, seed, 3) for family in ("follow_hints", "count_matches") for seed in range(20)]
    texts = [task.task.instruction for task in tasks]
    texts += [action for task in tasks for action in expert_actions(task, 0, False) if action]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=508, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bpe.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    folder = tmp_path_factory.mktemp("published")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def command(script: str, *arguments: str) -> str:
    """Runs a script, which has to succeed; gives what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *arguments], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def run(sandbox_machine, published, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    command("ipa_train.py", CONFIG, f"--config.model.pretrained={published}", f"--workdir={workdir}")
    return workdir


@pytest.mark.slow
def test_it_is_trained_by_demonstrations_and_by_ipa(run):
    sft, ipa = records(run, "sft"), records(run, "ipa")
    assert sft[-1]["train/loss"] < 0.9 * sft[0]["train/loss"]
    assert [record["step"] for record in ipa] == [1, 2]
    assert all(record["train/grad_norm"] > 0 and record["compile/programs"] == 0 for record in ipa)
    assert all(record["mismatch/chunk_mean"] == pytest.approx(1, abs=1e-3) for record in ipa)
    assert {"warm_start", "final"} == set(json.loads((run / "result.json").read_text()))
    assert "tokenizer:" not in (run / "report.html").read_text()  # it would tell a problem with it


@pytest.mark.slow
def test_its_episodes_are_written_in_the_models_own_format(run, published):
    oracle = transformers.AutoTokenizer.from_pretrained(published)
    calls = 0
    for t in load_trajectories(run / "demonstrations.msgpack"):
        turns = [{"role": "user", "content": t.prompt.text}]
        for chunk, observation in zip(t.chunks, [*t.observations, None], strict=False):
            call = f"<tool_call>{chunk.text}</tool_call>" if chunk.text else ""
            turns.append({"role": "assistant", "content": call})
            calls += bool(call)
            if observation is not None:
                turns.append({"role": "tool", "content": observation.text})
        text = oracle.decode(np.concatenate([tokens for _, tokens in t.segments()]))
        assert text + "\n" == oracle.apply_chat_template(turns, tokenize=False)
    assert calls > 20


@pytest.mark.slow
def test_its_first_checkpoint_is_the_published_model_bit_for_bit(run, published, tmp_path):
    assert export_run(run, tmp_path / "first", step=1) == 1
    before, after = load_file(published / "model.safetensors"), load_file(tmp_path / "first" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)


@pytest.mark.slow
def test_its_last_checkpoint_is_a_folder_that_transformers_reads(run, published, tmp_path):
    folder = tmp_path / "exported"
    printed = command("export.py", f"--run={run}", f"--to={folder}")
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert f"checkpoint {newest} of {run}" in printed
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = kept_tokenizer(run)
    turns = [{"role": "user", "content": "How many files?"}]
    ids = tokenizer.encode_chat(turns, add_generation_prompt=True)
    assert oracle.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] == ids
    config, params = load_pretrained(folder)
    tokens = jnp.array([ids])
    logits = forward(params, config, tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    _, start = load_pretrained(published)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, start)
    assert all(jax.tree.leaves(changed))
    with pytest.raises(WeightsError, match="expected a folder without weights"):
        export_run(run, folder)


@pytest.mark.slow
def test_it_continues_without_the_folder_it_started_from(run, tmp_path):
    """A copy of the run whose config names a folder that is not there, and whose last checkpoint is gone."""
    source, workdir = tmp_path / "model", tmp_path / "run"
    shutil.copytree(run, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["pretrained"] = str(source)
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "result.json").unlink()
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    shutil.rmtree(workdir / "checkpoints" / str(newest))
    printed = command("ipa_train.py", CONFIG, f"--config.model.pretrained={source}", f"--workdir={workdir}")
    assert "continuing at ipa step 1" in printed
    again, first = records(workdir, "ipa")[-1], records(run, "ipa")[-1]
    for name in ("train/loss", "train/grad_norm", "train/entropy", "rollout/tokens_mean"):
        assert again[name] == first[name], name


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.induction=true"], "induction: expected False with model.pretrained, found True"),
        (["--config.model.dtype=int8"], "unknown config key 'model.dtype'"),
    ],
)
def test_keys_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(load_config([CONFIG, "--config.model.pretrained=x", *arguments]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"pretrained": "x", "hidden_size": 64}}, "model: unknown key 'hidden_size'"),
        ({"model": {"pretrained": 3}}, "model.pretrained: expected str"),
        ({"vocab_size": 512}, "vocab_size: expected none with model.pretrained, found 512"),
        ({"digits_per_token": 1}, "digits_per_token: expected none with model.pretrained, found 1"),
        ({"model": {"hidden_size": 64}}, "vocab_size: expected an integer, found None"),
    ],
)
def test_a_model_is_published_or_described_not_both(changes, message):
    plain = load_config([CONFIG]).to_dict()
    with pytest.raises(ConfigError, match=message):
        load_settings(ConfigDict(plain | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, ConfigError, "model.pretrained: expected a Hugging Face folder"),
        (lambda at: cut(at / "model.safetensors"), WeightsError, "model.norm.weight: expected bytes"),
        (
            lambda at: edit(at / "config.json", hidden_size=48),
            WeightsError,
            r"expected shape \[520, 48\], found \[520, 32",
        ),
        (lambda at: edit(at / "config.json", num_hidden_layers=3), WeightsError, "missing: expected model.layers.2"),
        (lambda at: edit(at / "config.json", hidden_act="gelu"), ModelConfigError, "hidden_act: expected 'silu'"),
        (lambda at: (at / "config.json").unlink(), ModelConfigError, "config.json: expected a model config"),
        (lambda at: (at / "tokenizer.json").unlink(), TokenizerError, "tokenizer.json: expected a tokenizer"),
        (lambda at: (at / "chat_template.jinja").unlink(), TokenizerError, "chat_template: expected one"),
    ],
)
def test_a_folder_that_cannot_serve_is_refused_before_anything_runs(published, tmp_path, damage, error, message):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    damage(folder)
    with pytest.raises(error, match=message):
        adopt(PretrainedModel(str(folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_model_in_its_place_is_noticed(published, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    model = PretrainedModel(str(folder), param_dtype="bfloat16")
    tokenizer = adopt(model, tmp_path / "run")
    assert isinstance(tokenizer, PretrainedTokenizer)
    assert first_params(model, tmp_path / "run")["embedding"].dtype == jnp.bfloat16
    edit(folder / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(ConfigError, match="expected the model that this run was started with"):
        first_params(model, tmp_path / "run")


def test_adapters_are_merged_on_the_way_out(published, tmp_path):
    run = tmp_path / "run"
    model = PretrainedModel(str(published))
    adopt(model, run)
    plain = load_config([CONFIG, f"--config.model.pretrained={published}"]).to_dict()
    plain["rl"]["lora"] = {"rank": 2, "alpha": 8.0, "targets": ["wq", "down", "embedding"]}
    (run / "config.json").write_text(json.dumps(plain))
    settings, config = load_settings(ConfigDict(plain)), kept_config(model, run)
    params = adapt(first_params(model, run), config, settings.rl.lora, jax.random.key(1))
    params = params.replace(adapters=jax.tree.map(lambda leaf: leaf + 0.1, params.adapters))
    checkpointer = Checkpointer(run / "checkpoints")
    state = init_state(params, make_optimizer(*settings.optimizer_of("ipa")))
    checkpointer.save(7, state, {"stage": "ipa", "step": 0})
    checkpointer.close()
    assert export_run(run, tmp_path / "exported") == 7
    found_config, found = load_pretrained(tmp_path / "exported")
    assert found_config == config
    jax.tree.map(np.testing.assert_array_equal, found, merge(params))
    assert np.abs(found["embedding"] - params.base["embedding"]).max() > 0.01


@pytest.mark.slow
def test_what_cannot_be_exported_is_said(run, tmp_path):
    with pytest.raises(ConfigError, match="none: expected the directory of a run"):
        export_run(tmp_path / "none", tmp_path / "to")
    with pytest.raises(CheckpointError, match="999"):
        export_run(run, tmp_path / "to", step=999)
    own = tmp_path / "own"
    own.mkdir()
    config = load_config([f"--config={HERE / 'tiny_run.py'}"])
    (own / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match=r"expected a run with model\.pretrained"):
        export_run(own, tmp_path / "to")
    assert not (tmp_path / "to").exists()
