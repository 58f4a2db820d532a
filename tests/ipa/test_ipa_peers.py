"""The peers' objectives against float64 loops; gradients by central differences of the loops."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from ipa_oracle import random_batch, trained, units

from rome.ipa.peers import PEERS, gigpo_advantages, group_advantages, grpo

KL_WEIGHT = 0.3
FAST = {"xla_backend_optimization_level": 0}


def cells_of(batch):
    chunk_of = {c: (c[0], int(batch.chunk_ids[c])) for c in trained(batch, False)}
    advantage = {c: float(batch.returns[k]) for c, k in chunk_of.items()}
    trajectory_of = {c: cells for cells in units(batch, list(chunk_of), "trajectory").values() for c in cells}
    return list(chunk_of), advantage, trajectory_of


def clipped(ratio, low, high):
    return min(max(ratio, 1 - low), 1 + high)


def surrogate(ratio, advantage, low, high):
    return min(ratio * advantage, clipped(ratio, low, high) * advantage)


def loop(name, logp, batch, frozen, reference=None):
    """The loss in float64. `frozen` is the logp that weights without gradient are taken at."""
    cells, advantage, trajectory_of = cells_of(batch)
    old, mu = batch.old_logp.astype(np.float64), batch.behavior_logp.astype(np.float64)
    loss = 0.0
    for c in cells:
        own = trajectory_of[c]
        ratio = math.exp(logp[c] - old[c])
        ppo = surrogate(ratio, advantage[c], 0.2, 0.2)
        mean_of_means = 1 / len(own) / len({id(t) for t in trajectory_of.values()})
        if name == "ppo_clip":
            gain = ppo / len(cells)
        elif name == "grpo":
            kl = 0.0
            if reference is not None:
                kl = math.exp(reference[c] - logp[c]) - (reference[c] - logp[c]) - 1
            gain = (ppo - KL_WEIGHT * kl) * mean_of_means
        elif name == "gspo":
            s = math.exp(sum(logp[u] - old[u] for u in own) / len(own))
            gain = surrogate(s, advantage[c], 3e-4, 4e-4) * mean_of_means
        elif name == "cispo":
            gain = clipped(math.exp(frozen[c] - old[c]), 1.0, 0.28) * advantage[c] * logp[c] / len(cells)
        elif name == "tis_token":
            gain = min(math.exp(old[c] - mu[c]), 2.0) * ppo / len(cells)
        elif name == "tis_sequence":
            gain = min(math.exp(sum(old[u] - mu[u] for u in own)), 2.0) * ppo / len(cells)
        elif name == "icepop":
            mismatch = math.exp(old[c] - mu[c])
            gain = (mismatch * ppo if 0.5 <= mismatch <= 5.0 else 0.0) / len(cells)
        loss -= gain
    return loss


def numeric_gradient(f, x, cells, step=1e-6):
    gradient = np.zeros(x.shape)
    for c in cells:
        up, down = x.copy(), x.copy()
        up[c], down[c] = x[c] + step, x[c] - step
        gradient[c] = (f(up) - f(down)) / (2 * step)
    return gradient


def check(name, peer, logp, batch, **oracle):
    loss, gradient = jax.jit(jax.value_and_grad(peer), compiler_options=FAST)(logp, batch)
    exact = logp.astype(np.float64)
    f = partial(loop, name, batch=batch, frozen=exact, **oracle)
    np.testing.assert_allclose(loss, f(exact), rtol=1e-5, atol=1e-6)
    expected = numeric_gradient(f, exact, trained(batch, False))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_loss_and_gradient_match_the_loop(name):
    logp, batch = random_batch(3)
    check(name, PEERS[name], logp, batch)


def test_grpo_with_a_reference_policy():
    logp, batch = random_batch(3)
    reference = logp + np.random.default_rng(0).normal(size=logp.shape).astype(np.float32)
    peer = partial(grpo, reference_logp=reference, kl_weight=KL_WEIGHT)
    check("grpo", peer, logp, batch, reference=reference.astype(np.float64))


@pytest.mark.parametrize("name", PEERS)
def test_untrained_tokens_and_empty_batches(name):
    logp, batch = random_batch(3)
    loss, gradient = jax.value_and_grad(PEERS[name])(logp, batch)
    broken, broken_batch = random_batch(3)
    outside = batch.chunk_ids < 0
    broken[outside] = broken_batch.old_logp[outside] = broken_batch.behavior_logp[outside] = np.nan
    bad_loss, bad_gradient = jax.value_and_grad(PEERS[name])(broken, broken_batch)
    assert bad_loss == loss
    np.testing.assert_array_equal(bad_gradient, gradient)
    nothing = batch.replace(chunk_ids=np.full_like(batch.chunk_ids, -1))
    loss, gradient = jax.value_and_grad(PEERS[name])(logp, nothing)
    assert loss == 0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("name", PEERS)
def test_micro_batches_sum_to_the_whole_given_its_total(name):
    logp, batch = random_batch(3)
    level = "trajectory" if name in ("grpo", "gspo") else "token"
    total = float(len(units(batch, trained(batch, False), level)))
    rows = np.arange(len(logp))[:, None]
    parts = [
        PEERS[name](logp, batch.replace(chunk_ids=np.where(rows == i, batch.chunk_ids, -1)), total=total)
        for i in range(3)
    ]
    np.testing.assert_allclose(sum(parts), PEERS[name](logp, batch), rtol=1e-5)


def standardised(value, values, normalize):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return (value - mean) / (std + 1e-6) if normalize else value - mean


REWARD, GROUPS = np.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.3, 0.3]), np.array([2, 2, 2, 7, 7, 9, 9])


@pytest.mark.parametrize("normalize", [True, False])
def test_group_advantages(normalize):
    actual = group_advantages(REWARD, GROUPS, normalize=normalize)
    expected = [standardised(r, REWARD[g == GROUPS], normalize) for r, g in zip(REWARD, GROUPS, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
    assert not np.asarray(actual)[GROUPS == 9].any()  # equal rewards: exactly no advantage


@pytest.mark.parametrize("normalize", [True, False])
def test_gigpo_advantages(normalize):
    rng = np.random.default_rng(0)
    num_chunks, states = rng.integers(1, 5, 7), rng.integers(0, 3, (7, 4)) * 10**9
    actual = gigpo_advantages(REWARD, num_chunks, GROUPS, states, gamma=0.9, omega=0.7, normalize=normalize)
    steps = {
        (n, k): (GROUPS[n], states[n, k], 0.9 ** (num_chunks[n] - 1 - k) * REWARD[n])
        for n in range(7)
        for k in range(num_chunks[n])
    }
    expected = np.zeros((7, 4))
    for (n, k), (group, state, value) in steps.items():
        peers = [v for g, s, v in steps.values() if (g, s) == (group, state)]
        expected[n, k] = standardised(REWARD[n], REWARD[group == GROUPS], normalize)
        expected[n, k] += 0.7 * standardised(value, peers, normalize)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
