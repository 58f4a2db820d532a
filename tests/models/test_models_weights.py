"""Checkpoints in and out: bit for bit, block by block, and refused with a reason."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from rome.models import ConfigError, ModelConfig, RopeScaling, param_specs
from rome.models.families import from_hf_config
from rome.models.params import is_spec
from rome.models.weights import (
    LazyTensor,
    WeightsError,
    load_config,
    load_params,
    load_pretrained,
    read_folder,
    read_safetensors,
    save_pretrained,
)

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs the oracle safetensors")

DENSE = ModelConfig(
    *(61, 24, 3, 4, 2, 8, 20),
    rope_scaling=RopeScaling("yarn", 4.0, original_positions=32),
    max_position_embeddings=128,
    qk_norm=False,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
MOE = ModelConfig(
    *(61, 24, 4, 4, 2, 8, 20),
    max_position_embeddings=128,
    tie_embeddings=False,
    num_experts=3,
    num_experts_per_token=2,
    moe_intermediate_size=12,
    dense_layers=(1,),
)
CONFIGS = {"dense": DENSE, "moe": MOE}


@cache
def random_params(name: str, dtype: str = "float32") -> dict:
    """NumPy leaves: what is tested here moves numbers and computes none."""
    rng = np.random.default_rng(0)
    specs = param_specs(CONFIGS[name])
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return jax.tree.map(lambda spec: rng.normal(size=spec.shape).astype(kind), specs, is_leaf=is_spec)


def assert_same(actual: dict, expected: dict) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def bits(path: Path) -> dict[str, tuple]:
    """Every tensor of a folder's files as the safetensors library reads them."""
    found: dict[str, tuple] = {}
    for file in path.glob("*.safetensors"):
        for name, entry in safetensors_numpy.deserialize(file.read_bytes()):
            assert name not in found
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


@pytest.mark.parametrize("experts", ["per_expert", "fused"])
@pytest.mark.parametrize("shard", [10**9, 9_000], ids=["single", "sharded"])
@pytest.mark.parametrize(("name", "dtype"), [("dense", "float32"), ("moe", "bfloat16")])
def test_round_trip_is_bit_exact(tmp_path, name, dtype, shard, experts):
    params = random_params(name, dtype)
    save_pretrained(tmp_path, params, CONFIGS[name], experts=experts, max_shard_bytes=shard)
    config, loaded = load_pretrained(tmp_path, param_dtype=dtype)
    assert config.rope_scaling == CONFIGS[name].rope_scaling
    assert_same(loaded, params)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (shard == 9_000)
    stored = bits(tmp_path)
    ours = {**read_folder(tmp_path)}
    assert {n: (t.shape, t.read().tobytes()) for n, t in ours.items()} == {n: entry[1:] for n, entry in stored.items()}
    if sharded:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(stored)
        assert index["metadata"]["total_size"] == sum(len(entry[2]) for entry in stored.values())
        assert len(set(index["weight_map"].values())) > 2
    assert any("gate_up_proj" in tensor for tensor in stored) == (name == "moe" and experts == "fused")
    again = tmp_path / "again"
    save_pretrained(again, loaded, config, experts=experts)
    assert bits(again) == stored


def test_transformers_writes_what_we_read_and_reads_what_we_write(tmp_path):
    oracle = pytest.importorskip("hf_oracle", reason="needs torch and transformers", exc_type=ImportError)
    fields = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2}
    model = oracle.hf_model("qwen3_moe", fields | {"moe_intermediate_size": 12, "mlp_only_layers": [0]})
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size="9KB")
    assert len(list(theirs.glob("*.safetensors"))) > 2
    config, params = load_pretrained(theirs)
    for experts in ("per_expert", "fused"):
        shutil.rmtree(ours, ignore_errors=True)
        save_pretrained(ours, params, config, experts=experts)
        if experts == "per_expert":
            assert bits(ours) == bits(theirs)
        back = type(model).from_pretrained(ours, attn_implementation="eager", dtype="float32")
        state = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
        assert {name: tensor.numpy().tobytes() for name, tensor in back.state_dict().items()} == state
        assert from_hf_config(back.config.to_diff_dict()) == config


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rome.models import param_specs
from rome.models.params import is_spec
from rome.models.weights import load_config, load_params, pretrained, read_folder, load_pretrained

