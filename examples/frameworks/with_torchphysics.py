"""TorchPhysics: the heat equation, on points drawn anew for each step.

    python examples/frameworks/with_torchphysics.py
"""

import math

import pytorch_lightning as lightning
import torch
import torchphysics as tp

import imstep

lightning.seed_everything(0, verbose=False)
X, T, U = tp.spaces.R1("x"), tp.spaces.R1("t"), tp.spaces.R1("u")
space, time = tp.domains.Interval(X, 0, 1), tp.domains.Interval(T, 0, 1)
model = tp.models.FCN(input_space=X * T, output_space=U, hidden=(20, 20))


def heat(u: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return tp.utils.grad(u, t) - 0.1 * tp.utils.laplacian(u, x)


within = tp.samplers.RandomUniformSampler(space * time, n_points=300)
edges = tp.samplers.RandomUniformSampler(space.boundary * time, n_points=60)
start = tp.samplers.RandomUniformSampler(space * time.boundary_left, n_points=60)
conditions = [
    tp.conditions.PINNCondition(model, within, heat),
    tp.conditions.PINNCondition(model, edges, lambda u: u),
    tp.conditions.PINNCondition(model, start, lambda u, x: u - torch.sin(math.pi * x)),
]
setting = tp.OptimizerSetting(imstep.LeastSquares, lr=1.0)
trainer = lightning.Trainer(max_steps=30, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(tp.solver.Solver(conditions, optimizer_setting=setting))
print(f"final loss {trainer.callback_metrics['train/loss'].item():.1e}")
