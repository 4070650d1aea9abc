"""Tasks of many kinds, chosen for what is known of curvature on them."""

from imstep.tasks.examples import ExampleTask
from imstep.tasks.suite import (
    autoencoders,
    densities,
    identification,
    molecules,
    pictures,
    recurrent,
    tabular,
    transformers,
    vision,
)

__all__ = ["SUITE"]

SUITE: tuple[ExampleTask, ...] = (
    *autoencoders.TASKS,
    *recurrent.TASKS,
    *identification.TASKS,
    *pictures.TASKS,
    *transformers.TASKS,
    *vision.TASKS,
    *tabular.TASKS,
    *densities.TASKS,
    *molecules.TASKS,
)
