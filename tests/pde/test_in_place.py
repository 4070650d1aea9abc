"""Functions in place, of tensors and of views of them, against nested reverse mode in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imstep import pde
from tests.pde.nested import agrees, points

torch.manual_seed(0)
HIDDEN = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
OUT = nn.Linear(4, 2).double()
Body = Callable[[Tensor], object]


def changed(body: Body) -> Callable[[Tensor], Tensor]:
    """A network with a function between its layers that changes its argument."""

    def field(x: Tensor) -> Tensor:
        z = HIDDEN(x) * 1.0
        body(z)
        return OUT(z.square())

    return field


def replaced(body: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same network with a function that returns what takes the place of its argument."""
    return lambda x: OUT(body(HIDDEN(x) * 1.0).square())


def beside(first: Tensor, last: Tensor) -> Tensor:
    return torch.cat([first, last], 1)


def taken_before(z: Tensor) -> Tensor:
    v = z[:, :2]
    z.mul_(2)
    return beside(v, z[:, 2:])


def side_by_side(z: Tensor) -> Tensor:
    a, b = z[:, :3], z[:, 1:]
    a.sin_()
    return beside(a, b[:, :1])


def again(z: Tensor) -> Tensor:
    v = z[:, :2]
    w = v[:, :1]
    z.exp_()
    v.mul_(2)
    w.add_(1)
    return beside(beside(w, v), z[:, 3:]) * z


def again_written_out(z: Tensor) -> Tensor:
    z = z.exp()
    z = torch.stack([2 * z[:, 0] + 1, 2 * z[:, 1], z[:, 2], z[:, 3]], 1)
    return z[:, [0, 0, 1, 3]] * z


def by_rows(z: Tensor) -> Tensor:
    h = (z.T * 2).T
    h.reshape(-1).mul_(3)  # a view
    h[:, :1].add_(1)
    h.T.reshape(-1).mul_(5)  # a copy
    return h


def exchanged(z: Tensor) -> Tensor:
    first = z[:, 0].clone()
    z[:, 0] = z[:, 1]
    z[:, 1] = first
    return z


def squares(z: Tensor) -> Tensor:
    z[:, [0, 2]] = z[:, 1:2] ** 2
    return z


def by_others(z: Tensor) -> Tensor:
    z[:, :2] *= z[:, 1:3]
    return z


def parts(z: Tensor) -> Tensor:
    a, b = z.split(2, 1)
    a.mul_(b)
    b.add_(1)
    return z


def dropped(z: Tensor) -> Tensor:
    F.dropout(z, 1.0, True, True)
    return z


IN_PLACE: dict[str, Body] = {
    "columns": lambda z: z[:, :2].mul_(2.0),
    "columns, by a formula": lambda z: z[:, :2].sin_(),
    "flat": lambda z: z.view(-1).tanh_(),
    "transposed": lambda z: z.T.add_(1),
    "a view of a view of a view": lambda z: z.view(-1, 2, 2)[:, 0].unsqueeze(1).transpose(1, 2).exp_(),
    "diagonal": lambda z: z.view(-1, 2, 2).diagonal(dim1=1, dim2=2).mul_(5),
    "the tensor itself": lambda z: z.contiguous().to(torch.float64).double().mul_(2),
    "views without a rule": lambda z: torch.hsplit(z, 2)[0].mul_(2),
    "unfolded": lambda z: z.unfold(1, 2, 2)[..., 0].exp_(),
    "a copy": lambda z: z.T.reshape(-1).mul_(2),
    "a clone": lambda z: z[:, :2].clone().mul_(2),
    "a mask": lambda z: z[:, :2].masked_fill_(z[:, :2] > 0, 1.0),
    "constants": lambda z: (z[:, 0].fill_(2.0), z[:, 1].zero_()),
    "copied": lambda z: z[:, 0].copy_(z[:, 1]),
    "assigned where it is positive": lambda z: z.__setitem__(z > 0, 0.5),
    "a layer": lambda z: F.elu(z, inplace=True),
    "a layer on columns": lambda z: F.leaky_relu(z[:, :2], inplace=True),
    "a layer after a view": lambda z: nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))(z.view(-1, 2, 2)),
    "selu": torch.selu_,
}
RETURNED = {"taken before": taken_before, "side by side": side_by_side, "by rows": by_rows}
WRITTEN_OUT = {  # what reverse mode refuses as it is
    "again and again": (again, again_written_out),
    "exchanged": (exchanged, lambda z: z[:, [1, 0, 2, 3]]),
    "places by an index": (squares, lambda z: torch.stack([z[:, 1] ** 2, z[:, 1], z[:, 1] ** 2, z[:, 3]], 1)),
    "columns by others": (by_others, lambda z: beside(z[:, :2] * z[:, 1:3], z[:, 2:])),
    "parts": (parts, lambda z: beside(z[:, :2] * z[:, 2:], z[:, 2:] + 1)),
    "all dropped": (dropped, lambda z: 0 * z),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_change_in_place_is_seen_by_all_views(name: str) -> None:
    agrees(changed(IN_PLACE[name]))


@pytest.mark.parametrize("name", RETURNED)
def test_views_see_later_changes(name: str) -> None:
    agrees(replaced(RETURNED[name]))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_changes_in_place_are_those_of_functions_that_are_not(name: str) -> None:
    body, plain = WRITTEN_OUT[name]
    agrees(replaced(body), replaced(plain))


def test_points_can_be_scaled_in_place() -> None:
    def field(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :1].mul_(2.0)
        return HIDDEN(x)

    agrees(field)


def kept(z: Tensor) -> Tensor:
    constant = z.detach()
    z.mul_(2)
    return z * constant


REFUSED = {
    "a detached tensor in the same memory": (kept, r"detach\(\)\.clone"),
    "entries that are shown twice": (lambda z: z[:, :1].expand(-1, 4).mul_(2), "twice"),
    "a real tensor by a complex view": (lambda z: torch.view_as_complex(z.view(-1, 2, 2)).mul_(2), "another kind"),
    "a form": (lambda z: z.unsqueeze_(0), "not in place"),
    "no derivatives left": (lambda z: z.ge_(0), "Use ge"),
    "over a plain tensor": (lambda z: torch.zeros_like(z).add_(z), "torch.cat"),
    "complex numbers in a real tensor": (lambda z: z[:, 0].copy_(z[:, 1] * 1j), "complex128"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_changed_in_place_says_so(name: str) -> None:
    body, words = REFUSED[name]
    with pytest.raises(pde.ExpansionError, match=words):
        pde.laplacian(changed(body), points())
