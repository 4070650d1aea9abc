"""Products and steps on a device: against derivatives by other means, each other's symmetry, and the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import imstep
from benchmarks.gpu.networks import NETWORKS, Network
from benchmarks.record_page import Row

STEP = 1e-30  # of the finite arithmetic: h² is lost to rounding
_SPREAD = (2e-6, 1e-6)  # of the differences, which Richardson's rule extrapolates; small, for the sake of kinks


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Kernels that PyTorch can differentiate twice."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def flat(tensors: Iterable[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """One vector of all; None is zero."""
    pairs = zip(tensors, like, strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).detach().reshape(-1) for t, p in pairs])


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    found, expected = found.cpu(), expected.cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny))


class DrawnOnCpu(TorchDispatchMode):
    """A context in which random numbers are the CPU's on any device, so that runs on two devices draw the same."""

    def __init__(self) -> None:
        super().__init__()
        self._twins: dict[int, tuple[torch.Generator, torch.Generator]] = {}  # with the generator that has the number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        device = next((t.device for t in args if isinstance(t, Tensor)), torch.device(kwargs.get("device") or "cpu"))
        if not drawn or device.type == "cpu":
            return func(*args, **kwargs)
        on_cpu = tree_map_only(Tensor, lambda t: t.cpu(), args)
        named = {k: v for k, v in kwargs.items() if k != "device"}
        if named.get("generator") is not None:
            named["generator"] = self._twin(named["generator"])
        made = func(*on_cpu, **named)
        if func._schema.is_mutable:
            args[0].copy_(made)
            return args[0]
        return tree_map_only(Tensor, lambda t: t.to(device), made)

    def _twin(self, generator: torch.Generator) -> torch.Generator:
        if id(generator) not in self._twins:
            twin = torch.Generator().manual_seed(generator.initial_seed())
            self._twins[id(generator)] = generator, twin
        return self._twins[id(generator)][1]


# --- products -------------------------------------------------------------------------------------------------------


def built(name: str) -> Network:
    """A network, on the CPU; the same one each time."""
    torch.manual_seed(0)
    return NETWORKS[name]()


def infinitesimal(network: Network, v: Tensor) -> Tensor:
    """H v by the operator that steps use: recorded, and replayed."""
    return imstep.Hessian(network.closure, network.parameters) @ v


def finite(network: Network, v: Tensor) -> Tensor:
    """H v in finite arithmetic."""
    params = dict(network.module.named_parameters())
    own = dict(zip(params, parted(v, network.parameters), strict=True))

    class Called(nn.Module):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            return functional_call(network.module, self.given, inputs, named)

    def loss(given: dict[str, Tensor]) -> Tensor:
        called = Called()
        called.given = given  # type: ignore[assignment]
        return Network(called, network.inputs, network.loss, network.drawn).closure()

    made = imstep.hvp(loss, {k: p.detach() for k, p in params.items()}, own, STEP)
    return flat(made.values(), network.parameters)


def parted(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """A vector in the shapes of parameters."""
    return [part.view_as(p) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]


def double_backward(network: Network, v: Tensor) -> Tensor:
    """H v as PyTorch's autograd has it."""
    params = network.parameters
    with twice_differentiable():
        gradients = torch.autograd.grad(network.closure(), params, create_graph=True, allow_unused=True)
        used = [(g, d) for g, d in zip(gradients, parted(v, params), strict=True) if g is not None and g.requires_grad]
        slope = sum((g * d).sum() for g, d in used)
        assert isinstance(slope, Tensor)
        return flat(torch.autograd.grad(slope, params, allow_unused=True), params)


def gradient(network: Network) -> Tensor:
    """As PyTorch's kernels have it."""
    params = network.parameters
    return flat(torch.autograd.grad(network.closure(), params, allow_unused=True), params)


def differences(network: Network, v: Tensor) -> Tensor:
    """H v by differences of gradients, an error of fourth order."""
    params = network.parameters
    origin, quotients = [p.detach().clone() for p in params], []
    for t in _SPREAD:
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, o, d in zip(params, origin, parted(v, params), strict=True):
                    p.copy_(o + sign * t * d)
            sides.append(gradient(network))
        quotients.append((sides[0] - sides[1]) / (2 * t))
    with torch.no_grad():
        for p, o in zip(params, origin, strict=True):
            p.copy_(o)
    return (4 * quotients[1] - quotients[0]) / 3


def product_row(name: str, device: torch.device) -> Row:
    """Errors of the products of one network."""
    on_cpu = built(name)
    network, size = on_cpu.to(device), sum(p.numel() for p in on_cpu.parameters)
    u, v = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    product = infinitesimal(network, v)
    block = imstep.Hessian(network.closure, network.parameters) @ torch.stack([u, v], 1)
    row: Row = {
        "differences": relative(product, differences(network, v)),
        "finite arithmetic": relative(finite(network, v), product),
        "block": relative(block[:, 1], product),
        "asymmetry": float((u @ product - v @ block[:, 0]).abs() / (u.norm() * product.norm())),
    }
    if not network.drawn:
        row["CPU"] = relative(product, infinitesimal(on_cpu, v.cpu()))
        row["PyTorch's gradient"] = relative(gradient(network), gradient(on_cpu))
    if device.type == "cuda":
        hessian = imstep.Hessian(network.closure, network.parameters)
        try:
            row["captured"] = relative(hessian.static() @ v, product)
        except RuntimeError as error:
            row["captured"] = f"refused: {str(error).splitlines()[0][:200]}"
            row["after a refusal"] = relative(hessian @ v, product)
    try:
        row["double backward"] = relative(product, double_backward(network, v))
    except (RuntimeError, NotImplementedError) as error:
        row["double backward"] = f"has none: {str(error).splitlines()[0][:80]}"
    return row


# --- steps ----------------------------------------------------------------------------------------------------------

_OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    "NewtonKrylov": imstep.NewtonKrylov,
    "NewtonKrylov.for_batches": imstep.NewtonKrylov.for_batches,
    "LeastSquares": imstep.LeastSquares,
}
_TRAINED = {  # the GPT's full step multiplies rounding by 1e10, on one device alone, too
    "NewtonKrylov": ("Tanh", "batch norm", "LSTM, two layers, both ways"),
    "NewtonKrylov.for_batches": ("Tanh", "residual", "GPT"),
    "LeastSquares": ("Tanh", "physics-informed"),
}


def step_row(optimizer: str, name: str, device: torch.device, steps: int = 3) -> Row:
    """How far steps on the device lead from where those on the CPU do, by the same draws; the losses of both."""
    ends, losses = [], []
    for network in (built(name).to(device), built(name)):
        torch.manual_seed(0)
        method = _OPTIMIZERS[optimizer](network.parameters)
        with DrawnOnCpu():
            for _ in range(steps):
                method.step(network.closure)
        ends.append(flat(network.parameters, network.parameters))
        losses.append(float(network.closure().detach()))
    return {"parameters": relative(*ends), "loss": losses[0], "CPU's loss": losses[1]}


def rows(device: torch.device, short: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The checks by name: products of all networks, or of a few; and steps."""
    names = ("Tanh", "batch norm", "LSTMCell") if short else tuple(NETWORKS)
    for name in names:
        yield name, partial(product_row, name, device)
    for optimizer, trained in _TRAINED.items():
        for name in trained[: 1 if short else None]:
            yield f"{optimizer}, {name}", partial(step_row, optimizer, name, device)
