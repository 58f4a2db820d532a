import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_toys import DENSE, MOE, SHALLOW, distance, params_of

from rome.models import init_params
from rome.models.lora import LoraConfig, adapt, merge
from rome.models.sharding import ShardingError
from rome.training.state import (
    HOST,
    OptimizerConfig,
    _matrices,
    _schedule,
    bfloat16_stochastically,
    init_state,
    init_state_on,
    make_optimizer,
    require_memory,
)
from rome.training.steps import SupervisedBatch, make_supervised_step

ADAMW = OptimizerConfig(learning_rate=1e-2)
MUON = OptimizerConfig(learning_rate=2e-2, name="muon", adam_learning_rate=1e-2)


def _batch():
    """One sequence that repeats itself, two chunks, the second of them masked."""
    rng = np.random.default_rng(0)
    tokens = np.tile(rng.integers(1, 48, (4, 8), dtype=np.int32), 3)
    ids = np.where(np.arange(24) < 16, 0, 1).astype(np.int32) * np.ones((4, 1), np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    mask = np.array([[True, False]] * 4)
    return SupervisedBatch(tokens, positions, np.ones_like(tokens), ids, mask)


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("config", [ADAMW, MUON], ids=lambda config: config.name)
def test_both_optimizers_learn(model, config):
    optimizer = make_optimizer(config, 30)
    state = init_state(jax.tree.map(jnp.array, params_of(model)), optimizer)
    step = make_supervised_step(model, optimizer)
    losses = []
    for _ in range(30):
        state, metrics = step(state, _batch())
        losses.append(float(metrics["train/loss"]))
    assert losses[0] == pytest.approx(np.log(48), abs=0.7)
    assert losses[-1] < 0.3 * losses[0]
    assert int(state.step) == 30


def test_a_masked_chunk_is_not_learned():
    """Its tokens may change: loss and update stay what they were."""
    optimizer = make_optimizer(ADAMW, 30)
    step = make_supervised_step(DENSE, optimizer)
    results = []
    for change in (0, 1):
        batch = _batch()
        batch.tokens[:, 16:] = (batch.tokens[:, 16:] + change) % 48
        state = init_state(jax.tree.map(jnp.array, params_of(DENSE)), optimizer)
        results.append(step(state, batch))
    assert results[0][1]["train/loss"] == results[1][1]["train/loss"]
    assert distance(results[0][0].params, results[1][0].params) < 1e-6


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_muon_takes_every_layers_matrix_and_nothing_else(model):
    """The router stays with Adam: its columns are scores of experts, not a map between spaces."""
    params = params_of(model)
    numbers = _matrices(params)
    layers = numbers["layers"]
    taken = {name for name, value in layers.items() if value is not None}
    assert taken == {"wq", "wk", "wv", "wo", "gate", "up", "down"}
    matrices = {name for name, leaf in params["layers"].items() if leaf.ndim >= 3} - {"router"}
    assert taken == matrices
    assert all(numbers[name] is None for name in numbers if name != "layers")
    for name in taken:
        into = np.prod([params["layers"][name].shape[axis] for axis in layers[name].reduction_axis])
        out = np.prod([params["layers"][name].shape[axis] for axis in layers[name].output_axis])
        d, heads, kv, head = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim
        inner = model.moe_intermediate_size if model.is_moe else model.intermediate_size
        expected = {"wq": (d, heads * head), "wk": (d, kv * head), "wv": (d, kv * head), "wo": (heads * head, d)}
        expected |= {"gate": (d, inner), "up": (d, inner), "down": (inner, d)}
        assert (into, out) == expected[name], name


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_muon_updates_are_orthogonal_matrix_by_matrix(model):
    """All singular values of an update are about equal, for each layer and each expert by itself."""
    optimizer = make_optimizer(dataclasses.replace(MUON, max_grad_norm=1e9), 10)
    params = params_of(model)
    gradient = init_params(model, jax.random.key(1))
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for name, spread in (("wq", 3.0), ("wo", 3.0), ("down", 3.0)):
        leaf = np.asarray(updates["layers"][name])
        matrices = leaf.reshape(leaf.shape[0], leaf.shape[1], -1) if name == "wq" else leaf
        matrices = leaf.reshape(leaf.shape[0], -1, leaf.shape[-1]) if name == "wo" else matrices
        for matrix in matrices.reshape(-1, *matrices.shape[-2:]):
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values[0] / values[-1] < spread, name
            # scaled to the root mean square of an AdamW update: 0.2 (Liu et al. 2025)
            assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.2 * MUON.learning_rate, rel=0.35)


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=lambda config: config.name)
def test_weight_decay_pulls_matrices_and_leaves_norm_scales_alone(config):
    params = params_of(DENSE)
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(dataclasses.replace(config, weight_decay=0.1), 10)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = path[-1].key
        moved = float(jnp.max(jnp.abs(update)))
        if "norm" in name:
            assert moved == 0, name
        elif name in ("wq", "wo", "gate", "down"):
            expected = -config.learning_rate * 0.1 * np.asarray(params["layers"][name])
            np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-9)
        elif config.name == "adamw":
            assert moved > 0, name


