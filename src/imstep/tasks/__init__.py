"""Training problems: data sets, models and losses, built the same way from the same seed.

>>> from imstep.tasks import TASKS
>>> sorted(TASKS)[:3]
['abalone', 'addition-150', 'addition-80']
"""

from imstep.tasks.base import AnyBatch, DataNotFoundError, Evaluation, Metric, Problem, Surface, Task, TaskError
from imstep.tasks.examples import ACCURACY, Batch, ExampleProblem, ExampleTask, held_out
from imstep.tasks.physics import Condition, PhysicsProblem, PhysicsTask, Points, Reference
from imstep.tasks.registry import TASKS, Origin, UnknownTaskError, find_task, get_task
from imstep.tasks.table_task import TableOptions

__all__ = [
    "ACCURACY",
    "TASKS",
    "AnyBatch",
    "Batch",
    "Condition",
    "DataNotFoundError",
    "Evaluation",
    "ExampleProblem",
    "ExampleTask",
    "Metric",
    "Origin",
    "PhysicsProblem",
    "PhysicsTask",
    "Points",
    "Problem",
    "Reference",
    "Surface",
    "TableOptions",
    "Task",
    "TaskError",
    "UnknownTaskError",
    "find_task",
    "get_task",
    "held_out",
]
