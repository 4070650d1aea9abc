"""Analytic functions, entry by entry: f(x + i h x') = f(x) + i h f'(x) x' + O(h²)."""

from __future__ import annotations

import math

import torch

from imstep.complexstep.registry import elementwise

aten = torch.ops.aten

elementwise(aten.exp.default, lambda x, y: y)
elementwise(aten.log.default, lambda x, y: 1 / x)
elementwise(aten.sqrt.default, lambda x, y: 0.5 / y)
elementwise(aten.rsqrt.default, lambda x, y: -0.5 * y / x)
elementwise(aten.reciprocal.default, lambda x, y: -y * y)
elementwise(aten.sin.default, lambda x, y: torch.cos(x))
elementwise(aten.cos.default, lambda x, y: -torch.sin(x))
elementwise(aten.tanh.default, lambda x, y: 1 - y * y)
elementwise(aten.sigmoid.default, lambda x, y: y * (1 - y))
