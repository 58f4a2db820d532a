"""The objective again, in float64 and explicit loops, and the random batches that it is compared on. Shares no code."""

import math

import jax
import numpy as np

from rome.ipa import PolicyBatch, policy_loss

ROWS, LENGTH, CHUNKS = 6, 24, 8  # one shape for all tests, so that each objective compiles once
DRAWN = 3  # rows that are drawn; the others are empty, room for packing the same trajectories in other ways

eager = jax.value_and_grad(policy_loss, has_aux=True)  # for a config that is used a few times: nothing to compile
value_and_grad = jax.jit(eager, static_argnums=2, compiler_options={"xla_backend_optimization_level": 0})


def random_trajectory(rng, max_chunks=3, chunk_tokens=(1, 4), imitation=False, spread=0.7):
    """A dict of arrays: a prompt, then chunks with 0 to 2 observation tokens between (18 tokens at most)."""
    ids = [-1] * rng.integers(1, 3)
    num_chunks = int(rng.integers(1, max_chunks + 1))
    for k in range(num_chunks):
        ids += [k] * int(rng.integers(chunk_tokens[0], chunk_tokens[1] + 1))
        if k + 1 < num_chunks:
            ids += [-1] * int(rng.integers(0, 3))
    n = len(ids)
    logp = -rng.exponential(1.0, n)
    old = logp + spread * rng.normal(size=n)
    positive = bool(rng.random() < 0.5)
    prefix = int(rng.integers(0, num_chunks)) if imitation else 0
    return {
        "ids": np.array(ids),
        "logp": logp,
        "old": old,
        "beh": old + spread * rng.normal(size=n),
        "returns": rng.normal(size=num_chunks),
        "positive": np.full(num_chunks, positive),
        "imitation": np.arange(num_chunks) < prefix,
    }


def pack(rows, garbage=0.0):
    """(logp float32[B, T], PolicyBatch) of `rows`, lists of trajectories; untrained cells hold `garbage`."""
    shape, table = (ROWS, LENGTH), (ROWS, CHUNKS)
    logp, old, beh = (np.full(shape, garbage, np.float32) for _ in range(3))
    seg, pos, ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    returns, positive, imitation = np.zeros(table, np.float32), np.zeros(table, bool), np.zeros(table, bool)
    for b, row in enumerate(rows):
        at = chunk = 0
        for s, t in enumerate(row):
            cells = slice(at, at + len(t["ids"]))
            ids[b, cells] = np.where(t["ids"] >= 0, t["ids"] + chunk, -1)
            seg[b, cells], pos[b, cells] = s + 1, np.arange(len(t["ids"]))
            for name, array in (("logp", logp), ("old", old), ("beh", beh)):
                array[b, cells] = np.where(t["ids"] >= 0, t[name], garbage)
            chunks = slice(chunk, chunk + len(t["returns"]))
            returns[b, chunks], positive[b, chunks] = t["returns"], t["positive"]
            imitation[b, chunks] = t["imitation"]
            at, chunk = cells.stop, chunks.stop
    return logp, PolicyBatch(
        tokens=np.zeros(shape, np.int32),
        positions=pos,
        segment_ids=seg,
        chunk_ids=ids,
        old_logp=old,
        behavior_logp=beh,
        returns=returns,
        positive=positive,
        imitation=imitation,
    )


def random_rows(seed, **options):
    """DRAWN lists of random trajectories that fit in LENGTH tokens and CHUNKS chunks."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(DRAWN):
        row = []
        while True:
            t = random_trajectory(rng, **options)
            tokens = sum(len(u["ids"]) for u in row) + len(t["ids"])
            chunks = sum(len(u["returns"]) for u in row) + len(t["returns"])
            if tokens > LENGTH or chunks > CHUNKS:
                break
            row.append(t)
        out.append(row)
    return out


def random_batch(seed, **options):
    return pack(random_rows(seed, **options))


def trained(batch, imitation):
    """The trained (row, position)s of the imitation term, or of the RL term."""
    cells = []
    for b in range(batch.chunk_ids.shape[0]):
        for t in range(batch.chunk_ids.shape[1]):
            c = int(batch.chunk_ids[b, t])
            if c >= 0 and bool(batch.imitation[b, c]) == imitation:
                cells.append((b, t))
    return cells


def units(batch, cells, level):
    """{unit: its cells} at `level`."""
    out = {}
    for b, t in cells:
        key = {"token": t, "chunk": int(batch.chunk_ids[b, t]), "trajectory": int(batch.segment_ids[b, t])}[level]
        out.setdefault((b, key), []).append((b, t))
    return out


def geometric_ratio(a, b, cells):
    mean = math.fsum(float(a[c]) - float(b[c]) for c in cells) / len(cells)
    return math.exp(min(max(mean, -20.0), 20.0))


def loop_loss(logp, batch, config):
    """(loss, gradient float64[B, T], kept cells) of the objective."""
    gradient = np.zeros(logp.shape)
    rl, il = trained(batch, False), trained(batch, True) if config.imitation != "off" else []
    chunk = {(b, t): (b, int(batch.chunk_ids[b, t])) for b, t in rl + il}

    keep, weight = dict.fromkeys(rl, True), dict.fromkeys(rl, 1.0)
    if config.mask_level != "none":
        for cells in units(batch, rl, config.mask_level).values():
            r = geometric_ratio(batch.old_logp, batch.behavior_logp, cells)
            kept = r <= config.mismatch_upper and (config.mismatch_lower is None or r >= config.mismatch_lower)
            keep.update(dict.fromkeys(cells, kept))
    if config.ratio_level != "none":
        reference = batch.old_logp if config.ratio_reference == "proximal" else batch.behavior_logp
        for cells in units(batch, rl, config.ratio_level).values():
            w = min(geometric_ratio(logp, reference, cells), 1.0)
            for c in cells:
                if config.ratio_on == "all" or not batch.positive[chunk[c]]:
                    weight[c] = w

    level = {"tokens": "token", "chunks": "chunk", "trajectories": "trajectory"}[config.normalizer]
    n, n_il = len(units(batch, rl, level)), len(units(batch, il, level))
    loss = 0.0
    for c in rl:
        if keep[c]:
            gradient[c] = -config.lambda_rl * weight[c] * float(batch.returns[chunk[c]]) / n
            loss += gradient[c] * float(logp[c])
    for c in il:
        gradient[c] = -config.lambda_il * float(batch.returns[chunk[c]]) / n_il
        loss += gradient[c] * float(logp[c])
    return loss, gradient, {c for c in rl if keep[c]}
