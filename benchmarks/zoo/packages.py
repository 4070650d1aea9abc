"""Networks of graph, Gaussian-process, flow, neural-ODE and neural-operator packages; those that are installed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.problem import Problem, draw, scalar

NODES = 6
EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0], [1, 0, 2, 1, 3, 2, 4, 3, 5, 4, 0, 5]])


def _on(module: nn.Module, f: Callable[[Tensor], Any], *shape: int) -> Problem:
    """A scalar of `f` at normal numbers of this shape."""
    x = draw(*shape)
    return Problem(module, lambda: scalar(f(x.to(torch.get_default_dtype()))))


# --- graphs ---------------------------------------------------------------------------------------------------------

_CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "GCNConv": {}, "ChebConv": {"K": 3}, "SAGEConv": {}, "GraphConv": {}, "GatedGraphConv": {"num_layers": 2},
    "ResGatedGraphConv": {}, "GATConv": {"heads": 2}, "GATv2Conv": {"heads": 2}, "TransformerConv": {"heads": 2},
    "TAGConv": {}, "ARMAConv": {}, "SGConv": {}, "APPNP": {"K": 3, "alpha": 0.1}, "AGNNConv": {}, "LEConv": {},
    "SuperGATConv": {}, "FeaStConv": {"heads": 2}, "GENConv": {}, "ClusterGCNConv": {}, "FiLMConv": {},
    "EGConv": {}, "MFConv": {}, "DNAConv": {}, "GeneralConv": {}, "SSGConv": {"alpha": 0.1}, "AntiSymmetricConv": {},
    "FAConv": {}, "LGConv": {}, "SimpleConv": {}, "PNAConv": {}, "GraphUNet": {}, "MixHopConv": {},
}  # fmt: skip
_MODELS = ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")


def _graph(name: str) -> Problem:
    import torch_geometric.nn as geometric

    kind, options = getattr(geometric, name), dict(_CONVOLUTIONS.get(name, {}))
    first, last = nn.Linear(4, 8), nn.Linear(8, 3)
    if name in _MODELS:
        if name == "PNA":
            options = {"aggregators": ["mean", "max", "std"], "scalers": ["identity", "amplification"], "deg": _DEGREES}
        middle = kind(8, 8, num_layers=2, **options)
    elif name in ("APPNP", "LGConv", "SimpleConv", "AGNNConv"):
        middle = kind(**options)
    elif name == "GraphUNet":
        middle = kind(8, 8, 8, depth=2)
    elif name == "PNAConv":
        middle = kind(8, 8, ["mean", "max", "std"], ["identity", "amplification"], _DEGREES)
    elif name in ("GatedGraphConv", "DNAConv", "AntiSymmetricConv", "FAConv"):
        middle = kind(8, **options)
    else:
        middle = kind(8, 8, **options)
    module = nn.ModuleList([first, middle, last])

    def f(x: Tensor) -> Tensor:
        hidden = torch.tanh(first(x))
        given = (hidden, hidden) if name == "FAConv" else (hidden.unsqueeze(1),) if name == "DNAConv" else (hidden,)
        out = middle(*given, EDGES)
        out = out[0] if isinstance(out, tuple) else out
        return last(out[..., :8].reshape(NODES, -1)[:, :8])

    return _on(module, f, NODES, 4)


_DEGREES = torch.tensor([0, 0, 6])


class _Ring(nn.Module):
    """Edges and their lengths, in place of a search for neighbours that needs a package of its own."""

    def forward(self, positions: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return EDGES, (positions[EDGES[0]] - positions[EDGES[1]]).norm(dim=-1)


def _molecule(name: str) -> Problem:
    import torch_geometric.nn as geometric

    numbers, batch = torch.tensor([6, 1, 1, 1, 8, 1]), torch.zeros(6, dtype=torch.long)
    if name == "SchNet":
        module = geometric.SchNet(hidden_channels=16, num_filters=16, num_interactions=2, num_gaussians=10)
        module.interaction_graph = _Ring()
    else:
        module = geometric.PointNetConv(nn.Sequential(nn.Linear(7, 8), nn.Tanh()), nn.Linear(8, 3))
        features = nn.Linear(3, 4)
        both = nn.ModuleList([module, features])
        return _on(both, lambda pos: module(features(pos), pos, EDGES), NODES, 3)
    return _on(module, lambda pos: module(numbers, pos, batch), NODES, 3)


# --- Gaussian processes ---------------------------------------------------------------------------------------------


def _gaussian_process(kernel: str) -> Problem:
    """The exact marginal likelihood of a regression with a kernel."""
    import gpytorch

    kernels = gpytorch.kernels
    base: dict[str, Callable[[], nn.Module]] = {
        "RBF": kernels.RBFKernel, "Matern-1/2": lambda: kernels.MaternKernel(nu=0.5),
        "Matern-3/2": lambda: kernels.MaternKernel(nu=1.5), "Matern-5/2": lambda: kernels.MaternKernel(nu=2.5),
        "RQ": kernels.RQKernel, "periodic": kernels.PeriodicKernel, "linear": kernels.LinearKernel,
        "polynomial": lambda: kernels.PolynomialKernel(power=2), "cosine": kernels.CosineKernel,
        "spectral mixture": lambda: kernels.SpectralMixtureKernel(num_mixtures=2, ard_num_dims=2),
        "piecewise": lambda: kernels.PiecewisePolynomialKernel(q=2),
        "arc": lambda: kernels.ArcKernel(kernels.MaternKernel(nu=2.5), ard_num_dims=2),
        "RFF": lambda: kernels.RFFKernel(num_samples=8, num_dims=2),
        "deep": lambda: kernels.ScaleKernel(kernels.RBFKernel()),
    }  # fmt: skip
    network = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)) if kernel == "deep" else nn.Identity()
    x, y = draw(12, 2), draw(12, seed=3)

    class Regression(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean, self.kernel, self.network = gpytorch.means.ConstantMean(), base[kernel](), network

        def forward(self, points: Tensor) -> Any:
            points = self.network(points)
            return gpytorch.distributions.MultivariateNormal(self.mean(points), self.kernel(points))

    module = Regression().double()
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(module.likelihood, module)
    return Problem(module, lambda: -marginal(module(*module.train_inputs), module.train_targets))


def _by_conjugate_gradients() -> Problem:
    """As `_gaussian_process`, solved by gpytorch's conjugate gradients and stochastic log-determinant."""
    import gpytorch

    problem = _gaussian_process("RBF")

    def loss() -> Tensor:
        with gpytorch.settings.max_cholesky_size(1), gpytorch.settings.cg_tolerance(1e-12):
            return problem.loss()

    return Problem(problem.module, loss)


