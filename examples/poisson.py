"""A physics-informed network: u'' = -sin x on [0, pi], u = 0 at both ends; the solution is sin x.

The loss holds second derivatives of the network with respect to its input, made by autograd with
``create_graph=True``. For NewtonKrylov the curvature with respect to the weights is a fourth derivative; the complex
step takes it from the loss as it is. LeastSquares reads the Jacobian of the 66 residuals off autograd's graph, and
needs no more curvature than that.

    python examples/poisson.py
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import imstep


def derivative(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def problem() -> tuple[nn.Module, Callable[[], Tensor], Tensor]:
    """Network, loss and points."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.linspace(0, math.pi, 64, dtype=torch.float64)[:, None].requires_grad_()
    ends = torch.tensor([[0.0], [math.pi]], dtype=torch.float64)

    def closure() -> Tensor:
        u = net(x)
        residual = derivative(derivative(u, x), x) + torch.sin(x)
        return residual.square().mean() + net(ends).square().mean()

    return net, closure, x


def main(steps: int = 40) -> dict[str, tuple[Tensor, Tensor]]:
    """The points, and the errors of u there, by optimizer."""
    found = {}
    for kind in (imstep.NewtonKrylov, imstep.LeastSquares):
        net, closure, x = problem()
        optimizer = kind(net.parameters())
        for step in range(steps):
            loss = optimizer.step(closure)
            if step % 10 == 0:
                cost = optimizer.cost.gradient_equivalents
                print(f"{kind.__name__} step {step:3d}  loss {float(loss):.2e}  gradient-equivalents so far {cost:.0f}")
        with torch.no_grad():
            found[kind.__name__] = x.detach()[:, 0], (net(x) - torch.sin(x)).abs()[:, 0]
        print(f"loss {float(closure().detach()):.1e} after {optimizer.cost.gradient_equivalents:.0f}")
    newton, squares = (float(error.max()) for _, error in found.values())
    print(f"largest error of u: NewtonKrylov {newton:.1e}, LeastSquares {squares:.1e}")
    return found


def draw(figure, result):
    """The solution, and the errors of both networks."""
    left, right = figure.subplots(1, 2)
    for name, (x, error) in result.items():
        right.semilogy(x, error, label=name)
    left.plot(x, torch.sin(x), color="black")
    left.set(title="Solution", xlabel="x", ylabel="u")
    right.set(title="Error of the network", xlabel="x")
    right.legend()


if __name__ == "__main__":
    main()
