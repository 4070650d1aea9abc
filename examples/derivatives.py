"""Derivatives by the complex step: of a formula, of a function of tensors, of a loss twice.

    python examples/derivatives.py
"""

import numpy as np
import torch

import imstep


def main() -> None:
    # 1. The textbook case: f needs only to accept a complex number. Nothing is subtracted, so h may be absurdly small.
    f = lambda z: np.exp(z) / np.sqrt(np.sin(z) ** 3 + np.cos(z) ** 3)
    exact = 4.0534278938986207  # f'(1.5), by multiple precision
    for h in (1e-2, 1e-6, 1e-200):
        print(f"f'(1.5) with h = {h:7.0e}:  error {abs(imstep.derivative(f, 1.5, h=h) - exact):.1e}")

    # 2. Tensors: no complex support is needed, any PyTorch function will do.
    x = torch.linspace(-2, 2, 5)
    print("gelu'(x)  =", imstep.derivative(torch.nn.functional.gelu, x))

    # 3. A Jacobian-vector product, and a Hessian-vector product from one backward pass.
    a = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    w, v = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    value, change = imstep.jvp(lambda t: torch.tanh(a @ t), (w,), (v,))
    print("value     =", value, "\nJ v       =", change)

    loss = lambda t: torch.tanh(a @ t).square().sum()
    product = imstep.hvp(loss, w, v)
    finite = imstep.hvp(loss, w, v, h=1e-30)  # full complex arithmetic, h² terms included
    reference = torch.autograd.functional.hvp(loss, w, v)[1]
    print("H v       =", product)
    print(f"difference from double backward: {float((product - reference).abs().max()):.1e}, "
          f"with h = 1e-30: {float((finite - reference).abs().max()):.1e}")


def draw(figure, _):
    """gelu, and its derivative from the imaginary part."""
    x = torch.linspace(-4, 4, 200)
    axes = figure.subplots()
    axes.plot(x, torch.nn.functional.gelu(x), label="gelu(x)")
    axes.plot(x, imstep.derivative(torch.nn.functional.gelu, x), "--", label="gelu'(x), by the complex step")
    axes.set(xlabel="x")
    axes.legend()


if __name__ == "__main__":
    main()
