"""Train an MLP on a regression problem with NewtonKrylov, and print what each step says about itself.

    python examples/regression.py
"""

import torch
from torch import nn

import imstep


def main(steps: int = 25) -> nn.Module:
    torch.manual_seed(0)
    inputs = torch.rand(256, 2) * 4 - 2
    targets = torch.sin(inputs[:, :1] * inputs[:, 1:])
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = imstep.NewtonKrylov(model.parameters())

    def closure() -> torch.Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    print("step       loss  products  ended by     t     rho   gradient-equivalents so far")
    for _ in range(steps):
        optimizer.step(closure)
        r = optimizer.last_step
        status = r.status.name.lower() if r.status else "-"
        print(
            f"{r.step:4d}  {r.loss:9.2e}  {r.products:8d}  {status:9s}  {r.step_length:4.2f}  {r.rho:5.2f}"
            f"   {optimizer.cost.gradient_equivalents:7.0f}"
        )
    print(f"loss after {steps} steps: {float(closure().detach()):.2e}")
    return model


def draw(figure, model):
    """The function that was learnt, and how far it is off."""
    side = torch.linspace(-2, 2, 100)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        learnt = model(grid)[:, 0]
    for axes, values, title in zip(
        figure.subplots(1, 2), (learnt, (learnt - torch.sin(grid.prod(1))).abs()), ("Learnt", "Error"), strict=True
    ):
        shown = axes.imshow(values.reshape(100, 100).T, origin="lower", extent=(-2, 2, -2, 2))
        axes.set(title=title)
        axes.grid(False)
        figure.colorbar(shown, ax=axes)


if __name__ == "__main__":
    main()
