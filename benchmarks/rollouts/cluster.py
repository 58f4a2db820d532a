"""What the simulator predicts for clusters: of hosts like this machine, and of TPUs that train the 30B model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rollouts.jobs import BATCH, GROUP_SIZE, GROUPS, SIGMA, SLOWER, STRAGGLERS

from rome.rollout.simulator import Latencies, Plan, Prediction, TurnTime, best_split, simulate
from rome.training.compile_check import CHIPS, Chip

STEPS, HOSTS, HALF, SHARE = 3, 64, 32, 4
TRAIN_FACTORS = (1, 25, 200)
MOVE = 0.03  # seconds, of the toy policy's weights and caches


def turn_times(measured: TurnTime) -> dict[str, TurnTime]:
    """As measured; of a policy 16 times as slow; and of one 64 times as slow, all of whose time goes with the rows that
    a host computes, so that more hosts make it faster."""
    rows = BATCH / SHARE / 2
    by_rows = TurnTime(step_row=64 * (measured.step / rows + measured.step_row))
    return {"decoding × 1": measured, "decoding × 16": measured.times(16), "decoding × 64, by rows": by_rows}


def scaled_up(console: Console, latencies: Latencies) -> list[dict[str, Any]]:
    """64 hosts as fast as this machine, each with a quarter of its slots and of its batch, where decoding and training
    cost more than they do for the toy policy. Training on any number of hosts, and on half of them (where its state
    needs so many). Prints each case as it is known; k hosts train."""
    batch = HOSTS * BATCH // SHARE
    console.print(f"{HOSTS} hosts, {batch} samples a step: predicted samples/s (hosts that train)")
    rows = []
    for (name, turn), train in itertools.product(turn_times(latencies.turn).items(), TRAIN_FACTORS):
        update = HOSTS / SHARE * train * np.asarray(latencies.train)
        mix = dataclasses.replace(latencies, turn=turn, train=update, move=(MOVE,))
        groups = HOSTS * GROUPS // SHARE
        plan = Plan("split", HOSTS, BATCH // SHARE, groups, GROUP_SIZE, train_hosts=HALF, engines=8)
        plans = [plan, dataclasses.replace(plan, mode="multiplexed")]
        together = simulate(dataclasses.replace(plan, mode="synchronous"), mix, STEPS, seed=0)
        best = [best_split(plan, mix, STEPS, seed=0) for plan in plans]
        half = [simulate(plan, mix, STEPS, seed=0) for plan in plans]
        gains = [b.samples_per_second / a.samples_per_second for a, b in ([p for _, p in best], half)]
        row = {"turn": name, "train": train, "synchronous": dataclasses.asdict(together), "gains": gains}
        row |= {"best": [(k, dataclasses.asdict(p)) for k, p in best], "half": [dataclasses.asdict(p) for p in half]}
        rows.append(row)
        found = " → ".join(f"{p.samples_per_second:.0f} ({k})" for k, p in best)
        halves = " → ".join(f"{p.samples_per_second:.0f}" for p in half)
        idle = ", ".join(f"{p.utilisation['idle']:.0%}" for p in (best[0][1], best[1][1]))
        console.print(
            f"{name}, training × {train}: synchronous {together.samples_per_second:.0f}; "
            f"best split → multiplexed {found}: {gains[0]:.2f} ×, idle {idle}; {HALF} train {halves}: {gains[1]:.2f} ×"
        )
    return rows


# -- the 30B model on TPUs --------------------------------------------------------------------------------------------

GIB = 2**30
STATE, WEIGHTS = 456.0, 9.6  # GiB: of the train state, over all devices that share it; of a device's rollout weights
DECODING, CACHES = 8.5, 1.4  # GiB beside them, and of all caches together: what decoding one of two cohorts takes
MODEL_WIDTH, EXPERT_WAYS = 2048, 8  # fsdp divides the one; rollouts split experts over so many devices
BATCH_GROUPS, SAMPLES = 64, 8  # and their size: configs/rome_30b.py
CHUNK, LONGEST, BUCKET = 256, 1024, 512  # tokens of a chunk: on average, at most; of an append
GENERATED = 0.25  # of an episode's tokens; the rest was read
TOOL = 2.0  # seconds of a tool call in the median
HOST_LINK = 32e9  # bytes a second between a chip and its host's memory: PCIe 4 × 16


@dataclass(frozen=True)
class Case:
    """The 30B model at one length of context on one kind of chip, by the tables of docs/scale.md.

    Attributes:
      fixed, spread: temporaries of the train step are `fixed` + `spread` / fsdp GiB a device.
      ways: devices that share a row in training (mesh.train.context).
      context: thousands (1024s) of tokens.
      chips: numbers of devices to ask about.
      row: seconds of one device, at least, that a row takes to train on.
      slot: GiB of a slot's cache.
      decode, append: bytes that a device moves to decode a token for, and to append a bucket to, `decode_rows` rows.
    """

    kind: str
    context: int
    chips: tuple[int, ...]
    fixed: float
    spread: float
    ways: int
    row: float
    slot: float
    decode: float
    append: float
    decode_rows: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    def train_hosts(self, chips: int) -> list[int]:
        """The numbers of devices to try on which the train step fits: multiples of the least fsdp that does."""
        memory = self.chip.hbm / GIB
        ways = (2**i for i in range(MODEL_WIDTH.bit_length()))
        least = next(f * self.ways for f in ways if (STATE + self.spread) / f + self.fixed <= memory)
        times = (1, 2, 3, 4, 6, 8)
        return sorted({n for n in (*(least * t for t in times), chips) if least <= n <= chips})

    @property
    def slots(self) -> int:
        """Of a device, at most; even."""
        return int((self.chip.hbm / GIB - WEIGHTS - DECODING) / (CACHES * self.slot)) // 2 * 2

    @property
    def turn(self) -> TurnTime:
        weights, bandwidth, rows = WEIGHTS * GIB, self.chip.bandwidth, self.decode_rows
        appends = math.ceil(CHUNK * (1 / GENERATED - 1) / BUCKET)
        return TurnTime(
            row=appends * self.append / rows / bandwidth,
            step=weights / bandwidth,
            step_row=(self.decode - weights) / rows / bandwidth,
        )

    def latencies(self) -> Latencies:
        """Episodes fill a fifth to all of the context; the lengths of their chunks are exponentially distributed."""
        rng = np.random.default_rng(0)
        tokens = 1024 * self.context
        turns = np.maximum(1, rng.uniform(0.2, 1, 200) * tokens * GENERATED / CHUNK).astype(int)
        lengths = [rng.exponential(CHUNK, n).clip(1, LONGEST) for n in turns]
        slower = np.where(rng.random(5000) < STRAGGLERS, SLOWER, 1.0)
        rows = BATCH_GROUPS * SAMPLES * float(turns.mean()) * CHUNK / GENERATED / tokens
        return Latencies(
            environment=TOOL * slower * np.exp(SIGMA * rng.standard_normal(5000)),
            reset=[TOOL],
            episodes=[np.ceil(chunks).astype(int).tolist() for chunks in lengths],
            turn=self.turn,
            train=[rows * self.row],
        )


CASES = (
    Case("v5p", 8, (128,), 5.6, 154.0, 1, 0.76, 0.95, 13.9e9, 355e9, 2),
    Case("v5p", 32, (16, 32, 128), 13.9, 166.0, 1, 6.83, 3.75, 19.5e9, 849e9, 2),
    Case("v5p", 128, (64, 128), 16.0, 166.0, 4, 4 * 37.2, 18.0, 32.8e9, 1482e9, 1),
    Case("v6e", 8, (256,), 5.2, 154.0, 1, 1.08, 0.95, 13.9e9, 355e9, 2),
    Case("v6e", 32, (128, 256), 14.4, 166.0, 1, 3.41, 3.75, 19.5e9, 849e9, 2),
    Case("v6e", 128, (256,), 15.5, 166.0, 4, 4 * 18.6, 18.0, 32.8e9, 1482e9, 1),
)
RATIOS = (1.0, 2.0)
TOGETHER = ("all pause to train", "synchronous")
PLANS: dict[str, dict[str, Any]] = {
    "split": {"mode": "split"},
    "multiplexed": {"mode": "multiplexed"},
    "parking": {"mode": "multiplexed", "park": True},
    "all pause to train": {"mode": "multiplexed", "park": True},
    "synchronous": {"mode": "synchronous"},
}


class Best(NamedTuple):
    train_hosts: int
    slots: int  # of a host
    prediction: Prediction

    @property
    def rate(self) -> float:
        """Samples a minute."""
        return 60 * self.prediction.samples_per_second


def best_of(case: Case, chips: int, name: str, ratio: float) -> Best | None:
    """With the numbers of training devices and of slots that suit the plan best; None: it does not fit.

    More slots mean samples that are longer under way, and thus more of them that get too old.
    """
    latencies, found = case.latencies(), []
    for k, share in itertools.product(case.train_hosts(chips), (0.5, 1.0)):
        together = name in TOGETHER
        rest = chips if together else chips - k
        if (k == chips) != together or rest % EXPERT_WAYS or not rest:
            continue
        park = PLANS[name].get("park", False)
        in_flight = (1 if name == "synchronous" else 1 + ratio) * BATCH_GROUPS * SAMPLES
        needed = share * in_flight / (chips if park else rest)
        slots = min(case.slots, max(2, 2 * math.ceil(needed / 2)))
        if any((k, slots) == best[:2] for best in found):
            continue
        seconds = slots * case.slot * GIB / (HOST_LINK if park else case.chip.interconnect)
        plan = Plan(hosts=chips, slots=slots, groups=BATCH_GROUPS, group_size=SAMPLES, train_hosts=k, **PLANS[name])
        plan = dataclasses.replace(plan, async_ratio=ratio, cohorts=4 if slots >= 4 and name == "parking" else 2)
        mix = dataclasses.replace(latencies, move=(seconds,))
        found.append(Best(k, slots, simulate(plan, mix, steps=6, seed=0, skip=4)))
    return max(found, key=lambda best: best.rate, default=None)


def full_scale(console: Console) -> list[dict[str, Any]]:
    """Samples a minute of the 30B model by topology and context, and what they are over the best static split's.

    All times are bounds from below that the compiled programs give; what is assumed are episodes and environments.
    Prints each case as it is known.
    """
    console.print("30B: predicted samples/min (devices that train; slots a device), and ÷ the best static split")
    rows = []
    for case, ratio in itertools.product(CASES, RATIOS):
        for chips in case.chips:
            best = {name: best_of(case, chips, name, ratio) for name in PLANS} if case.slots else {}
            fits = {name: found for name, found in best.items() if found is not None}
            floor = next(iter(case.train_hosts(chips)), None)
            row = {"kind": case.kind, "chips": chips, "context": case.context, "ratio": ratio, "floor": floor}
            row["best"] = {name: dataclasses.asdict(b.prediction) | b._asdict() for name, b in fits.items()}
            rows.append(row)
            split = fits.get("split")
            found = (
                f"{name} {best.rate:.1f} ({best.train_hosts}; {best.slots})"
                + (f" {best.rate / split.rate:.2f} ×" if split and name != "split" else "")
                for name, best in fits.items()
            )
            console.print(
                f"{chips} {case.kind}, {case.context}k, α = {ratio:g}; training needs {floor or 'more'}: "
                + ("; ".join(found) or "rollouts do not fit")
            )
    return rows