def test_schedule_values():
    constant = _schedule(dataclasses.replace(ADAMW, warmup_steps=4), 1.0, 100)
    np.testing.assert_allclose([constant(step) for step in (0, 1, 2, 4, 50, 1000)], [0, 0.25, 0.5, 1, 1, 1])
    at_once = _schedule(ADAMW, 1.0, 100)
    assert at_once(0) == 1.0
    cosine = _schedule(dataclasses.replace(ADAMW, schedule="cosine", warmup_steps=10), 2.0, 110)
    expected = [0.0, 1.0, 2.0, 0.2 + 1.8 * 0.5, 0.2, 0.2]
    np.testing.assert_allclose([cosine(step) for step in (0, 5, 10, 60, 110, 500)], expected, rtol=1e-5)
    short = _schedule(
        dataclasses.replace(ADAMW, schedule="cosine", warmup_steps=10), 1.0, 3
    )  # shorter than its warm-up
    assert np.isfinite([float(short(step)) for step in range(20)]).all()


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=lambda config: config.name)
def test_the_gradient_is_clipped_by_its_global_norm(config):
    """Gradients that differ in length alone give the same first update once they are clipped."""
    params = params_of(DENSE)
    gradient = init_params(DENSE, jax.random.key(1))
    # an epsilon that Adam would feel, if it got the two unclipped
    optimizer = make_optimizer(dataclasses.replace(config, epsilon=1e-2), 10)
    scaled = jax.tree.map(lambda leaf: 100 * leaf, gradient)
    assert float(optax.global_norm(gradient)) > config.max_grad_norm
    one, hundred = (optimizer.update(g, optimizer.init(params), params)[0] for g in (gradient, scaled))
    assert distance(one, hundred) < 1e-5


