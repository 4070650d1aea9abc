"""PINA: u'' = -sin x on [0, pi] with u = 0 at both ends.

    python examples/frameworks/with_pina.py
"""

import math

import torch
from pina import Condition, Trainer
from pina.domain import CartesianDomain
from pina.equation import Equation, FixedValue
from pina.model import FeedForward
from pina.operator import laplacian
from pina.problem import SpatialProblem
from pina.solver import PINN

import imstep
from imstep.integrations.lightning import StepMonitor
from imstep.integrations.pina import TorchOptimizer

torch.manual_seed(0)


class Poisson(SpatialProblem):
    output_variables = ["u"]  # noqa: RUF012
    spatial_domain = CartesianDomain({"x": [0.0, math.pi]})
    domains = {"inside": spatial_domain, "left": CartesianDomain({"x": 0.0}), "right": CartesianDomain({"x": math.pi})}  # noqa: RUF012
    conditions = {  # noqa: RUF012
        "inside": Condition(
            domain="inside", equation=Equation(lambda x, u: laplacian(u, x, components=["u"], d=["x"]) + torch.sin(x))
        ),
        "left": Condition(domain="left", equation=FixedValue(0.0)),
        "right": Condition(domain="right", equation=FixedValue(0.0)),
    }


problem = Poisson()
problem.discretise_domain(64, "grid", domains="inside")
problem.discretise_domain(1, "random", domains=["left", "right"])
solver = PINN(problem, FeedForward(1, 1, layers=[20, 20]), optimizer=TorchOptimizer(imstep.LeastSquares))
trainer = Trainer(
    solver,
    max_epochs=20,
    accelerator="cpu",
    callbacks=[StepMonitor()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.train()
print(f"final loss {trainer.callback_metrics['step/new_loss'].item():.1e}")
