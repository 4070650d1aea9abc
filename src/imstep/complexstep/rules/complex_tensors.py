"""The user's own complex tensors, and Fourier transforms.

A complex tensor z = a + jb inside the model carries a complex imaginary part z' = a' + jb' of its own: the change of
a and of b with the step. Everything here is linear over the real numbers, conjugation and real part included. In
finite arithmetic the step would need a second imaginary unit; linear operators do not mind.
"""

from __future__ import annotations

import torch

from imstep.complexstep.registry import exact, linear, rule
from imstep.complexstep.rules.forms import zeros_of

aten = torch.ops.aten

linear(aten._conj_physical.default, aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default)
linear(aten.view_as_real_copy.default, aten.view_as_complex_copy.default)


@rule(aten.complex.default, family="linear", finite=exact)
def complex_(a, b):
    absent_a, absent_b = zeros_of(a), zeros_of(b)

    def push(da, db):
        return torch.complex(absent_a if da is None else da, absent_b if db is None else db)

    return torch.complex(a, b), push


@rule(aten.polar.default, family="elementwise")
def polar(r, angle):
    """z = r exp(jt):  z' = (r' + j r t') exp(jt)."""
    unit = torch.polar(torch.ones_like(r), angle)

    def push(dr, dt):
        absent = zeros_of(r)
        return torch.complex(absent if dr is None else dr, absent if dt is None else r * dt) * unit

    return torch.polar(r, angle), push


@rule(aten.vdot.default, family="multilinear")
def vdot(x, y):
    def push(dx, dy):
        first = None if dx is None else torch.vdot(dx, y)
        second = None if dy is None else torch.vdot(x, dy)
        return second if first is None else first if second is None else first + second

    return torch.vdot(x, y), push
