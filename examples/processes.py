"""Train in several processes, each of which has a part of the data, or in one: the steps are the same.

    torchrun --nproc-per-node 2 examples/processes.py
    python examples/processes.py
"""

import torch
import torch.distributed as dist
from torch import nn

import imstep


def main(steps: int = 25) -> None:
    several = dist.is_torchelastic_launched()  # by torchrun
    if several:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    torch.manual_seed(0)  # the same model everywhere
    inputs = torch.rand(256, 2, dtype=torch.float64) * 4 - 2
    targets = torch.sin(inputs[:, :1] * inputs[:, 1:])
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    own = inputs[rank::size], targets[rank::size]

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    optimizer = imstep.NewtonKrylov(model.parameters(), process_group=dist.group.WORLD if several else None)
    for _ in range(steps):
        optimizer.step(imstep.MicroBatches(loss, [own]))
    if rank == 0:
        print(f"loss after {steps} steps of {size} process{'es' * (size > 1)}: {optimizer.last_step.new_loss:.2e}")
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
