"""Scimba: u'' = -sin x on [0, pi] with u = 0 at both ends.

    python examples/frameworks/with_scimba.py
"""

import math

import torch
from scimba_torch.approximation_space.nn_space import NNxSpace
from scimba_torch.domain.meshless_domain.domain_1d import Segment1D
from scimba_torch.integration.monte_carlo import DomainSampler, TensorizedSampler
from scimba_torch.integration.monte_carlo_parameters import UniformParametricSampler
from scimba_torch.neural_nets.coordinates_based_nets.mlp import GenericMLP
from scimba_torch.numerical_solvers.elliptic_pde.pinns import PinnsElliptic
from scimba_torch.optimizers.optimizers_data import OptimizerData
from scimba_torch.physical_models.elliptic_pde.laplacians import Laplacian1DDirichletStrongFormNoParam

from imstep.integrations.scimba import ScimbaLeastSquares

torch.manual_seed(0)
domain = Segment1D((0.0, math.pi), is_main_domain=True)
sampler = TensorizedSampler([DomainSampler(domain), UniformParametricSampler([])])
space = NNxSpace(1, 0, GenericMLP, domain, sampler, layer_sizes=[20, 20])
equation = Laplacian1DDirichletStrongFormNoParam(space, f=lambda x, mu: torch.sin(x.get_components()))

solver = PinnsElliptic(equation, bc_type="weak", optimizers=OptimizerData({"class": ScimbaLeastSquares}))
solver.solve(epochs=30, n_collocation=100, n_bc_collocation=10, verbose=False)
print(f"final loss {solver.best_loss:.1e}")