def _variational() -> Problem:
    """A sparse variational process, one of whose inducing points lies on a datum."""
    import gpytorch

    x, y = draw(12, 2), draw(12, seed=3)

    class Sparse(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            points = x[:4].clone()
            distribution = gpytorch.variational.CholeskyVariationalDistribution(4)
            super().__init__(gpytorch.variational.VariationalStrategy(self, points, distribution))
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.RBFKernel()

        def forward(self, points: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(points), self.kernel(points))

    module = nn.ModuleList([Sparse(), gpytorch.likelihoods.GaussianLikelihood()]).double()
    bound = gpytorch.mlls.VariationalELBO(module[1], module[0], num_data=12)
    return Problem(module, lambda: -bound(module[0](x), y))


# --- neural differential equations ----------------------------------------------------------------------------------


def _differential(method: str, adjoint: bool) -> Problem:
    import torchdiffeq

    field = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.field(y)

    module, times = Field(), torch.linspace(0, 1, 4, dtype=torch.float64)
    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    options = {"step_size": 0.1} if method in ("euler", "midpoint", "rk4") else None
    tolerances = {"rtol": 1e-5, "atol": 1e-7}
    return _on(module, lambda y: solve(module, y, times.to(y), method=method, options=options, **tolerances), 3, 2)


# --- flows ----------------------------------------------------------------------------------------------------------


def _zuko(name: str) -> Problem:
    import zuko

    flow = getattr(zuko.flows, name)(features=3, hidden_features=(8, 8), **({"transforms": 2} if name != "CNF" else {}))
    return Problem(flow, lambda: -flow().log_prob(draw(6, 3).to(next(flow.parameters()).dtype) / 2).mean())


def _nflows(name: str) -> Problem:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import autoregressive, lu, permutations
    from nflows.transforms.base import CompositeTransform

    makers: dict[str, Callable[[], nn.Module]] = {
        "MAF": lambda: autoregressive.MaskedAffineAutoregressiveTransform(3, 8),
        "RQ-NSF": lambda: autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            3, 8, num_bins=4, tails="linear", tail_bound=3.0
        ),
        "LU": lambda: lu.LULinear(3),
    }
    layers = [makers[name](), permutations.ReversePermutation(3), makers[name]()]
    flow = Flow(CompositeTransform(layers), StandardNormal([3]))
    return Problem(flow, lambda: -flow.log_prob(draw(6, 3).to(next(flow.parameters()).dtype) / 2).mean())


