"""What counts as a failure of the infrastructure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rock_env import BackendUnavailable, RockError, SpecError
from rock_env.errors import VerifierFailed
from rome.trajectory import Status


class EnvFailure(RuntimeError):
    """The episode says nothing about the policy: discard it and sample the same initial state again. Never a reward."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(f"{status.value}: {message}")
        self.status = status
        self.message = message


@contextmanager
def infrastructure(clean_up: Callable[[], None]) -> Iterator[None]:
    """Turns a sandbox's and the verifier's failures into EnvFailure, after `clean_up`. What trying again can't mend
    passes as it is."""
    try:
        yield
    except (BackendUnavailable, SpecError):
        clean_up()
        raise
    except VerifierFailed as error:
        clean_up()
        raise EnvFailure(Status.VERIFIER_FAILURE, str(error)) from error
    except RockError as error:
        clean_up()
        raise EnvFailure(Status.INFRA_FAILURE, f"{type(error).__name__}: {error}") from error
    except BaseException:
        clean_up()
        raise
