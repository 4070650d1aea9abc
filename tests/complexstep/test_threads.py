"""Functions that compute in other threads, which no arithmetic sees, are refused; threads that look on are not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import imstep
from imstep.complexstep import ComplexStepError

X, V = torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64), torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)

DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "derivative": lambda f: imstep.derivative(f, X),
    "jvp": lambda f: imstep.jvp(f, (X,), (V,))[1],
    "hvp": lambda f: imstep.hvp(lambda t: f(t).square().sum(), X, V),
    "third": lambda f: imstep.third_derivative(lambda t: f(t).square().sum(), X, V),
    "nested": lambda f: imstep.jvp(lambda t: imstep.jvp(f, (t,), (V,))[1], (X,), (V,))[1],
}


def in_new_threads(t: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(torch.sin, t.split(1))))


def in_a_thread(t: Tensor) -> Tensor:
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(t[:1].sin()))
    thread.start()
    thread.join()
    return torch.cat([made[0], t[1:].sin()])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(abs, range(4)))
        yield pool


@pytest.mark.parametrize("name", DERIVATIVES)
def test_what_other_threads_compute_is_refused(name: str, pool: ThreadPoolExecutor) -> None:
    in_old_threads = lambda t: torch.cat(list(pool.map(torch.sin, t.split(1))))
    for f in (in_old_threads, in_new_threads, in_a_thread):
        with pytest.raises(ComplexStepError, match="another thread"):
            DERIVATIVES[name](f)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_threads_begun_within_are_noticed(name: str) -> None:
    for f in (in_new_threads, in_a_thread):
        with pytest.raises(ComplexStepError, match="another thread"):
            DERIVATIVES[name](f)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_threads_that_have_no_part_in_it_do_no_harm(name: str, pool: ThreadPoolExecutor) -> None:
    def counted(t: Tensor) -> Tensor:
        list(pool.map(abs, range(4)))
        in_new_threads(torch.ones(2))
        return t.clone().mul_(t).sin_() + t.detach()

    alone = lambda t: (t * t).sin() + t.detach()
    torch.testing.assert_close(DERIVATIVES[name](counted), DERIVATIVES[name](alone), rtol=1e-13, atol=1e-14)


def test_in_place_on_the_argument_beside_a_thread(pool: ThreadPoolExecutor) -> None:
    torch.testing.assert_close(imstep.jvp(torch.Tensor.sin_, (X.clone(),), (V,))[1], X.cos() * V)
    with torch.no_grad():
        assert not imstep.jvp(lambda t: t + 1, (X,), (V,))[0].requires_grad


def test_hooks_of_threads_stay() -> None:
    before = threading.getprofile()
    imstep.jvp(torch.sin, (X,), (V,))
    assert threading.getprofile() is before