def _bfloat16(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def test_bfloat16_is_rounded_to_a_neighbour_and_right_in_the_mean():
    exact = jnp.float32(1.0 + 2**-10)  # an eighth of the way from 1 to the next bfloat16, 1 + 2^-7
    drawn = np.asarray(bfloat16_stochastically(jnp.full((20_000,), exact), jax.random.key(0)), np.float64)
    assert set(drawn) == {1.0, 1.0 + 2**-7}
    assert np.mean(drawn > 1) == pytest.approx(1 / 8, abs=4 * np.sqrt(1 / 8 * 7 / 8 / 20_000))
    down = np.asarray(bfloat16_stochastically(jnp.full((20_000,), -exact), jax.random.key(1)), np.float64)
    assert set(down) == {-1.0, -1.0 - 2**-7}
    kept = jnp.array([0.0, 0.5, -3.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(bfloat16_stochastically(kept, jax.random.key(2)).astype(jnp.float32), kept)


def test_small_updates_of_bfloat16_parameters_need_stochastic_rounding():
    """100 updates of 2^-10 on a parameter of 1, whose neighbour is 2^-7 away: rounded to nearest it never moves."""
    found = {}
    for rounding in ("nearest", "stochastic"):
        config = OptimizerConfig(learning_rate=2**-10, beta1=0.0, beta2=0.0, rounding=rounding)
        optimizer, params = make_optimizer(config, 100), {"w": jnp.ones((512,), jnp.bfloat16)}
        state = init_state(params, optimizer)
        assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state.opt_state))

        @jax.jit
        def step(params, opt_state, optimizer=optimizer):
            updates, opt_state = optimizer.update({"w": jnp.ones((512,), jnp.bfloat16)}, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        opt_state = state.opt_state
        for _ in range(100):
            params, opt_state = step(params, opt_state)
        assert params["w"].dtype == jnp.bfloat16
        found[rounding] = float(params["w"].astype(jnp.float32).mean())
    assert found["nearest"] == 1.0
    assert found["stochastic"] == pytest.approx(1 - 100 * 2**-10, abs=0.004)


def test_stochastic_rounding_refuses_float32_parameters():
    optimizer = make_optimizer(dataclasses.replace(ADAMW, rounding="stochastic"), 10)
    with pytest.raises(ValueError, match=r"optimizer.rounding: 'stochastic' expected bfloat16 .* \['float32'\]"):
        optimizer.init(params_of(DENSE))


def test_lora_trains_its_adapters_and_nothing_else():
    optimizer = make_optimizer(dataclasses.replace(ADAMW, learning_rate=3e-2), 20)
    base = params_of(SHALLOW)
    lora = LoraConfig(rank=4, targets=("wq", "wv", "wo", "gate", "up", "down", "embedding"))
    state = init_state(adapt(jax.tree.map(jnp.array, base), SHALLOW, lora, jax.random.key(1)), optimizer)
    adapters = sum(leaf.size for leaf in jax.tree.leaves(state.params.adapters))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 2 * adapters + 10
    step = make_supervised_step(SHALLOW, optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step(state, _batch())
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert distance(state.params.base, base) == 0
    assert distance(merge(state.params), base) > 1e-2


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=lambda config: config.name)
def test_moments_on_the_host_change_nothing(config):
    """Bit for bit, and they are there before and after an update."""
    states, losses = [], []
    for memory in ("device", HOST):
        optimizer = make_optimizer(dataclasses.replace(config, memory=memory), 10)
        state = init_state_on(None, jax.tree.map(jnp.array, params_of(SHALLOW)), optimizer, SHALLOW)
        step = make_supervised_step(SHALLOW, optimizer)
        for _ in range(3):
            moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
            assert {leaf.sharding.memory_kind for leaf in moments} == {memory}
            state, metrics = step(state, _batch())
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
        states.append(state)
        losses.append(float(metrics["train/loss"]))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert distance(*states) == 0
    assert losses[0] == losses[1]


def test_a_device_without_such_memory_is_refused():
    memories = [SimpleNamespace(kind="device"), SimpleNamespace(kind="unpinned_host")]
    device = SimpleNamespace(device_kind="abacus", addressable_memories=lambda: memories)
    require_memory(make_optimizer(ADAMW, 10), device)
    offloaded = make_optimizer(dataclasses.replace(ADAMW, memory=HOST), 10)
    with pytest.raises(ShardingError, match=r"optimizer\.memory: .*'abacus' has no 'pinned_host'"):
        require_memory(offloaded, device)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd"),
        ("memory", "disk"),
        ("rounding", "up"),
        ("schedule", "linear"),
        ("adam_learning_rate", 1e-3),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", -1e-8),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field}: expected .*"):
        dataclasses.replace(ADAMW, **{field: value})


def test_muon_needs_a_learning_rate_for_adams_part():
    with pytest.raises(ValueError, match="adam_learning_rate"):
        OptimizerConfig(learning_rate=1e-2, name="muon")
