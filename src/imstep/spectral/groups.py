"""One question asked of every layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, overload

from imstep.linalg import as_operator

Result = TypeVar("Result")


class PerGroup(Protocol[Result]):
    """A function of a matrix, or of each of its blocks."""

    @overload
    def __call__(self, operator: Any, *args: Any, by: None = None, **options: Any) -> Result: ...

    @overload
    def __call__(self, operator: Any, *args: Any, by: str, **options: Any) -> dict[str, Result]: ...


def per_group(
    function: Callable[..., Result], at_once: Callable[..., dict[str, Result] | None] = lambda **_: None
) -> PerGroup[Result]:
    """The function, of all that is a matrix; for ``by="layer"`` or ``by="parameter"`` it returns results by name.

    Args:
        at_once: called with the same arguments by name, answers for all groups together; of the whole there is one,
            without a name. None where it does not.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def asked(operator: Any, *args: Any, by: str | None = None, **options: Any) -> Any:
        operator = as_operator(operator)
        given = signature.bind(operator, *args, by=by, **options)
        given.apply_defaults()
        together = at_once(**given.arguments)
        if together is not None:
            return together[""] if by is None else together
        if by is None:
            return function(operator, *args, **options)
        blocks = operator.diagonal_blocks(by)
        return {name: function(block, *args, by=by, **options) for name, block in blocks.items()}

    return asked
