"""What counts as a failure of the infrastructure, and for how long it may last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from rock_env import BackendUnavailable, RockError, Sandbox, SpecError
from rock_env.errors import VerifierFailed
from rome.trajectory import Status

AWAY_SECONDS = 300.0
_WAIT_SECONDS = 20.0  # for one start; a runner's deadline of a reset is longer (rome.rollout.Deadlines)
_PAUSE_SECONDS = 0.5


class EnvFailure(RuntimeError):
    """The episode says nothing about the policy: discard it and sample the same initial state again. Never a reward."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(f"{status.value}: {message}")
        self.status = status
        self.message = message


class Presence:
    """Whether whoever starts sandboxes (this machine, an admin) is there. Thread-safe; see `presence_of`.

    Who was never there lacks something that trying again won't mend. Who was there may be away for a moment, as an
    admin that is started again is; one that stays away for `seconds` has gone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._was_there = False
        self._away_since: float | None = None

    def start(self, start: Callable[[], Sandbox]) -> Sandbox:
        """A sandbox; waits a while for who is away.

        Raises:
          BackendUnavailable: who starts it was never there, or has gone.
          EnvFailure: it is away: try again.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                sandbox = start()
            except BackendUnavailable as error:
                failure = self.missed(error)
                if failure is error:
                    raise
                if not isinstance(failure, EnvFailure) or time.monotonic() >= deadline:
                    raise failure from error
                time.sleep(_PAUSE_SECONDS)
            else:
                with self._lock:
                    self._was_there, self._away_since = True, None
                return sandbox

    def missed(self, error: BackendUnavailable) -> EnvFailure | BackendUnavailable:
        """What an error of who starts sandboxes, or holds one, is to a run."""
        now = time.monotonic()
        with self._lock:
            if not self._was_there:
                return error
            self._away_since = now if self._away_since is None else self._away_since
            away = now - self._away_since
        if away > self._seconds:
            return BackendUnavailable(
                f"no sandbox could be had for {away:.0f} s, the limit is {self._seconds:g}: {error}"
            )
        return EnvFailure(Status.INFRA_FAILURE, f"{type(error).__name__}: {error}")


@lru_cache(maxsize=64)
def presence_of(start: Callable[..., Sandbox], backend: str, seconds: float) -> Presence:
    """One for all environments of this process that start sandboxes alike: an environment lives for an episode."""
    return Presence(seconds)


@contextmanager
def infrastructure(clean_up: Callable[[], None], presence: Presence | None = None) -> Iterator[None]:
    """Turns a sandbox's and the verifier's failures into EnvFailure, after `clean_up`. What trying again can't mend
    passes as it is; without `presence`, so does BackendUnavailable."""
    try:
        yield
    except VerifierFailed as error:
        clean_up()
        raise EnvFailure(Status.VERIFIER_FAILURE, str(error)) from error
    except SpecError:
        clean_up()
        raise
    except BackendUnavailable as error:
        clean_up()
        if presence is None:
            raise
        raise presence.missed(error) from error
    except RockError as error:
        clean_up()
        raise EnvFailure(Status.INFRA_FAILURE, f"{type(error).__name__}: {error}") from error
    except BaseException:
        clean_up()
        raise
