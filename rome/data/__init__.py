"""Floor 3: where training data comes from: copy exercises, demonstrations, the task sampler."""

from rome.data.copying import copy_exercises
from rome.data.demonstrations import Episode, collect_episodes, relabel, tokenize_episodes
from rome.data.names import relabelling
from rome.data.sampler import TaskSampler, TaskSpec, fixed_tasks

__all__ = [
    "Episode",
    "TaskSampler",
    "TaskSpec",
    "collect_episodes",
    "copy_exercises",
    "fixed_tasks",
    "relabel",
    "relabelling",
    "tokenize_episodes",
]
