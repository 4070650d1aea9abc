"""Published physics-informed problems, each with an exact or a spectral solution."""

from imstep.tasks.equations import burgers, cavity, heat, phase_field, poisson, transport
from imstep.tasks.physics import PhysicsTask

__all__ = ["EQUATIONS"]

EQUATIONS: tuple[PhysicsTask, ...] = (
    *poisson.TASKS,
    *heat.TASKS,
    *burgers.TASKS,
    *phase_field.TASKS,
    *transport.TASKS,
    *cavity.TASKS,
)
