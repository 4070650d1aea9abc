"""Points that lie evenly, and elsewhere in every step."""

from typing import Any

import pytest
import torch

from imstep.pde import boundary_points, sobol_points

SIDES = [(-1.0, 3.0), (0.0, 0.5), (2.0, 7.0)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_coordinate_has_a_point_in_each_of_as_many_intervals() -> None:
    points = sobol_points(SIDES, 128, generator=generator(), dtype=torch.float64)
    low, high = torch.tensor(SIDES, dtype=torch.float64).unbind(1)
    assert points.shape == (128, 3)
    cells = ((points - low) / (high - low) * 128).floor().long()
    for coordinate in cells.unbind(1):
        assert torch.equal(coordinate.sort().values, torch.arange(128))


def test_every_point_is_uniformly_distributed() -> None:
    first = torch.cat([sobol_points(SIDES, 1, generator=generator(seed)) for seed in range(600)])
    low, high = torch.tensor(SIDES).unbind(1)
    unit = (first - low) / (high - low)
    for power in (1, 2, 3):
        assert torch.allclose((unit**power).mean(0), torch.tensor(1 / (power + 1)), atol=0.05)


def test_a_mean_over_them_is_nearer_to_that_over_the_box() -> None:
    smooth = lambda x: (x[:, 0].sin() * (3 * x[:, 1]).exp() * x[:, 2].sqrt()).mean()
    low, high = torch.tensor(SIDES, dtype=torch.float64).unbind(1)
    wanted = smooth(sobol_points(SIDES, 2**17, generator=generator(), dtype=torch.float64))
    even, free = [], []
    for seed in range(20):
        even.append(smooth(sobol_points(SIDES, 256, generator=generator(seed), dtype=torch.float64)) - wanted)
        independent = torch.rand(256, 3, generator=generator(seed), dtype=torch.float64)
        free.append(smooth(low + (high - low) * independent) - wanted)
    assert 10 * torch.stack(even).norm() < torch.stack(free).norm()


def test_draws_differ_and_follow_from_their_generator() -> None:
    draws = generator(3)
    first, second = (sobol_points(SIDES, 50, generator=draws) for _ in range(2))
    assert not bool((first == second).any())
    assert torch.equal(first, sobol_points(SIDES, 50, generator=generator(3)))
    torch.manual_seed(5)
    first = sobol_points(SIDES, 50)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(first, sobol_points(SIDES, 50))
    assert torch.equal(following, torch.rand(1))


def test_faces_and_no_points() -> None:
    points = sobol_points([(0.0, 1.0), (0.3, 0.3)], 40, generator=generator(), dtype=torch.float64)
    assert bool((points[:, 1] == 0.3).all())
    assert len(points[:, 0].unique()) == 40
    assert torch.equal(sobol_points([(0.3, 0.3)], 2), torch.tensor([[0.3], [0.3]]))
    assert sobol_points(SIDES, 0).shape == (0, 3)


def test_every_other_point_is_not_on_one_side() -> None:
    """In the sequence's own order it would be: coordinates alternate between the halves."""
    half = sobol_points(SIDES, 256, generator=generator())[::2, 0] > 1.0
    assert 30 < int(half.sum()) < 98


def test_faces_of_a_box_have_about_as_many_points_each_in_order() -> None:
    points = boundary_points(SIDES, 64 * 6 + 2, generator=generator(), dtype=torch.float64)
    faces = points.split([65, 65, 64, 64, 64, 64])
    for face, (axis, end) in zip(faces, [(i, end) for i, side in enumerate(SIDES) for end in side], strict=True):
        assert bool((face[:, axis] == end).all())
        for other in {0, 1, 2} - {axis}:
            low, high = SIDES[other]
            cells = ((face[:, other] - low) / (high - low) * 64).floor().unique()
            assert len(cells) >= 60
    walls = boundary_points(SIDES, 10, axes=[1], generator=generator(), dtype=torch.float64)
    assert walls[:, 1].tolist() == [0.0] * 5 + [0.5] * 5
    assert boundary_points(SIDES, 0).shape == (0, 3)


def test_sides_may_be_an_array() -> None:
    arrays: list[Any] = [torch.tensor(SIDES), torch.tensor(SIDES).numpy()]
    for draw in (sobol_points, boundary_points):
        expected = draw(SIDES, 20, generator=generator())
        for sides in arrays:
            assert torch.equal(draw(sides, 20, generator=generator()), expected)


@pytest.mark.parametrize(
    ("axes", "count", "message"), [([3], 4, "0 to 2"), ([], 4, "at least one"), (None, -1, "at least 0")]
)
def test_what_are_no_faces_is_refused(axes: list[int] | None, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boundary_points(SIDES, count, axes=axes)


def test_points_are_of_the_dtype_and_device_that_is_asked_for() -> None:
    exact = sobol_points(SIDES, 20, generator=generator(), dtype=torch.float64)
    assert torch.equal(sobol_points(SIDES, 20, generator=generator(), dtype=torch.float32), exact.float())
    with torch.device("meta"):  # what is made without a device has no values
        assert torch.equal(sobol_points(SIDES, 20, generator=generator(), dtype=torch.float64, device="cpu"), exact)
        assert sobol_points(SIDES, 20).device.type == "meta"


@pytest.mark.parametrize(
    ("sides", "count", "message"),
    [
        ([(1.0, 0.0)], 3, "least and the largest"),
        ([0.0, 1.0], 3, "least and the largest"),
        ([(0.0, float("inf"))], 3, "finite"),
        ([(0.0, 1.0)], -1, "at least 0"),
    ],
)
def test_what_is_no_box_is_refused(sides: list, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sobol_points(sides, count)
