"""A physics-informed network: u'' = -sin x on [0, pi], u = 0 at both ends; the solution is sin x.

The loss holds second derivatives of the network with respect to its input, made by autograd with
``create_graph=True``. The curvature with respect to the weights is then a fourth derivative; the complex step
takes it from the loss as it is.

    python examples/poisson.py
"""

import math

import torch
from torch import Tensor, nn

import imstep


def derivative(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.linspace(0, math.pi, 64, dtype=torch.float64)[:, None].requires_grad_()
    ends = torch.tensor([[0.0], [math.pi]], dtype=torch.float64)

    def closure() -> Tensor:
        u = net(x)
        residual = derivative(derivative(u, x), x) + torch.sin(x)
        return residual.square().mean() + net(ends).square().mean()

    optimizer = imstep.NewtonKrylov(net.parameters())
    for step in range(steps):
        loss = optimizer.step(closure)
        if step % 5 == 0:
            print(f"step {step:3d}  loss {float(loss):.2e}  products so far {optimizer.cost.products}")
    with torch.no_grad():
        error = (net(x) - torch.sin(x)).abs().max()
    cost = optimizer.cost.gradient_equivalents
    print(f"largest error of u: {float(error):.1e} after {cost:.0f} gradient-equivalents")


if __name__ == "__main__":
    main()
