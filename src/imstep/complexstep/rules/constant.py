"""Operators whose result does not depend on the imaginary part: fresh values, comparisons, integer-valued steps."""

from __future__ import annotations

import torch

from imstep.complexstep.registry import constant

aten = torch.ops.aten

# Fresh tensors that take only the shape of their argument.
constant(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones)
constant(aten.new_full, aten.new_empty, aten.new_empty_strided, aten.zero, aten.fill.Scalar)
constant(aten._new_zeros_with_same_feature_meta)

# Random numbers: drawn once per point, never perturbed.
constant(aten.rand_like, aten.randn_like, aten.randint_like, aten.bernoulli, aten.multinomial, aten.poisson)
constant(
    aten.uniform, aten.random, aten.exponential, aten.cauchy, aten.geometric, aten.log_normal, aten.normal_functional
)

# Comparisons, predicates and indices.
constant(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.equal, aten.isnan, aten.isinf, aten.isfinite)
constant(aten.isposinf, aten.isneginf, aten.signbit, aten.logical_not, aten.logical_and, aten.logical_or)
constant(aten.logical_xor, aten.any, aten.all, aten.argmax, aten.argmin, aten.argsort, aten.nonzero)
constant(
    aten.searchsorted,
    aten.bucketize,
    aten.isin,
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.count_nonzero,
    aten._has_same_storage_numel,
    aten.allclose,
)

# Steps: the derivative is zero almost everywhere.
constant(aten.sign, aten.floor, aten.ceil, aten.round, aten.trunc, aten.heaviside, aten.floor_divide)
