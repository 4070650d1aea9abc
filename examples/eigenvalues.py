"""The extreme eigenvalues of a network's Hessian by SciPy's Lanczos method, without forming the matrix.

    pip install scipy
    python examples/eigenvalues.py
"""

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

import imstep


def main() -> tuple[np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    inputs, labels = torch.randn(200, 10, dtype=torch.float64), torch.randint(3, (200,))
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 3)).double()

    # One evaluation of the model; every product replays the recorded derivative of the gradient.
    hessian = imstep.Hessian(lambda: nn.functional.cross_entropy(model(inputs), labels), model)
    start = np.ones(hessian.size)
    largest = np.sort(eigsh(hessian.to_scipy(), k=4, which="LA", v0=start, return_eigenvectors=False))
    smallest = np.sort(eigsh(hessian.to_scipy(), k=2, which="SA", v0=start, return_eigenvectors=False))
    print(f"{hessian.size} parameters, loss {float(hessian.loss):.4f}, {hessian.products} products")
    print("largest: ", largest)
    print("smallest:", smallest, "(negative: the loss is not convex here)")

    # The model is small enough to check against all eigenvalues.
    every = torch.linalg.eigvalsh(hessian.to_dense()).numpy()
    found = np.concatenate([smallest, largest])
    expected = np.concatenate([every[:2], every[-4:]])
    print(f"largest disagreement with the dense matrix: {np.abs(found - expected).max():.1e}")

    # Gauss-Newton of the same loss has no negative eigenvalues (but for rounding).
    gauss_newton = imstep.GaussNewton(lambda: (model(inputs), labels), model, loss=nn.CrossEntropyLoss())
    print(f"smallest of Gauss-Newton: {float(torch.linalg.eigvalsh(gauss_newton.to_dense())[0]):.1e}")
    return every, found


def draw(figure, result):
    """All eigenvalues, and those that were found by products."""
    every, found = result
    axes = figure.subplots()
    axes.plot(np.arange(len(every)), every, ".", markersize=3, label="all, by the dense matrix")
    where = np.searchsorted(every, found - 1e-9)
    axes.plot(where, found, "o", fillstyle="none", markersize=9, label="found by products")
    axes.set(xlabel="number", ylabel="eigenvalue")
    axes.legend()


if __name__ == "__main__":
    main()
