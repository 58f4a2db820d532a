"""The adapter under JetStream's own protocol; skipped where google-jetstream (and its TensorFlow) is not installed."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest
from rollout_toys import MODEL

from rome.models import forward, init_params, train_tokenizer

TOKENIZER = train_tokenizer(["list the files"], 280)
LENGTH = 64


def test_without_the_package_the_module_says_what_it_needs():
    code = "import sys; sys.modules['jetstream'] = None\nimport rome.rollout.jetstream"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1
    assert "rome-agents[jetstream]" in done.stderr.splitlines()[-1]


def test_prompts_in_slots_decode_the_training_paths_argmax_with_its_log_probs():
    pytest.importorskip("jetstream.engine.engine_api", exc_type=ImportError)
    import dataclasses

    from jetstream.engine import engine_api, token_utils

    from rome.rollout.jetstream import JetStreamEngine

    config = dataclasses.replace(MODEL, vocab_size=TOKENIZER.vocab_size)
    stops = frozenset({TOKENIZER.special["<|im_end|>"]})
    engine = JetStreamEngine(init_params(config, jax.random.key(3)), config, TOKENIZER, stops, 3, LENGTH)
    assert isinstance(engine, engine_api.Engine) and engine.max_prefill_length == 32
    tokenizer = engine.build_tokenizer(engine.get_tokenizer())
    params, state = engine.load_params(), engine.init_decode_state()
    texts, prefixes = {0: "list the files", 2: "the list"}, {}
    for slot, text in texts.items():
        padded, length = tokenizer.encode(text, is_bos=True, max_prefill_length=32)
        assert len(padded) in (16, 32) and tokenizer.decode(padded[:length].tolist()) == text
        prefixes[slot] = engine.prefill(params=params, padded_tokens=padded, true_length=length)
        state = engine.insert(prefixes[slot], state, slot)
    more, count = tokenizer.encode(" more")
    longer = engine.prefill(params=params, existing_prefix=prefixes[2], padded_tokens=more, true_length=count)
    state = engine.insert(longer, state, 1)  # a prefix that others go on from, too
    texts[1] = "the list more"
    rows = {
        slot: TOKENIZER.encode("the list") + TOKENIZER.encode(" more") if slot == 1 else TOKENIZER.encode(text)
        for slot, text in texts.items()
    }
    logps = {slot: [] for slot in rows}
    complete = {slot: np.zeros(1, bool) for slot in rows}
    for step in range(6):
        state, result = engine.generate(params, state)
        result = result.convert_to_numpy()
        for slot in rows:
            data = result.get_result_at_slot(slot)
            assert (data.valid.item(), data.lengths.item()) == (1, step + 1)
            rows[slot].append(data.tokens.item())
            logps[slot].append(engine.log_probs(result, slot))
            samples, _ = token_utils.process_result_tokens(tokenizer, slot, 32, result, complete[slot])
            assert samples[0].token_ids == ([] if rows[slot][-1] in stops else rows[slot][-1:])
    for slot, tokens in rows.items():
        row, positions = np.zeros((1, LENGTH), np.int32), np.arange(LENGTH, dtype=np.int32)[None]
        row[0, : len(tokens)] = tokens
        logits = forward(params, config, row, positions, (positions < len(tokens)).astype(np.int32))[0]
        expected = np.asarray(jax.nn.log_softmax(logits))[len(tokens) - 7 : len(tokens) - 1]
        assert tokens[-6:] == expected.argmax(-1).tolist()
        np.testing.assert_allclose([raw for _, raw in logps[slot]], expected.max(-1), atol=1e-4)
        assert all(sampled == 0 for sampled, _ in logps[slot])
