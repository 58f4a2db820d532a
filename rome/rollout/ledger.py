"""The token ledger of one trajectory: token-in, token-out, and append only.

The engine samples ids, the environment's answer is tokenised once, and both are appended here. What the engine has
already processed must be an exact prefix of what it is fed next; `delta` asserts that every turn, so a re-tokenised or
re-rendered history fails loudly instead of training on tokens that nobody sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rome.trajectory import Chunk, Observation


class LedgerError(RuntimeError):
    """Earlier tokens of a trajectory changed, or an append broke the turn order. Names the trajectory and place."""


class TokenLedger:
    """Prompt, chunks and observations of one trajectory, in order, as one growing int32 array.

    Args:
      trajectory_id: names the trajectory in errors.
      capacity: the most tokens the ledger may hold (the engine's `max_length`).
    """

    def __init__(self, trajectory_id: str, capacity: int) -> None:
        self.trajectory_id = trajectory_id
        self.prompt: Observation | None = None
        self.chunks: tuple[Chunk, ...] = ()
        self.observations: tuple[Observation, ...] = ()
        self._tokens = np.zeros(capacity, np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return len(self._tokens) - self._length

    @property
    def tokens(self) -> np.ndarray:
        """All tokens so far, int32[n], read-only."""
        view = self._tokens[: self._length]
        view.flags.writeable = False
        return view

    def append_prompt(self, tokens: Sequence[int] | np.ndarray, text: str = "") -> None:
        """Opens the ledger. Raises LedgerError if it is already open or the prompt is empty."""
        if self.prompt is not None:
            raise self._error("append_prompt: the prompt is already written")
        self.prompt = Observation(self._append(tokens, "prompt"), text)

    def append_chunk(self, chunk: Chunk) -> None:
        """Appends a chunk. Raises LedgerError if there is no prompt, or the last chunk was not answered yet."""
        if self.prompt is None or len(self.observations) != len(self.chunks):
            raise self._error("append_chunk: expected a prompt and an observation after each earlier chunk")
        self._append(chunk.tokens, chunk.id)
        self.chunks = (*self.chunks, chunk)

    def append_observation(self, tokens: Sequence[int] | np.ndarray, text: str = "") -> None:
        """Appends the answer to the last chunk. Raises LedgerError if there is no chunk waiting for one."""
        if len(self.observations) != len(self.chunks) - 1:
            raise self._error("append_observation: expected exactly one chunk without an observation")
        name = f"observation {len(self.observations)}"
        self.observations = (*self.observations, Observation(self._append(tokens, name), text))

    def delta(self, processed: np.ndarray) -> np.ndarray:
        """The tokens (int32[m]) to feed next, given those the engine already holds (int32[n]).

        Raises LedgerError, naming the first position, unless `processed` is an exact prefix of the ledger.
        """
        count = len(processed)
        if count > self._length:
            raise self._error(f"the engine holds {count} tokens, the ledger only {self._length}")
        differs = processed != self._tokens[:count]
        if differs.any():
            at = int(np.argmax(differs))
            raise self._error(f"token {at} was {int(processed[at])} in the engine, is {int(self._tokens[at])} now")
        return self.tokens[count:]

    def _append(self, tokens: Sequence[int] | np.ndarray, name: str) -> np.ndarray:
        added = np.array(tokens, np.int32)
        if added.ndim != 1 or added.size == 0:
            raise self._error(f"{name}: expected a non-empty list of token ids, found shape {list(added.shape)}")
        if added.size > self.room:
            raise self._error(f"{name}: {added.size} tokens do not fit, {self.room} of {len(self._tokens)} left")
        self._tokens[self._length : self._length + added.size] = added
        self._length += added.size
        added.flags.writeable = False
        return added

    def _error(self, message: str) -> LedgerError:
        return LedgerError(f"trajectory {self.trajectory_id}: {message}")
