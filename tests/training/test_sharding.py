"""One device and eight agree; splits are what the rules say; meshes that cannot be are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fake_devices import run_on_fake_devices
from training_toys import DENSE, MOE, distance

from rome.models import param_specs
from rome.models.lora import Adapted, LoraConfig, adapter_specs
from rome.models.params import is_spec
from rome.models.sharding import AXES, MeshConfig, ShardingError, make_mesh, param_shardings, partition
from rome.training.state import OptimizerConfig, init_state, make_optimizer, state_shardings

HERE = Path(__file__).parent
SPLIT = ["fsdp × expert × context", "data × tensor"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on_fake_devices(HERE / "sharded_run.py", tmp_path_factory.mktemp("sharded"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SPLIT)
def test_loss_and_gradients_are_those_of_one_device(found, mesh):
    one, many = found["runs"]["one device"], found["runs"][mesh]
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(many["logp"], one["logp"], atol=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one["gradients"]))
    assert largest > 1e-3
    assert distance(many["gradients"], one["gradients"]) < 1e-5 * largest
    assert many["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SPLIT)
def test_the_updated_state_is_that_of_one_device_and_stays_where_it_was(found, mesh):
    one, many = found["runs"]["one device"], found["runs"][mesh]
    # Adam's first update is about the learning rate whatever the gradient: where that is rounding, so is its sign
    moved = jax.tree.map(
        lambda a, b, g: np.where(np.abs(g) > 1e-6, a - b, 0.0),
        many["host_state"].params,
        one["host_state"].params,
        one["gradients"],
    )
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(moved)) < 1e-4
    assert not many["moved"]
    assert many["memory"] == {"params": {"device"}, "moments": {"pinned_host" if "tensor" in mesh else "device"}}


@pytest.mark.slow
def test_each_device_holds_its_share(found):
    split, shares = found["runs"]["fsdp × expert × context"]["shares"], found["runs"]["data × tensor"]["shares"]
    assert split["gate"] == 1 / 4  # experts × embed
    assert split["wq"] == split["attention_norm"] == 1 / 2
    assert shares["wq"] == shares["gate"] == 1 / 2
    assert shares["attention_norm"] == shares["router"] == 1


@pytest.mark.slow
def test_a_checkpoint_restores_on_another_mesh(found):
    saved = found["runs"]["fsdp × expert × context"]["host_state"]
    restored = found["restored"]
    jax.tree.map(np.testing.assert_array_equal, restored["state"], saved)
    assert restored["placed"]
    assert restored["memory"] == {"params": {"device"}, "moments": {"pinned_host"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight", "two, in pages"])
def test_the_engine_decodes_the_same_on_many_devices(found, name):
    one, many = found["decoded"]["one"], found["decoded"][name]
    assert one["chunks"].keys() == many["chunks"].keys()
    for slot, (tokens, behavior, raw) in one["chunks"].items():
        np.testing.assert_array_equal(many["chunks"][slot][0], tokens)
        np.testing.assert_allclose(many["chunks"][slot][1], behavior, atol=1e-5)
        np.testing.assert_allclose(many["chunks"][slot][2], raw, atol=1e-5)
    # an append, a copy of prompts and a decode, over two turns
    assert many["compilations"] == one["compilations"] == 3


def abstract_mesh(config: MeshConfig) -> Any:
    """A mesh of devices that need not be there."""
    sizes = tuple(getattr(config, name) for name in AXES)
    return jax.sharding.AbstractMesh(sizes, AXES)


def test_an_uneven_split_names_the_parameter_and_the_axis():
    with pytest.raises(
        ShardingError, match=r"layers\.wk: expected its axis 'kv_heads' to be a multiple of 2 = .*found 1"
    ):
        param_shardings(param_specs(DENSE), abstract_mesh(MeshConfig(tensor=2)))
    with pytest.raises(ShardingError, match=r"layers\.down: expected its axis 'experts' .* 3 = mesh expert, found 4"):
        param_shardings(param_specs(MOE), abstract_mesh(MeshConfig(expert=3)))


def test_every_rule_splits_over_known_axes_and_no_parameter_uses_one_twice():
    for model in (DENSE, MOE):
        for spec in jax.tree.leaves(param_specs(model), is_leaf=lambda leaf: hasattr(leaf, "axes")):
            entries = [(entry,) if isinstance(entry, str) else entry or () for entry in partition(spec.axes)]
            used = [axis for entry in entries for axis in entry]
            assert set(used) <= set(AXES)
            assert len(used) == len(set(used)), spec


def test_a_mesh_needs_its_devices():
    count = len(jax.devices())
    with pytest.raises(
        ShardingError, match=rf"mesh: expected {3 * count} devices \(fsdp {3 * count}\), found {count} of"
    ):
        make_mesh(MeshConfig(fsdp=3 * count))
    with pytest.raises(ShardingError, match=r"mesh\.tensor: expected at least 1, found 0"):
        MeshConfig(tensor=0)
    assert make_mesh(MeshConfig()) is None


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_the_optimizer_keeps_for_a_parameter_lies_with_it(name, rank):
    adam = 1e-3 if name == "muon" else None
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, name=name, adam_learning_rate=adam), 10)
    model = dataclasses.replace(MOE, moe_intermediate_size=24)  # every shape has one rule
    mesh, lora = abstract_mesh(MeshConfig(fsdp=2, expert=2)), LoraConfig(rank=rank)
    specs = Adapted(param_specs(model), adapter_specs(model, lora), 1.0) if rank else param_specs(model)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    placed = state_shardings(state, optimizer, model, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    expected = {leaf.shape: s.spec for leaf, s in zip(*map(jax.tree.leaves, (params, placed.params)), strict=True)}
    kept = list(zip(*map(jax.tree.leaves, (state.opt_state, placed.opt_state)), strict=True))
    assert any(leaf.ndim > 1 for leaf, _ in kept)
    for leaf, sharding in kept:
        assert sharding.spec == expected.get(leaf.shape, jax.sharding.PartitionSpec())
