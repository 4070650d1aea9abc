"""One question asked of every layer."""

from __future__ import annotations

import functools
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


def per_group(function: Callable[..., Result]) -> PerGroup[Result]:
    """The function, of all that is a matrix; for ``by="layer"`` or ``by="parameter"`` it returns results by name."""

    @functools.wraps(function)
    def asked(operator: Any, *args: Any, by: str | None = None, **options: Any) -> Any:
        operator = as_operator(operator)
        if by is None:
            return function(operator, *args, **options)
        blocks = operator.diagonal_blocks(by)
        return {name: function(block, *args, by=by, **options) for name, block in blocks.items()}

    return asked
