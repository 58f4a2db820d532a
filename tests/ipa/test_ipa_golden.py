"""The worked float64 example of the design, field by field."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.ipa import ObjectiveConfig, PolicyBatch, importance_ratio, mismatch_mask, policy_loss, unit_ids

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ipa_small.json").read_text())
EXPECTED = GOLDEN["expected"]
CONFIG = ObjectiveConfig(mismatch_upper=GOLDEN["upper_H"])
CHUNKS = 5


@pytest.fixture(scope="module")
def batch():
    zeros = np.zeros(np.shape(GOLDEN["ids"]), np.int32)
    return PolicyBatch(
        tokens=zeros,
        positions=zeros,
        segment_ids=np.array(GOLDEN["seg"], np.int32),
        chunk_ids=np.array(GOLDEN["ids"], np.int32),
        old_logp=np.array(GOLDEN["old"], np.float32),
        behavior_logp=np.array(GOLDEN["beh"], np.float32),
        returns=np.array(GOLDEN["returns"], np.float32),
        positive=np.array(GOLDEN["positive"]),
        imitation=np.zeros(np.shape(GOLDEN["returns"]), bool),
    )


LOGP = jnp.array(GOLDEN["logp"], jnp.float32)


def test_every_expected_field_is_tested_here():
    tested = {"loss_tokens", "loss_chunks", "importance_ratio", "mismatch_ratio", "keep", "dloss_dlogp_tokens"}
    assert set(EXPECTED) == tested


def test_importance_ratio(batch):
    ratio = importance_ratio(LOGP, batch.old_logp, unit_ids(batch, "chunk"), CHUNKS)
    np.testing.assert_allclose(ratio, EXPECTED["importance_ratio"], rtol=1e-6)


def test_mismatch_ratio(batch):
    ratio = importance_ratio(batch.old_logp, batch.behavior_logp, unit_ids(batch, "chunk"), CHUNKS)
    np.testing.assert_allclose(ratio, EXPECTED["mismatch_ratio"], rtol=1e-6)


def test_mask(batch):
    keep = mismatch_mask(batch.old_logp, batch.behavior_logp, unit_ids(batch, "chunk"), CHUNKS, GOLDEN["upper_H"])
    np.testing.assert_array_equal(keep, EXPECTED["keep"])


@pytest.mark.parametrize(("normalizer", "units"), [("tokens", 27), ("chunks", 9), ("trajectories", 4)])
def test_loss_and_gradient(batch, normalizer, units):
    config = replace(CONFIG, normalizer=normalizer)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: policy_loss(x, batch, config)[0]))(LOGP)
    expected = EXPECTED.get(f"loss_{normalizer}", EXPECTED["loss_tokens"] * 27 / units)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    expected_gradient = np.array(EXPECTED["dloss_dlogp_tokens"]) * 27 / units
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