folder = sys.argv[1]
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("expert", "tensor"))
rules = {"experts": "expert", "heads": "tensor", "mlp": "tensor", "vocab": "expert"}
config = load_config(folder)

def place(spec):
    wanted = (rules.get(axis) for axis in spec.axes)
    parts = [name if name and size % mesh.shape[name] == 0 else None
             for name, size in zip(wanted, spec.shape)]
    return NamedSharding(mesh, P(*parts))

shardings = jax.tree.map(place, param_specs(config), is_leaf=is_spec)
blocks = []
make_reader = pretrained._block_reader

def spy(*arguments):
    read = make_reader(*arguments)

    def read_and_note(index):
        block = read(index)
        blocks.append(block.nbytes)
        return block

    return read_and_note

pretrained._block_reader = spy
params = load_params(read_folder(folder), config, shardings)
read, pretrained._block_reader = list(blocks), make_reader
_, whole = load_pretrained(folder)
for one, other, sharding in zip(*map(jax.tree.leaves, (params, whole, shardings))):
    assert one.sharding == sharding
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
gate = params["layers"]["gate"]
assert len({str(shard.index) for shard in gate.addressable_shards}) == 8
whole_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
assert max(read) == gate.nbytes // 8, (read, gate.nbytes)
assert sum(read) == whole_bytes, (sum(read), whole_bytes)  # each number read once, replicated leaves too
"""


def test_loads_straight_into_shards_without_a_whole_leaf_in_host_memory(tmp_path):
    config = ModelConfig(
        *(32, 64, 4, 4, 2, 16, 64),
        max_position_embeddings=128,
        num_experts=8,
        num_experts_per_token=2,
        moe_intermediate_size=256,
        tie_embeddings=False,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: rng.normal(size=spec.shape).astype(np.float32), param_specs(config), is_leaf=is_spec
    )
    save_pretrained(tmp_path, params, config, experts="fused", max_shard_bytes=1_000_000)
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_a_block_reads_what_indexing_the_whole_leaf_gives(tmp_path):
    from rome.models.weights.pretrained import _block_reader
    from rome.models.weights.table import leaf_slots

    save_pretrained(tmp_path, random_params("moe"), MOE)
    tensors = read_folder(tmp_path)
    for path, spec, slots in leaf_slots(MOE):
        leaf = random_params("moe")
        for key in path:
            leaf = leaf[key]
        index = tuple(slice(size // 3, max(size // 3 + 1, size - 1)) for size in spec.shape)
        np.testing.assert_array_equal(_block_reader(tensors, spec, slots)(index), leaf[index])


# ---- bad weights

GATE = "model.layers.2.mlp.experts.1.gate_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_pretrained(tmp_path, random_params("moe"), MOE)
    return tmp_path


def edited(folder: Path, **changes) -> dict[str, LazyTensor]:
    tensors = read_folder(folder)
    for name, value in changes.items():
        tensors[name] = LazyTensor(value.shape, "a test", lambda value=value: value)
    return tensors


def test_missing_extra_and_misshaped_tensors_are_named(folder):
    tensors = read_folder(folder)
    del tensors[GATE]
    with pytest.raises(WeightsError, match=rf"missing: expected {GATE} \[12, 24\]; found no such tensor"):
        load_params(tensors, MOE)
    extra = edited(folder, **{"model.layers.4.mlp.gate.weight": np.zeros((3, 24))})
    with pytest.raises(WeightsError, match=r"extra: .*found model.layers.4.mlp.gate.weight \[3, 24\] in a test"):
        load_params(extra, MOE)
    shaped = edited(folder, **{GATE: np.zeros((24, 12))})
    with pytest.raises(WeightsError, match=rf"{GATE}: expected shape \[12, 24\], found \[24, 12\] in a test"):
        load_params(shaped, MOE)


def test_the_wrong_config_is_refused(folder):
    raw = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 5}, r"missing: expected model.layers.4.* and 1\d more"),
        ({"num_experts": 2, "num_experts_per_tok": 2}, r"extra: .*experts.2"),
        ({"hidden_size": 32, "head_dim": 8}, r"input_layernorm.weight: expected shape \[32\], found \[24\]"),
        ({"attention_bias": True}, r"missing: expected model.layers.\d.self_attn.\w_proj.bias"),
        ({"tie_word_embeddings": True}, "lm_head.weight: expected none or the embedding"),
    ):
        (folder / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(WeightsError, match=message):
            load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="expected a model config"):
        load_config(folder)


def test_a_tied_model_may_store_its_head_if_it_is_the_embedding(tmp_path):
    save_pretrained(tmp_path, random_params("dense"), DENSE)
    embedding = random_params("dense")["embedding"]
    assert_same(load_params(edited(tmp_path, **{"lm_head.weight": embedding}), DENSE), random_params("dense"))


def test_misshaped_fused_experts_are_named(tmp_path):
    save_pretrained(tmp_path, random_params("moe"), MOE, experts="fused")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(WeightsError, match=rf"{name}: expected \[experts, 2 \* rows, columns\], found \[3, 23, 24\]"):
        load_params(edited(tmp_path, **{name: np.zeros((3, 23, 24))}), MOE)
    with pytest.raises(WeightsError, match=rf"extra: .*experts.3.gate_proj.weight \[12, 24\] in a test: {name}"):
        load_params(edited(tmp_path, **{name: np.zeros((4, 24, 24))}), MOE)


def test_truncated_and_corrupt_files_are_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    end = header[last]["data_offsets"][1]

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=message):
            read_safetensors(path)

    refused(whole[:-1], rf"{last}: expected bytes \d+..{end} of the data, the file ends at {end - 1}")
    refused(whole + b"!", rf"expected {end} bytes of data, found {end + 1}")
    refused(whole[: 8 + length // 2], rf"expected a header of {length} bytes, the file ends after {length // 2}")
    refused(whole[:5], "expected a safetensors header")
    refused(b"\xff" * 64, "expected a safetensors header")
    refused(struct.pack("<Q", 4) + b"[{]}", "expected a JSON header")
    refused(struct.pack("<Q", 2) + b"[]", "expected a JSON object as header, found list")

    def with_entry(**entry) -> bytes:
        text = json.dumps(header | {GATE: header[GATE] | entry}).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    refused(with_entry(dtype="I4"), rf"{GATE}: expected a dtype of .*, found 'I4'")
    refused(with_entry(shape=[12, 25]), rf"{GATE}: expected bytes \d+..\d+, found \d+..\d+")
    refused(with_entry(shape=[-12, -24]), rf"{GATE}: expected dtype, shape and data_offsets: .*non-negative")
    refused(with_entry(data_offsets=None), rf"{GATE}: expected dtype, shape and data_offsets")
    path.unlink()
    with pytest.raises(WeightsError, match=r"model.safetensors: expected a safetensors file"):
        load_pretrained(folder)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    save_pretrained(tmp_path, random_params("moe"), MOE, max_shard_bytes=9_000)
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    places = document["weight_map"]
    other = next(file for file in places.values() if file != places[GATE])

    def refused(weight_map: object, message: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightsError, match=message):
            read_folder(tmp_path)

    refused(places | {GATE: other}, rf"{GATE}: (expected, but missing|found, but the index)")
    refused(places | {GATE: "../secret.safetensors"}, "expected names of files beside it")
    refused(places | {"ghost": "model-00099-of-00099.safetensors"}, "model-00099-of-00099.safetensors: expected a")
    refused(7, "expected an index with a weight_map")


def test_saving_refuses_what_it_cannot_do(folder):
    with pytest.raises(WeightsError, match=r"expected a folder without weights, found model.safetensors"):
        save_pretrained(folder, random_params("moe"), MOE)
    with pytest.raises(ConfigError, match="experts: expected one of"):
        save_pretrained(folder / "new", random_params("moe"), MOE, experts="stacked")
    assert not (folder / "new").exists()