def _normflows(name: str) -> Problem:
    import normflows

    flows = normflows.flows
    makers: dict[str, Callable[[], nn.Module]] = {
        "RealNVP": lambda: flows.AffineCouplingBlock(normflows.nets.MLP([2, 8, 4], init_zeros=False)),
        "planar": lambda: flows.Planar((4,)),
        "radial": lambda: flows.Radial((4,)),
        "residual": lambda: flows.Residual(
            normflows.nets.LipschitzMLP([4, 8, 4], init_zeros=False), reduce_memory=False
        ),
        "residual, saving memory": lambda: flows.Residual(
            normflows.nets.LipschitzMLP([4, 8, 4], init_zeros=False), reduce_memory=True
        ),
        "neural spline": lambda: flows.AutoregressiveRationalQuadraticSpline(4, 1, 8),
        "Glow": lambda: flows.InvertibleAffine(4),
    }
    base = normflows.distributions.DiagGaussian(4)
    flow = normflows.NormalizingFlow(base, [makers[name]() for _ in range(2)])
    if name in ("planar", "radial"):  # only the way to the data is known
        return Problem(flow, lambda: scalar(flow.forward_and_log_det(draw(6, 4).to(next(flow.parameters()).dtype))))
    return Problem(flow, lambda: flow.forward_kld(draw(6, 4).to(next(flow.parameters()).dtype) / 2))


# --- operators ------------------------------------------------------------------------------------------------------


def _neural_operator(name: str) -> Problem:
    from neuralop import models

    options: dict[str, dict[str, Any]] = {
        "FNO": {"n_modes": (4, 4), "hidden_channels": 6},
        "TFNO": {"n_modes": (4, 4), "hidden_channels": 6, "rank": 0.5},
        "UNO": {
            "hidden_channels": 6, "uno_out_channels": [6, 6, 6], "uno_n_modes": [[4, 4]] * 3,
            "uno_scalings": [[1.0, 1.0], [0.5, 0.5], [1.0, 1.0]], "channel_mlp_skip": "linear", "n_layers": 3,
        },
    }  # fmt: skip
    module = getattr(models, name)(in_channels=1, out_channels=1, **options[name])
    return _on(module, module, 2, 1, 8, 8)


def _physics() -> Problem:
    """A physics-informed network in deepxde's style: the residual of Burgers' equation, by `torch.autograd.grad`."""
    module = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 1))

    def residual(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = module(x)
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first[:, :1].sum(), x, create_graph=True)[0][:, :1]
        return first[:, 1:] + u * first[:, :1] - 0.01 / math.pi * second

    return _on(module, residual, 10, 2)


_FLOWS = ("MAF", "NSF", "NAF", "UNAF", "SOSPF", "BPF", "GF", "NICE", "NCSF", "CNF")
_PACKAGES: dict[str, dict[str, Callable[[], Problem]]] = {
    "torch_geometric": {name: partial(_graph, name) for name in (*_CONVOLUTIONS, *_MODELS)}
    | {name: partial(_molecule, name) for name in ("SchNet", "PointNetConv")},
    "gpytorch": {
        name: partial(_gaussian_process, name)
        for name in (
            "RBF", "Matern-1/2", "Matern-3/2", "Matern-5/2", "RQ", "periodic", "linear", "polynomial", "cosine",
            "spectral mixture", "piecewise", "arc", "RFF", "deep",
        )
    } | {"conjugate gradients": _by_conjugate_gradients, "variational": _variational},
    "torchdiffeq": {
        f"{method}{', adjoint' * adjoint}": partial(_differential, method, adjoint)
        for method in ("dopri5", "dopri8", "bosh3", "adaptive_heun", "rk4", "midpoint", "implicit_adams")
        for adjoint in (False, True)
    },
    "zuko": {name: partial(_zuko, name) for name in _FLOWS},
    "nflows": {name: partial(_nflows, name) for name in ("MAF", "RQ-NSF", "LU")},
    "normflows": {
        name: partial(_normflows, name)
        for name in ("RealNVP", "planar", "radial", "residual", "residual, saving memory", "neural spline", "Glow")
    },
    "neuralop": {name: partial(_neural_operator, name) for name in ("FNO", "TFNO", "UNO")},
}  # fmt: skip


def cases() -> dict[str, Callable[[], Problem]]:
    """Name -> how to build it, of the packages that can be imported."""
    found: dict[str, Callable[[], Problem]] = {"deepxde style/Burgers": _physics}
    for package, builds in _PACKAGES.items():
        try:
            importlib.import_module(package)
        except ImportError:
            continue
        found |= {f"{package}/{name}": build for name, build in builds.items()}
    return found
