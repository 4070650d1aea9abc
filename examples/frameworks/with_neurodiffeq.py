"""neurodiffeq: u'' = -u with u(0) = 0, u'(0) = 1, whose solution is sin t.

    python examples/frameworks/with_neurodiffeq.py
"""

import torch
from neurodiffeq import diff
from neurodiffeq.conditions import IVP
from neurodiffeq.generators import Generator1D
from neurodiffeq.networks import FCNN
from neurodiffeq.solvers import Solver1D

import imstep

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
net = FCNN(1, 1, hidden_units=(20, 20))

solver = Solver1D(
    lambda u, t: [diff(u, t, order=2) + u],
    conditions=[IVP(0.0, 0.0, 1.0)],
    t_min=0.0,
    t_max=6.0,
    nets=[net],
    train_generator=Generator1D(64, 0.0, 6.0, method="equally-spaced"),
    valid_generator=Generator1D(50, 0.0, 6.0, method="equally-spaced"),
    n_batches_valid=1,
    optimizer=imstep.LeastSquares(net.parameters()),
)
solver.fit(max_epochs=40, tqdm_file=None)
print(f"final loss {solver.metrics_history['valid_loss'][-1]:.1e}")
