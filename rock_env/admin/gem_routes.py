"""The GEM API's routes: /v1/gem/make, reset, step, close."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from rock_env.admin.auth import Principal
from rock_env.admin.gem import Environments, Wanted
from rock_env.admin.http import Json, principal
from rock_env.admin.schema import Body, Id, Seconds
from rock_env.gem.episode import MAX_SECONDS
from rock_env.gem.text import MAX_TEXT

Who = Annotated[Principal, Depends(principal)]
Count = Annotated[int, Field(ge=1, le=100_000)]
AgentName = Annotated[str, Field(min_length=1, max_length=64)]


class OptionsBody(Body):
    """What may be chosen of an environment: which of these, its kind says."""

    max_steps: Count | None = None
    max_chunks: Count | None = None
    max_observation_chars: Annotated[int, Field(ge=7, le=MAX_TEXT - 64)] | None = None
    command_seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)] | None = None
    backend: Annotated[str, Field(max_length=64)] | None = None
    families: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    horizons: Annotated[list[Count], Field(min_length=1, max_length=1000)] | None = None


class MakeBody(Body):
    """`env_id`: a task of the hub ([OWNER/]NAME@VERSION, or by digest), or an id that this admin serves."""

    env_id: Annotated[str, Field(min_length=1, max_length=512)]
    agents: Annotated[list[AgentName], Field(min_length=1, max_length=64)] | None = None
    sandboxes: Literal["shared", "isolated"] = "isolated"
    options: OptionsBody = OptionsBody()
    idle_seconds: Seconds | None = None

    def wanted(self) -> Wanted:
        agents = None if self.agents is None else tuple(self.agents)
        options = self.options.model_dump(exclude_none=True)
        return Wanted(self.env_id, agents, self.sandboxes, options, self.idle_seconds)


class ResetBody(Body):
    id: Id
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class StepBody(Body):
    id: Id
    action: Annotated[str, Field(max_length=MAX_TEXT)]
    agent: AgentName | None = None


class CloseBody(Body):
    id: Id


class MadeOut(BaseModel):
    id: str
    env_id: str
    agents: list[str] | None
    sandboxes: str
    idle_seconds: float


class ResetOut(BaseModel):
    """Of several agents: both by agent."""

    observation: str | dict[str, str]
    info: dict


class StepOut(BaseModel):
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict


def step_out(observation: object, reward: float, terminated: bool, truncated: bool, info: dict) -> dict:
    """The five-tuple as JSON; environments may give NumPy's scalars."""
    ends = {"terminated": bool(terminated), "truncated": bool(truncated)}
    return {"observation": observation, "reward": float(reward), **ends, "info": info}


def gem_routes(router: APIRouter, environments: Environments) -> None:
    @router.post("/gem/make", status_code=201, response_model=MadeOut)
    async def make(body: MakeBody, who: Who) -> Response:
        """An environment, which is closed when it was idle for `idle_seconds`. It takes no sandbox before a reset."""
        live = await environments.make(who, body.wanted())
        shown = {"id": live.id, "env_id": live.env_id, "agents": live.agents, "idle_seconds": live.idle_seconds}
        return Json({**shown, "sandboxes": body.sandboxes}, 201)

    @router.post("/gem/reset", response_model=ResetOut)
    async def reset(body: ResetBody, who: Who) -> Response:
        """Begin an episode, in fresh sandboxes."""
        observation, info = await environments.reset(who, body.id, body.seed)
        return Json({"observation": observation, "info": info})

    @router.post("/gem/step", response_model=StepOut)
    async def step(body: StepBody, who: Who) -> Response:
        """One action (of one agent). An error ends the episode, and is no reward."""
        return Json(step_out(*await environments.step(who, body.id, body.action, body.agent)))

    @router.post("/gem/close", status_code=204, response_class=Response)
    async def close(body: CloseBody, who: Who) -> Response:
        await environments.close(who, body.id)
        return Response(status_code=204)
