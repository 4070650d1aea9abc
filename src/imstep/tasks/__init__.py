"""Training problems: data sets, models and losses, built the same way from the same seed.

>>> from imstep.tasks import TASKS
>>> sorted(TASKS)[:3]
['convection', 'convection-random', 'digits-autoencoder']
"""

from imstep.tasks.base import Batch, DataNotFoundError, Evaluation, Metric, Problem, Task, TaskError
from imstep.tasks.registry import TASKS, UnknownTaskError, get_task

__all__ = [
    "TASKS",
    "Batch",
    "DataNotFoundError",
    "Evaluation",
    "Metric",
    "Problem",
    "Task",
    "TaskError",
    "UnknownTaskError",
    "get_task",
]
