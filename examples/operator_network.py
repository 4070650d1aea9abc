"""An operator network: from a function, given at 20 points, to its antiderivative anywhere.

A branch network reads the function, a trunk network the place, and the value is the inner product of their features
(DeepONet, Lu et al., arXiv 1910.03193). Each step has 60 new functions at 40 new places: 2,400 residuals for 1,721
parameters. A function has residuals at all places, and a place those of all functions; LeastSquares finds that the
branch has rows of its own by function and the trunk by place, and takes 40 + 60 backward passes for the Jacobian.

    python examples/operator_network.py
"""

import math

import torch
from torch import Tensor, nn

import imstep

SENSORS = torch.linspace(0, 1, 20, dtype=torch.float64)


class OperatorNetwork(nn.Module):
    def __init__(self, width: int = 20, features: int = 10) -> None:
        super().__init__()
        net = lambda inputs: nn.Sequential(
            nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, features)
        )
        self.branch, self.trunk, self.shift = net(len(SENSORS)), net(1), nn.Parameter(torch.zeros(1))

    def forward(self, functions: Tensor, places: Tensor) -> Tensor:
        """(functions, places)."""
        return self.branch(functions) @ self.trunk(places).T + self.shift


def sample(functions: int, places: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of three sines at the sensors, places, and the antiderivatives there."""
    generator = torch.Generator().manual_seed(seed)
    heights = torch.randn(functions, 3, dtype=torch.float64, generator=generator)
    x = torch.rand(places, 1, dtype=torch.float64, generator=generator)
    rates = math.pi * torch.arange(1, 4, dtype=torch.float64)
    return heights @ torch.sin(rates[:, None] * SENSORS), x, heights @ ((1 - torch.cos(x * rates)) / rates).T


def main(steps: int = 80) -> tuple[OperatorNetwork, list[float]]:
    """The network, and its errors for new functions from step to step."""
    torch.manual_seed(0)
    net = OperatorNetwork().double()
    new = sample(200, 100, seed=0)
    optimizer, errors = imstep.LeastSquares(net.parameters()), []
    for step in range(steps):
        functions, x, values = sample(60, 40, seed=1 + step)
        loss = optimizer.step(lambda: (net(functions, x) - values).square().mean())  # noqa: B023
        with torch.no_grad():
            errors.append(float((net(*new[:2]) - new[2]).norm() / new[2].norm()))
        if step % 20 == 0:
            print(f"step {step:3d}  loss {float(loss):.2e}  error for new functions {errors[-1]:.1e}")
    print(f"relative error for new functions at new places after {steps} steps: {errors[-1]:.1e}")
    return net, errors


def draw(figure, result):
    """An antiderivative, and the error for new functions."""
    net, errors = result
    functions, _, _ = sample(3, 1, seed=-1)
    x = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    left, right = figure.subplots(1, 2)
    with torch.no_grad():
        for function, found in zip(functions, net(functions, x), strict=True):
            (line,) = left.plot(SENSORS, function, ".", markersize=3)
            left.plot(x[:, 0], found, color=line.get_color())
    left.set(title="Functions, and what the network returns", xlabel="x")
    right.semilogy(errors)
    right.set(title="Error for new functions", xlabel="step")


if __name__ == "__main__":
    main()
