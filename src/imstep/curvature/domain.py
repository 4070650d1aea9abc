"""Whether an error tells of numbers for which the closure's linear algebra is not defined."""

from __future__ import annotations

from collections.abc import Iterator

_NAMES = {"LinAlgError", "_LinAlgError", "NotPSDError", "NanError"}
"""Of exceptions: NumPy's and SciPy's, PyTorch's, those of gpytorch's linear operators; by name, to import none."""


class OutsideTheDomainError(RuntimeError):
    """Another process has met such an error."""


def outside_the_domain(error: BaseException) -> bool:
    """Whether an error says that linear algebra or a distribution is not defined for the numbers it was given.

    A matrix that is not positive definite, or singular; a negative scale. The errors that such an error was raised from
    count as well, so that a library may put its own in place of it.
    """
    return any(
        isinstance(e, OutsideTheDomainError) or _is_of_linear_algebra(e) or _is_of_a_distribution(e)
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__


def _is_of_linear_algebra(error: BaseException) -> bool:
    if not _NAMES.isdisjoint(kind.__name__ for kind in type(error).__mro__):
        return True
    # TorchScript keeps the message alone of an error, and some kernels that refuse nan raise a plain one.
    return isinstance(error, RuntimeError) and "linalg." in str(error)


def _is_of_a_distribution(error: BaseException) -> bool:
    """A parameter or a value that PyTorch's distributions refuse."""
    return isinstance(error, ValueError) and raised_in(error).startswith("torch.distributions")


def raised_in(error: BaseException) -> str:
    """The name of the module that has raised an error; empty where that is not known."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))
