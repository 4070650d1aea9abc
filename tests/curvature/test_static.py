"""Products captured as a CUDA graph, with a capture that keeps to a graph's rules on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import imstep
from benchmarks.gpu.checks import built
from imstep.complexstep.tape import TapeChangedError


class _Recorder(TorchDispatchMode):
    """Notes operators with the memory that they read and wrote; a value that Python asks for ends a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing.")
        made = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, made))
        return made


def _recorded(run, device):
    """A capture: runs again exactly the operators that were met, each into the memory that it wrote then."""
    run()
    with _Recorder() as recorder:
        made = run()

    def again():
        for func, args, kwargs, before in recorder.steps:
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return again, made


@pytest.mark.parametrize("name", ["Tanh", "batch norm", "LSTMCell", "GPT", "physics-informed", "mixture of experts"])
def test_products_of_a_capture_are_those_of_the_operator(name):
    network = built(name)
    H = imstep.Hessian(network.closure, network.parameters)
    static = H.static(_recorded)
    vectors = torch.randn(3, H.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first, *rest = (static @ v for v in vectors)
    for v, found in zip(vectors, (first, *rest), strict=True):  # the first one is not overwritten by the others
        torch.testing.assert_close(found, H @ v, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(static @ vectors.mT, H @ vectors.mT, rtol=1e-13, atol=1e-15)
    assert static.parameters is H.parameters
    assert static.products == 6


def test_a_jacobian_is_captured_with_its_transpose():
    network = built("Tanh")
    J = imstep.Jacobian(lambda: network.module(*network.inputs), network.parameters)
    static, (m, n) = J.static(_recorded), J.shape
    v, u = torch.ones(n, dtype=torch.float64), torch.ones(m, dtype=torch.float64)
    torch.testing.assert_close(static @ v, J @ v)
    torch.testing.assert_close(static.T @ u, J.T @ u)


def test_a_capture_belongs_to_its_point():
    network = built("Tanh")
    H = imstep.Hessian(network.closure, network.parameters).static(_recorded)
    with torch.no_grad():
        network.parameters[0].add_(1)
    with pytest.raises(TapeChangedError, match=r"Build it anew|Evaluate at the new point"):
        H @ torch.ones(H.size, dtype=torch.float64)


def test_refusals():
    network = built("Tanh")
    H = imstep.Hessian(network.closure, network.parameters)
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, and the operator's vectors are on cpu"):
        H.static()
    with pytest.raises(ValueError, match="are not replays of one record"):
        imstep.Hessian(network.closure, network.parameters, memory_budget=0).static(_recorded)
    with pytest.raises(RuntimeError, match=r"captured: aten.linalg_matrix_exp.default waits for .*not permitted\."):
        H.static(_refusing)


def _refusing(run, device):
    run()
    torch.linalg.matrix_exp(torch.eye(2))
    raise RuntimeError("not permitted.")
