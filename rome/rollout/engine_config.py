"""The static shapes of the training engine, and what it samples from."""

from __future__ import annotations

from dataclasses import dataclass

from rome.models.paged import Paging
from rome.rollout.weights import PRECISIONS, EngineError


@dataclass(frozen=True)
class EngineConfig:
    """Static shapes and the sampling distribution.

    Attributes:
      slots: trajectories in flight, over all cohorts; a multiple of `cohorts`.
      cohorts: groups of slots that take turns.
      max_length: tokens a trajectory may have: prompt, chunks and observations together.
      extend_buckets: ascending static sizes of an append; the longest delta of a cohort chooses. Each costs a compile.
        Prompts are prefilled in the largest.
      prompt_rows: distinct prompts that are prefilled together, at most `slots_per_cohort`; a turn with more of them
        takes several passes.
      max_chunk_tokens: tokens a chunk may have; without a stop id by then it ends as `Finish.LENGTH`.
      temperature: of sampling; 0 is greedy. `generate` may override it (no recompile).
      top_p, top_k, min_p: truncation of the sampling distribution; 1, 0 and 0 switch it off.
      record_experts: keep which experts each token visits, for router replay; of a mixture of experts only.
      precision: of the engine's weights, see `engine_model`; what is not ``model`` adds to π_old / μ (docs/serving.md).
      page_size: tokens of a page of the KV cache (docs/rollout.md); 0: every slot has a row of `max_length` tokens.
      pages: of the KV cache, over all cohorts; 0: as many as all slots can need. With fewer, slots may wait for pages.
    """

    slots: int = 64
    cohorts: int = 2
    max_length: int = 256
    extend_buckets: tuple[int, ...] = (16, 64)
    prompt_rows: int = 4
    max_chunk_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    record_experts: bool = False
    precision: str = "model"
    page_size: int = 0
    pages: int = 0

    def __post_init__(self) -> None:
        buckets = tuple(self.extend_buckets)
        checks = {
            "cohorts": (self.cohorts >= 1, "at least 1"),
            "slots": (self.slots >= 1 and self.slots % max(self.cohorts, 1) == 0, "a positive multiple of cohorts"),
            "max_length": (self.max_length >= 2, "at least 2"),
            "extend_buckets": (
                bool(buckets) and buckets == tuple(sorted(set(buckets))) and buckets[0] >= 1,
                "ascending sizes of at least 1",
            ),
            "prompt_rows": (self.prompt_rows >= 1, "at least 1"),
            "max_chunk_tokens": (self.max_chunk_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "a finite number >= 0"),
            "top_p": (0 < self.top_p <= 1, "0 < top_p <= 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "min_p": (0 <= self.min_p < 1, "0 <= min_p < 1"),
            "precision": (self.precision in PRECISIONS, f"one of {PRECISIONS}"),
            "page_size": (self.page_size >= 0, "at least 0"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise EngineError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        self._check_pages()

    def _check_pages(self) -> None:
        if not self.page_size:
            valid, expected = self.pages == 0, "0 with page_size 0"
        else:
            least = self.cohorts * Paging(self.page_size, 0).of(self.max_length)
            valid = self.pages == 0 or (self.pages % self.cohorts == 0 and self.pages >= least)
            expected = f"0, or a multiple of cohorts of at least {least} (each cohort has room for max_length)"
        if not valid:
            raise EngineError(f"pages: expected {expected}, found {self.pages}")

    @property
    def slots_per_cohort(self) -> int:
        return self.slots // self.cohorts

    @property
    def paging(self) -> Paging | None:
        """The pages of a cohort; None: it has rows."""
        if not self.page_size:
            return None
        needed = self.slots_per_cohort * Paging(self.page_size, 0).of(self.max_length)
        return Paging(self.page_size, self.pages // self.cohorts or needed)
