"""The processes that train together: one per GPU, started by `torchrun`; alone, a team of one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Team:
    """The processes that train together; alone, a team of one."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        if self.size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")

    @property
    def leads(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    @property
    def workers(self) -> int:
        """Processor cores for each process."""
        return max(1, (os.cpu_count() or 1) // self.size)

    def average(self, gradients: list[Tensor]) -> None:
        """Average gradients over the team, in place, in one message."""
        if self.size > 1:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            parts = flat.div_(self.size).split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def together(self, tensors: list[Tensor]) -> None:
        """Give everyone the first process's tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def stopwatch(self) -> Callable[[], float]:
        """Seconds since now on the first process's clock, the same for all: who stops by time must stop together."""
        start = time.monotonic()

        def spent() -> float:
            seconds = torch.tensor(time.monotonic() - start, device=self.device)
            self.together([seconds])
            return seconds.item()

        return spent

    def leave(self) -> None:
        """Wait for everyone, then part."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()
