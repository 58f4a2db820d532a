"""A structured start: small transformers that learn to copy in hundreds of updates instead of thousands.

An agent copies (names, codes, paths) more than it invents, and what a small transformer learns last is the induction
circuit that does it: a head that looks one token back, and a later head that looks for its own token in what those
heads wrote. Here the first head is there from the start, and the second is tilted towards its place, in one key/value
group of each layer; everything stays trainable, and the architecture is untouched. It cannot copy yet (random text is
still continued at chance), but it gets there sooner. (Starting attention near a known solution: Trockman & Kolter,
"Mimetic Initialization of Self-Attention Layers", 2023; the circuit: Olsson et al., "In-context Learning and Induction
Heads", 2022.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rome.models.config import ModelConfig
from rome.models.params import Params
from rome.models.rope import rope_frequencies

COMMON = 0.5  # length of the direction that all embeddings share, against theirs
KEEP = 0.2  # how much of the random start stays in the head that looks back
MATCH = 0.8  # of a matching head's query that looks for its own token
COPY = 0.3  # how much of the identity a head of a later layer writes


def init_induction(params: Params, config: ModelConfig, key: jax.Array) -> Params:
    """`params` (of `init_params`) with the beginnings of an induction circuit in each layer's first key/value group.

    * All embeddings share a small direction. It adds a constant to tied logits, which softmax ignores, and gives
      queries and keys a constant part to work with (the model has no biases).
    * Layer 0: the constant parts of query and key differ by one rotary position, so attention peaks one token back.
    * Later layers: queries lean towards what layer 0 wrote about a token's predecessor, and values towards being
      written back as themselves, so that the token found is the token predicted.

    Raises:
        NotImplementedError: some layers of a mixture of experts are dense.
    """
    if config.dense_layers:
        raise NotImplementedError("init_induction expects layers of one kind: dense_layers must be empty")
    group = config.num_heads // config.num_kv_heads
    layers = dict(params["layers"])
    wq, wk, wv, wo = (layers[name].astype(jnp.float32) for name in ("wq", "wk", "wv", "wo"))
    embedding = params["embedding"].astype(jnp.float32)

    common = jax.random.normal(key, (config.hidden_size,))
    common = common / jnp.linalg.norm(common)
    length = jnp.mean(jnp.linalg.norm(embedding, axis=-1))
    embedding = embedding + COMMON * length * common

    half = config.head_dim // 2
    angle = rope_frequencies(config)
    fast = (jnp.arange(half) < (half + 1) // 2).astype(jnp.float32)  # slow pairs can't tell neighbours apart
    looks_at = jnp.concatenate([fast, jnp.zeros(half)])
    looks_from = jnp.concatenate([fast * jnp.cos(angle), -fast * jnp.sin(angle)])  # one position earlier
    wk = wk.at[0, :, 0].set(KEEP * wk[0, :, 0] + jnp.outer(common, looks_at))
    wq = wq.at[0, :, :group].set(KEEP * wq[0, :, :group] + jnp.einsum("d,h->dh", common, looks_from)[:, None])

    written = sum(wv[0, :, 0] @ wo[0, head] for head in range(group))  # [D, D]: what is known of the predecessor
    for layer in range(1, config.num_layers):
        match = written @ wk[layer, :, 0]
        match = match / jnp.linalg.norm(match)
        for head in range(config.num_heads):
            wo = wo.at[layer, head].add(COPY * wv[layer, :, head // group].T)
            if head < group:
                query = wq[layer, :, head]
                wq = wq.at[layer, :, head].set(MATCH * jnp.linalg.norm(query) * match + (1 - MATCH) * query)
    layers |= {"wq": wq, "wk": wk, "wo": wo}
    cast = jax.tree.map(lambda new, old: new.astype(old.dtype), {**params, "layers": layers}, params)
    return {**cast, "embedding": embedding.astype(params["embedding"].dtype)}
