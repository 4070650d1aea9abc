"""DeepXDE: u'' = -sin x on [0, pi] with u = 0 at both ends.

    DDE_BACKEND=pytorch python examples/frameworks/with_deepxde.py
"""

import math

import deepxde as dde
import torch

import imstep

dde.config.set_default_float("float64")
dde.config.set_random_seed(0)

geometry = dde.geometry.Interval(0, math.pi)
ends = dde.icbc.DirichletBC(geometry, lambda x: 0, lambda x, on_boundary: on_boundary)
equation = lambda x, u: dde.grad.hessian(u, x) + torch.sin(x)
data = dde.data.PDE(geometry, equation, ends, num_domain=64, num_boundary=2)
net = dde.nn.FNN([1, 20, 20, 1], "tanh", "Glorot uniform")

model = dde.Model(data, net)
model.compile(imstep.LeastSquares(net.parameters()))
history, state = model.train(iterations=30, display_every=10)
print(f"final loss {sum(history.loss_train[-1]):.1e}")
