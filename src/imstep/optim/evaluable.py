"""Trial points at which a closure cannot be evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from imstep.curvature.domain import outside_the_domain

_F = TypeVar("_F", bound=Callable[..., Any])


def failing_as(value: Any) -> Callable[[_F], _F]:
    """Lets a method that evaluates the closure at a trial point return ``value`` where that is outside the domain."""

    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def evaluate(*args: Any) -> Any:
            try:
                return method(*args)
            except Exception as error:
                if not outside_the_domain(error):
                    raise
                return value

        return evaluate  # type: ignore[return-value]

    return decorate
