"""Training problems: data sets, models and losses, built the same way from the same seed.

>>> from imstep.tasks import TASKS
>>> sorted(TASKS)[:3]
['allen-cahn', 'burgers', 'burgers-smooth']
"""

from imstep.tasks.base import AnyBatch, DataNotFoundError, Evaluation, Metric, Problem, Surface, Task, TaskError
from imstep.tasks.examples import Batch, ExampleProblem, ExampleTask
from imstep.tasks.physics import Condition, PhysicsProblem, PhysicsTask, Points, Reference
from imstep.tasks.registry import TASKS, UnknownTaskError, get_task

__all__ = [
    "TASKS",
    "AnyBatch",
    "Batch",
    "Condition",
    "DataNotFoundError",
    "Evaluation",
    "ExampleProblem",
    "ExampleTask",
    "Metric",
    "PhysicsProblem",
    "PhysicsTask",
    "Points",
    "Problem",
    "Reference",
    "Surface",
    "Task",
    "TaskError",
    "UnknownTaskError",
    "get_task",
]
