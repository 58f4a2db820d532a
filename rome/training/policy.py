"""From trajectories to one policy update: returns, packing, micro-batches, the IPA step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from rome.ipa import ObjectiveConfig, PolicyBatch, Totals, batch_totals, merge_metrics, trajectory_returns
from rome.models import ModelConfig
from rome.models.lora import LoraConfig
from rome.models.sharding import Mesh, batch_shardings
from rome.training.packing import PackedRows, pack_trajectories
from rome.training.resampling import Expert
from rome.training.state import OptimizerConfig, TrainState
from rome.training.steps import PolicyStep
from rome.trajectory import Trajectory


@dataclass(frozen=True)
class PolicySettings:
    """The reinforcement-learning stage.

    Attributes:
      steps: batches; groups: task groups a batch; group_size: samples a group.
      row_length, max_chunks, micro_rows: static shape of a micro-batch.
      updates_per_batch: 1 is on-policy (π_old = π_θ); more split the batch and use the importance ratio.
      skip_inert: leave out of the forward pass what has return 0 everywhere: its gradient is exactly 0, and the
        normaliser still counts it. Its ratios don't show in the metrics, in steps that are kept for the viewer either.
      router_replay: a mixture of experts visits, in training, the experts that its rollout recorded.
      save_every: steps between batches kept for the report's viewer.
      optimizer: of this stage.
      lora: adapters that this stage trains instead of the weights, if their rank is above 0.
    """

    steps: int
    groups: int
    group_size: int
    row_length: int
    max_chunks: int
    micro_rows: int
    optimizer: OptimizerConfig
    updates_per_batch: int = 1
    skip_inert: bool = True
    router_replay: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    save_every: int = 25

    def __post_init__(self) -> None:
        sizes = ("groups", "group_size", "row_length", "max_chunks", "micro_rows", "updates_per_batch", "save_every")
        for name in ("steps", *sizes):
            if getattr(self, name) < (least := 0 if name == "steps" else 1):
                raise ValueError(f"{name}: expected at least {least}, found {getattr(self, name)}")


@dataclass
class Update:
    """What an update leaves behind: metrics by name, and per trajectory id what the viewer shows of its chunks."""

    metrics: dict[str, float]
    annotations: dict[str, dict[str, Any]] = field(default_factory=dict)


class PolicyTrainer:
    """Runs `PolicyStep` over batches of trajectories. All shapes are static: nothing compiles after `warmup`.

    The reward shaping, returns and masks are the objective's; see `rome.ipa`.
    """

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        optimizer: optax.GradientTransformation,
        settings: PolicySettings,
        temperature: float = 1.0,
        mesh: Mesh | None = None,
    ) -> None:
        if settings.router_replay and not model.is_moe:
            raise ValueError("router_replay: expected False of a policy without experts, found True")
        self._objective, self._settings, self._mesh = objective, settings, mesh
        self._routed = (model.routed_layers, model.num_experts_per_token) if settings.router_replay else None
        on_policy = settings.updates_per_batch == 1
        self._step = PolicyStep(model, objective, optimizer, on_policy, temperature, mesh)
        self._compute_returns = jax.jit(partial(trajectory_returns, config=objective), static_argnums=2)
        # an expert has no group to be compared with
        self._expert_returns = jax.jit(
            partial(trajectory_returns, config=replace(objective, baseline="none")), static_argnums=2
        )
        self._totals = jax.jit(lambda batch: batch_totals(batch, objective))
        self._add = jax.jit(lambda a, b: jax.tree.map(lambda x, y: x + y, a, b))
        self._merge = jax.jit(lambda a, b: merge_metrics(jax.tree.map(lambda x, y: jax.numpy.stack([x, y]), a, b)))

    def warmup(self, state: TrainState) -> None:
        """Compiles everything that `update` runs on `groups × group_size` trajectories; `state` stays as it is.

        Without it, a batch compiles what it is the first to need: a second micro-batch, or anything to train at all.
        """
        s = self._settings
        count, width = s.groups * s.group_size, s.max_chunks
        rewards, chunks = np.zeros(count, np.float32), np.ones(count, np.int32)
        self._compute_returns(rewards, chunks, width, group_ids=np.zeros(count, np.int32), intrinsic=None)
        batch = self._batches([], np.zeros((0, width), np.float32), {})[1][0]
        if self._objective.imitation != "off":
            self._expert_returns(rewards[: s.groups], chunks[: s.groups], width)
        part = self._totals(batch)
        totals = self._add(Totals(np.float32(0), np.float32(0)), part)
        totals = self._add(totals, part)  # on a mesh the sum lies elsewhere than the zero did
        gradients = self._step.zeros(state.params)
        share = np.float32(1)
        gradients, (_, metrics, _) = self._step.accumulate(state.params, gradients, batch, totals, share)
        self._merge(self._merge(metrics, metrics), metrics)
        if s.updates_per_batch > 1 or s.skip_inert:
            self._step.log_probs(state.params, batch)
        self._step.apply.compile(state, gradients)  # not called: it would need the memory of a second state

    def update(
        self,
        state: TrainState,
        trajectories: Sequence[Trajectory],
        seed: int,
        annotate: bool = False,
        experts: Sequence[Expert] = (),
    ) -> tuple[TrainState, Update]:
        """`updates_per_batch` optimizer updates on the trajectories; `seed` orders them into minibatches.

        The replayed prefix of a trajectory (`prefix_chunks`) is never trained on; an expert is, once, by the imitation
        term (Eq 10). At most one expert a group.
        """
        returns = self._returns(trajectories)
        if experts:
            returns = np.concatenate([returns, self._returns_of_experts(experts)])
            trajectories = [*trajectories, *(_imitated_part(expert) for expert in experts)]
        parts = self._split(trajectories, seed)
        metrics: list[dict[str, Any]] = []
        update = Update({})
        old = self._old_logp(state, trajectories) if len(parts) > 1 else {}
        for indices in parts:
            state, part = self._update_part(state, trajectories, returns, indices, old, annotate, update)
            metrics.append(part)
        names = {name: None for part in metrics for name in part}  # a part with nothing to train has only a few
        update.metrics = {name: float(np.mean([m[name] for m in metrics if name in m])) for name in names}
        return state, update

    def _returns(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """float32[N, C]."""
        names = {name: index for index, name in enumerate(dict.fromkeys(t.group_id for t in trajectories))}
        width = self._settings.max_chunks
        intrinsic = None
        if any(t.intrinsic_rewards is not None for t in trajectories):
            intrinsic = np.zeros((len(trajectories), width), np.float32)
            for row, t in enumerate(trajectories):
                if t.intrinsic_rewards is not None:
                    intrinsic[row, : len(t.chunks)] = t.intrinsic_rewards
        returns = self._compute_returns(
            np.array([t.final_reward for t in trajectories], np.float32),
            np.array([len(t.chunks) for t in trajectories], np.int32),
            width,
            group_ids=np.array([names[t.group_id] for t in trajectories], np.int32),
            intrinsic=intrinsic,
        )
        return np.asarray(returns)

    def _returns_of_experts(self, experts: Sequence[Expert]) -> np.ndarray:
        """float32[E, C]: the returns of the experts' own, whole trajectories."""
        shape = self._settings.groups
        rewards, chunks = np.zeros(shape, np.float32), np.ones(shape, np.int32)
        rewards[: len(experts)] = [t.final_reward for t, _ in experts]
        chunks[: len(experts)] = [len(t.chunks) for t, _ in experts]
        return np.asarray(self._expert_returns(rewards, chunks, self._settings.max_chunks))[: len(experts)]

    def _split(self, trajectories: Sequence[Trajectory], seed: int) -> list[list[int]]:
        count = self._settings.updates_per_batch
        if count == 1:
            return [list(range(len(trajectories)))]
        order = np.random.default_rng(seed).permutation(len(trajectories))
        return [sorted(int(i) for i in part) for part in np.array_split(order, count)]

    def _batches(
        self, trajectories: Sequence[Trajectory], returns: np.ndarray, old: dict[str, np.ndarray]
    ) -> tuple[PackedRows, list[PolicyBatch]]:
        """The trajectories as packed rows, and these as micro-batches. `old`: π_old by trajectory id, where known."""
        s = self._settings
        rows = pack_trajectories(trajectories, s.row_length, s.max_chunks, s.micro_rows, self._routed)
        old_logp = np.zeros_like(rows.behavior_logp)
        _place(old, trajectories, rows, old_logp)
        whole = PolicyBatch(
            tokens=rows.tokens,
            positions=rows.positions,
            segment_ids=rows.segment_ids,
            chunk_ids=rows.chunk_ids,
            old_logp=old_logp,
            behavior_logp=rows.behavior_logp,
            returns=rows.table(list(returns), np.float32),
            positive=rows.table([t.succeeded for t in trajectories], bool, False),
            imitation=rows.table([t.prefix_chunks == len(t.chunks) for t in trajectories], bool, False),
            experts=rows.experts,
        )
        starts = range(0, rows.num_rows, s.micro_rows)
        parts = [jax.tree.map(lambda leaf, at=at: leaf[at : at + s.micro_rows], whole) for at in starts]
        if self._mesh is not None:
            parts = [jax.device_put(part, batch_shardings(part, self._mesh, s.row_length)) for part in parts]
        return rows, parts

    def _old_logp(self, state: TrainState, trajectories: Sequence[Trajectory]) -> dict[str, np.ndarray]:
        """π_old of each trajectory's tokens, float32[length], under the parameters before the first update."""
        rows, batches = self._batches(trajectories, np.zeros((len(trajectories), self._settings.max_chunks)), {})
        logp = np.concatenate([np.asarray(self._step.log_probs(state.params, batch)) for batch in batches])
        return {t.id: logp[p.row, p.start : p.start + p.length] for t, p in zip(trajectories, rows.places, strict=True)}

    def _update_part(
        self,
        state: TrainState,
        trajectories: Sequence[Trajectory],
        returns: np.ndarray,
        indices: Sequence[int],
        old: dict[str, np.ndarray],
        annotate: bool,
        update: Update,
    ) -> tuple[TrainState, dict[str, float]]:
        """One optimizer update on `trajectories[indices]`."""
        moving = [i for i in indices if np.any(returns[i])]
        if not moving:  # the gradient would be 0, and no optimizer's momentum should move on that
            return state, {"train/nothing_to_train": 1.0, "train/grad_norm": 0.0, "train/loss": 0.0}
        live = moving if self._settings.skip_inert else list(indices)
        inert = sorted(set(indices) - set(live))
        rows, batches = self._batches([trajectories[i] for i in live], returns[live], old)
        inert_rows, inert_batches = self._batches([trajectories[i] for i in inert], returns[inert], old)
        totals = Totals(np.float32(0), np.float32(0))
        for batch in (*batches, *inert_batches):
            totals = self._add(totals, self._totals(batch))
        gradients, merged, logps = self._step.zeros(state.params), None, []
        sizes = np.array([np.count_nonzero(batch.segment_ids) for batch in batches], np.float32)
        for batch, share in zip(batches, sizes / sizes.sum(), strict=True):
            gradients, (_, metrics, logp) = self._step.accumulate(state.params, gradients, batch, totals, share)
            merged = metrics if merged is None else self._merge(merged, metrics)
            logps.append(logp)
        if annotate:
            self._annotate(update, [trajectories[i] for i in live], returns[live], rows, logps, old)
            if inert:  # for the viewer alone: the metrics are those of any other step
                logps = [self._step.log_probs(state.params, batch) for batch in inert_batches]
                self._annotate(update, [trajectories[i] for i in inert], returns[inert], inert_rows, logps, old)
        state, norm = self._step.apply(state, gradients)
        numbers = {name: float(value) for name, value in jax.device_get(merged).items()}
        entropy = numbers.pop("entropy_sum") / max(numbers["train/tokens"], 1.0)
        numbers |= {"train/grad_norm": float(norm), "train/entropy": entropy, "train/row_fill": rows.fill}
        return state, numbers

    def _annotate(
        self,
        update: Update,
        trajectories: Sequence[Trajectory],
        returns: np.ndarray,
        rows: PackedRows,
        logps: Sequence[jax.Array],
        old: dict[str, np.ndarray],
    ) -> None:
        """Per-chunk returns, ratios (Eq 8), mismatch and mask of each trajectory, for people to look at.

        `logps`: log π_θ of the rows, a micro-batch each.
        """
        logp = np.concatenate([np.asarray(part) for part in logps])
        old_logp = logp.copy()
        _place(old, trajectories, rows, old_logp)
        drift = rows.per_chunk_mean(logp - old_logp)
        gap = rows.per_chunk_mean(old_logp - rows.behavior_logp)
        upper, lower = self._objective.mismatch_upper, self._objective.mismatch_lower or 0.0
        for t, g, d, m in zip(trajectories, returns, drift, gap, strict=True):
            mismatch = np.exp(np.clip(m, -20, 20))
            update.annotations[t.id] = {
                "returns": [float(x) for x in g[: len(t.chunks)]],
                "ratio": [float(x) for x in np.exp(np.clip(d, -20, 20))],
                "mismatch": [float(x) for x in mismatch],
                "kept": [self._objective.mask_level == "none" or bool(lower <= x <= upper) for x in mismatch],
                "positive": t.succeeded,
            }


def _imitated_part(expert: Expert) -> Trajectory:
    """The expert's chunks that are imitated, as a trajectory that is all prefix."""
    t, count = expert
    return replace(t, chunks=t.chunks[:count], observations=t.observations[: count - 1], prefix_chunks=count)


def _place(
    values: dict[str, np.ndarray], trajectories: Sequence[Trajectory], rows: PackedRows, into: np.ndarray
) -> None:
    """Writes `values` (float32[length] by trajectory id) where their trajectories lie in `into` [R, T]."""
    for t, p in zip(trajectories, rows.places, strict=True):
        if t.id in values:
            into[p.row, p.start : p.start + p.length] = values[t.id]
