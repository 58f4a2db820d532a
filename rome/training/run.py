"""A run from its first demonstration to its report: CPT → SFT → IPA, resumable at any moment.

`train(config)` is what `experiments/ipa_train.py` calls. A run is a function of its config: at asynchronous ratio 0, a
run that was killed and started again gives the same metrics, bit for bit, as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rome.data import TaskSampler, collect_episodes, fixed_tasks, tokenize_episodes
from rome.data.sampler import DEMONSTRATION_SEEDS, EVALUATION_SEEDS, SEEDS_PER_RUN
from rome.files import atomic_write
from rome.models import init_induction, init_params, param_specs, train_tokenizer
from rome.models.lora import Adapted, adapt
from rome.models.sharding import param_shardings
from rome.rollout import HostPool, RolloutRunner, Trace
from rome.training.checkpoint import Checkpointer
from rome.training.compilations import count_compilations
from rome.training.config import open_run
from rome.training.evaluation import EvaluationResult, summarize
from rome.training.hosts import host_runner, make_environment, make_renderer, make_runner
from rome.training.memory import dispatch_synchronously, keep_freed_memory
from rome.training.platform import make_meshes, require_devices
from rome.training.policy import PolicyTrainer
from rome.training.pretrained import adopt, first_params, kept_config, kept_tokenizer, zero_params
from rome.training.report import write_report
from rome.training.rl import GroupSource, request_for, rollout_metrics
from rome.training.settings import RunSettings, SupervisedSettings, load_settings
from rome.training.state import TrainState, init_state_on, make_optimizer
from rome.training.steps import make_supervised_step
from rome.training.supervised import copy_batches, demonstration_batches, run_supervised
from rome.training.tracking import MetricsWriter, Progress
from rome.trajectory import Trajectory, load_trajectories, save_trajectories

STAGES = ("cpt", "sft", "ipa")
# What may change when a run continues: it has no part in what is computed.
MAY_CHANGE = ("checkpoint.keep", "rollout.env_threads", "demonstrations.workers")


def train(config: ConfigDict) -> dict[str, Any]:
    """Runs, or continues, the run of `config` in its directory; returns what `result.json` holds."""
    keep_freed_memory()
    settings = load_settings(config)
    if settings.mesh.train.size == settings.mesh.rollout.size == 1:
        dispatch_synchronously()
    require_devices(settings)
    directory, _ = open_run(config, MAY_CHANGE)
    finished = directory / "result.json"
    if finished.is_file():
        report = directory / "report.html"
        if not report.is_file() or report.stat().st_mtime_ns < finished.stat().st_mtime_ns:  # killed between the two
            write_report(directory)
        return json.loads(finished.read_text(encoding="utf-8"))
    with MetricsWriter(directory, tensorboard=settings.tensorboard) as writer, Progress(settings.name) as progress:
        checkpointer = Checkpointer(directory / "checkpoints", settings.checkpoint.keep)
        try:
            return Run(settings, directory, writer, progress, checkpointer).execute()
        finally:
            checkpointer.close()


class Run:
    """One run in one directory. The stages are methods, in the order in which they happen."""

    def __init__(
        self,
        settings: RunSettings,
        directory: Path,
        writer: MetricsWriter,
        progress: Progress,
        checkpointer: Checkpointer,
    ) -> None:
        self.settings, self.directory = settings, directory
        self.writer, self.progress, self.checkpointer = writer, progress, checkpointer
        self.mesh, self.rollout_meshes = make_meshes(settings.mesh)
        self.key = jax.random.key(settings.seed)
        self.results: dict[str, Any] = {}

    def execute(self) -> dict[str, Any]:
        """Everything that is still to be done."""
        self.demonstrations = self._prepare()
        if self.settings.pretrained is None:
            self.model = self.settings.model_config(self.tokenizer.vocab_size)
        else:
            self.model = kept_config(self.settings.pretrained, self.directory)
        stage, step, state, source_state = self._restore()
        if stage == "cpt":
            state = self._supervised("cpt", self.settings.cpt, step, state)
            stage, step, state = "sft", 0, self._fresh_state("sft", state.params)
        if stage == "sft":
            state = self._supervised("sft", self.settings.sft, step, state)
            stage, step, state = "ipa", 0, self._fresh_state("ipa", state.params)
        self._policy(step, state, source_state)
        atomic_write(self.directory / "result.json", json.dumps(self.results, indent=2) + "\n")
        self.writer.sync()
        write_report(self.directory)
        return self.results

    # -- before the first step --------------------------------------------------------------------------------------

    def _prepare(self) -> list[Trajectory]:
        """Demonstrations and their tokenizer: from the run's directory, or made now. The tokenizer is trained on them,
        or a published model's own."""
        path, folder = self.directory / "demonstrations.msgpack", self.directory / "tokenizer"
        if path.is_file():
            self.tokenizer = kept_tokenizer(self.directory)
            self.renderer = make_renderer(self.tokenizer)
            return load_trajectories(path)
        s = self.settings
        if s.pretrained is not None:
            self.tokenizer = adopt(s.pretrained, self.directory)
        first = DEMONSTRATION_SEEDS + (s.seed % 64) * SEEDS_PER_RUN
        specs = fixed_tasks(s.tasks.families, s.tasks.horizons, s.demonstrations.count, first)
        self.progress.start("demonstrations", len(specs))
        started = time.monotonic()
        episodes = collect_episodes(
            specs,
            s.demonstrations.flawed_fraction,
            s.seed,
            functools.partial(make_environment, s),
            s.demonstrations.workers,
            on_episode=lambda done: self.progress.update(done),
        )
        if s.pretrained is None:
            texts = (text for episode in episodes for text in episode.texts())
            self.tokenizer = train_tokenizer(texts, s.vocab_size, digits=s.digits_per_token)
            self.tokenizer.save(folder)
        self.renderer = make_renderer(self.tokenizer)
        trajectories = tokenize_episodes(episodes, self.renderer)
        solved = sum(e.reward > 0 for e in episodes) / len(episodes)
        metrics = {"demonstrations/success": solved, "time/demonstrations": time.monotonic() - started}
        self.writer.write(len(episodes), "demonstrations", metrics)
        self.progress.log(f"{len(episodes)} demonstrations, {solved:.0%} of them solve their task")
        save_trajectories(path, trajectories)
        return trajectories

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _fresh_state(self, stage: str, params: Any) -> TrainState:
        lora = self.settings.rl.lora
        if stage == "ipa" and lora.rank:
            params = adapt(params, self.model, lora, jax.random.fold_in(self.key, 2))
        return init_state_on(self.mesh, params, make_optimizer(*self.settings.optimizer_of(stage)), self.model)

    @property
    def _shardings(self) -> Any:
        """Where the mesh wants each parameter; None without a mesh."""
        return None if self.mesh is None else param_shardings(param_specs(self.model), self.mesh)

    def _first_params(self) -> Any:
        """Drawn, or those of the published model; each where the mesh wants it."""
        if self.settings.pretrained is not None:
            return first_params(self.settings.pretrained, self.directory, self._shardings)
        fresh = init_params(self.model, jax.random.fold_in(self.key, 0))
        if self.settings.induction:
            fresh = init_induction(fresh, self.model, jax.random.fold_in(self.key, 1))
        return self._placed(fresh)

    def _placed(self, params: Any) -> Any:
        return params if self.mesh is None else jax.device_put(params, self._shardings)

    def _global_step(self, stage: str, step: int) -> int:
        """Checkpoints are numbered over all stages, with numbers of their own for what starts a stage: SFT, IPA, and
        IPA after the warm start's evaluation."""
        s = self.settings
        before = {"cpt": 0, "sft": s.cpt.steps + 1, "ipa": s.cpt.steps + s.sft.steps + 2}
        return before[stage] + step + ("warm_start" in self.results)

    def _save(self, stage: str, step: int, state: TrainState, source: GroupSource | None = None) -> None:
        self.writer.sync()
        cursor, buffer = source.state_dict() if source else ({}, b"")
        key = [int(word) for word in jax.random.key_data(self.key)]
        cursor |= {
            "stage": stage,
            "step": step,
            "records": self.writer.num_records,
            "results": self.results,
            "prng_key": key,
        }
        self.checkpointer.save(self._global_step(stage, step), state, cursor, buffer)

    def _restore(self) -> tuple[str, int, TrainState, tuple[dict[str, Any], bytes] | None]:
        """(stage, step, state, rollout state): from the newest checkpoint, or a new policy at the first step."""
        latest = self.checkpointer.latest_step
        if latest is None:
            self.writer.restore(min(self.writer.num_records, 1))  # the record of the demonstrations stays
            return "cpt", 0, self._fresh_state("cpt", self._first_params()), None
        stage = str(self.checkpointer.cursor(latest)["stage"])
        template = self._fresh_state(stage, self._placed(zero_params(self.model)))
        state, cursor, buffer = self.checkpointer.restore(latest, template)
        self.writer.restore(int(cursor["records"]))
        self.results = dict(cursor["results"])
        self.key = jax.random.wrap_key_data(jax.numpy.array(cursor["prng_key"], "uint32"))
        self.progress.log(f"continuing at {stage} step {cursor['step']}")
        return stage, int(cursor["step"]), state, (cursor, buffer) if stage == "ipa" and buffer else None

    # -- the stages -------------------------------------------------------------------------------------------------

    def _supervised(self, stage: str, section: SupervisedSettings, start: int, state: TrainState) -> TrainState:
        """Continued pre-training on copy exercises, or SFT on demonstrations."""
        s = self.settings
        if stage == "cpt":
            batch_at = copy_batches(section, s.copying, self.demonstrations, self.renderer, s.seed)
        else:
            batch_at = demonstration_batches(section, self.demonstrations, self.renderer, s.seed)
        self.progress.start(stage, section.steps, start)
        clock = [time.monotonic(), start]

        def on_metrics(step: int, metrics: dict[str, float]) -> None:
            now = time.monotonic()
            done, seconds = step - clock[1], now - clock[0]
            clock[:] = [now, step]
            speed = done * section.rows * section.row_length / max(seconds, 1e-9)
            self.writer.write(step, stage, {**metrics, "train/tokens_per_second": speed, "time/step": seconds / done})
            self.progress.update(step, loss=metrics["train/loss"], tokens_per_second=speed)

        optimizer = make_optimizer(*self.settings.optimizer_of(stage))
        step_function = make_supervised_step(self.model, optimizer, self.mesh)
        save = lambda step, at: self._save(stage, step, at)  # noqa: E731
        every = s.checkpoint.supervised_every
        state = run_supervised(state, start, section, batch_at, step_function, on_metrics, save, every)
        following = STAGES[STAGES.index(stage) + 1]
        self._save(following, 0, self._fresh_state(following, state.params))
        return state

    def _policy(self, start: int, state: TrainState, source_state: tuple[dict[str, Any], bytes] | None) -> None:
        """IPA, with evaluations before, during and after it."""
        s = self.settings
        sampler = TaskSampler(s.tasks.families, s.tasks.horizons, s.seed, s.tasks.focus, s.tasks.floor)
        trainer = PolicyTrainer(
            self.model, s.ipa, make_optimizer(*s.optimizer_of("ipa")), s.rl, s.engine.temperature, self.mesh
        )
        trainer.warmup(state)
        params = self._rollout_params(state.params)
        apart = self.mesh is not None or self.rollout_meshes != (None,)  # rollouts have devices of their own
        with contextlib.ExitStack() as stack:
            runner = stack.enter_context(make_runner(s, self.model, self.renderer, params, start, apart))
            pool = stack.enter_context(self._hosts(params, start)) if s.rollout.hosts else None
            source = GroupSource(s, runner, sampler, self.demonstrations, pool)
            if s.mesh.multiplex:
                wide, narrow = ({device.id for device in mesh.devices.flat} for mesh in self.rollout_meshes)
                self.progress.log(f"devices {wide} roll out; {narrow} of them while {wide - narrow} train")
            if source_state is not None:
                source.load_state_dict(*source_state)
            if "warm_start" not in self.results:
                self.results["warm_start"] = self._evaluate(runner, "warm_start", 0, s.evaluation.tasks)
                self._save("ipa", 0, state, source)
            self.progress.start("ipa", s.rl.steps, start)
            try:
                for step in range(start, s.rl.steps):
                    state = self._policy_step(step, state, trainer, source)
                    self._after_step(step + 1, state, source, runner)
            finally:
                source.stop()
            if "final" not in self.results:
                self.results["final"] = self._evaluate(runner, "final", s.rl.steps, s.evaluation.tasks)
                if s.tasks.held_out:
                    held_out = self._evaluate(runner, "held_out", s.rl.steps, max(1, s.evaluation.tasks // 3), True)
                    self.results["held_out_families"] = held_out

    def _hosts(self, params: Any, version: int) -> HostPool:
        make = functools.partial(host_runner, self.settings, str(self.directory.absolute()), self.model)
        self.progress.log(f"starting {self.settings.rollout.hosts} rollout hosts")
        return HostPool(make, params, version, self.settings.rollout.host_config())

    def _rollout_params(self, params: Any) -> Any:
        """The weights as the engine wants them: in the model's dtype. Those for a mesh it puts there itself, and those
        with adapters it merges itself."""
        if isinstance(params, Adapted):
            return params
        serving = dataclasses.replace(self.model, param_dtype=self.model.dtype)
        if serving != self.model:
            params = jax.tree.map(lambda leaf: leaf.astype(self.model.dtype), params)
        if self.rollout_meshes == (None,) and (self.mesh is not None or serving != self.model):
            return jax.device_put(params, jax.devices()[0])
        return params

    def _policy_step(self, step: int, state: TrainState, trainer: PolicyTrainer, source: GroupSource) -> TrainState:
        """Step n: groups sampled by version n (or a little older), one batch of updates, version n + 1 published."""
        s, started = self.settings, time.monotonic()
        before = source.stats
        keep = (step + 1) % s.rl.save_every == 0 or step in (0, s.rl.steps - 1)
        trace = source.trace = Trace() if keep else None
        with count_compilations() as compiled:
            groups = source.batch(step)
            rolled = time.monotonic()
            samples = [t for group in groups for t in group]
            state, update = trainer.update(state, samples, s.seed + step, keep, source.experts)
            updated = time.monotonic()
            source.publish(self._rollout_params(state.params), step + 1)
        ended, after = time.monotonic(), source.stats
        metrics = rollout_metrics(groups, step) | update.metrics | source.metrics()
        metrics |= {
            "time/rollout": rolled - started,
            "time/train": ended - rolled,
            "time/step": ended - started,
            "time/generate": after.generate_seconds - before.generate_seconds,
            "time/environment_wait": after.waited_seconds - before.waited_seconds,
            "rollout/tokens_per_second": (after.decoded_tokens - before.decoded_tokens) / max(rolled - started, 1e-9),
            "compile/programs": float(compiled.count),
        }
        self.writer.write(step + 1, "ipa", metrics)
        self.progress.update(
            step + 1,
            success=metrics.get("train/success", float("nan")),
            tokens_per_second=metrics["rollout/tokens_per_second"],
            seconds=metrics["time/step"],
        )
        if trace is not None:
            name, source.trace = f"step_{step + 1:06d}", None
            trace.add("train", "wait for groups", started, rolled - started, groups=len(groups))
            trace.add("train", "update", rolled, updated - rolled, samples=len(samples))
            trace.add("train", "publish weights", updated, ended - updated, version=step + 1)
            folder = self.directory / "traces"
            folder.mkdir(exist_ok=True)
            trace.write(folder / f"{name}.json")
            self._keep_trajectories(name, groups, update.annotations)
        return state

    def _after_step(self, done: int, state: TrainState, source: GroupSource, runner: RolloutRunner) -> None:
        """Mid-run evaluation and checkpoint, when it is time for them."""
        s = self.settings
        if s.evaluation.every and done % s.evaluation.every == 0 and done < s.rl.steps:
            source.stop()
            self._evaluate(runner, f"step_{done}", done, s.evaluation.tasks_during)
        if done % s.checkpoint.every == 0 or done == s.rl.steps:
            source.stop()
            self._save("ipa", done, state, source)
            if done < s.rl.steps:  # else the last evaluation's report comes at once
                write_report(self.directory)

    def _evaluate(
        self, runner: RolloutRunner, name: str, step: int, tasks: int, held_out: bool = False
    ) -> dict[str, Any]:
        """avg@k on held-out seeds, sampled from the initial state at the evaluation temperature."""
        s = self.settings
        families = s.tasks.held_out if held_out else s.tasks.families
        specs = fixed_tasks(families, s.tasks.horizons, tasks, EVALUATION_SEEDS)
        requests = [request_for(spec, f"eval-{name}-{i}", s.evaluation.samples, s.seed) for i, spec in enumerate(specs)]
        self.progress.log(f"evaluating: {len(requests)} tasks × {s.evaluation.samples}")
        groups = runner.run(requests, temperature=s.evaluation.temperature, scored=False)
        result: EvaluationResult = summarize(groups)
        prefix = "eval_held_out" if held_out else "eval"
        self.writer.write(step, "eval", result.metrics(prefix))
        self.progress.log(
            f"{name}: success {result.success:.3f} [{result.low:.3f}, {result.high:.3f}] on {result.episodes} episodes"
        )
        if name in ("warm_start", "final", "held_out"):
            self._keep_trajectories(f"eval_{name}", groups[:40], {})
        return result.as_dict()

    def _keep_trajectories(self, name: str, groups: list[list[Trajectory]], annotations: dict[str, Any]) -> None:
        """For the report's viewer: at most 64 trajectories."""
        folder = self.directory / "trajectories"
        folder.mkdir(exist_ok=True)
        chosen = [t for group in groups for t in group][:64]
        save_trajectories(folder / f"{name}.msgpack", chosen)
        known = {t.id: annotations[t.id] for t in chosen if t.id in annotations}
        atomic_write(folder / f"{name}.json", json.dumps(known) + "\n")
