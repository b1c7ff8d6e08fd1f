"""Work that a GPU repeats many times, recorded once as a CUDA graph and replayed.

A training step of a small model is thousands of small kernels, and Python takes longer to launch each than
the GPU to run it; a replay launches all of them at once. The price is the memory of one step, kept for as
long as the record lives, and that everything the work reads or writes must stay where it is.
"""

from collections.abc import Callable

import torch

WARM_UP_CALLS = 3  # libraries choose their algorithms, and gradients get their memory


class Replayed:
    """``work(x)`` for tensors of one shape and dtype; other tensors, other devices than CUDA and work that
    cannot be recorded (it waits for the GPU) take the plain way. What ``work`` returns is dropped.
    """

    def __init__(self, work: Callable[[torch.Tensor], object], device: torch.device):
        self.work, self.device = work, device
        self.recordable = device.type == "cuda"
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given = torch.empty(0, device=device)

    def __call__(self, x: torch.Tensor) -> None:
        """Do the work on ``x``."""
        if self.recordable and self._graph is None and self._calls >= WARM_UP_CALLS:
            self._record(x)
        if self._graph is None or x.shape != self._given.shape:
            self._calls += 1
            self.work(x.to(self.device))
            return
        self._given.copy_(x)
        self._graph.replay()

    def _record(self, x: torch.Tensor) -> None:
        self._given, graph = x.to(self.device).clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.work(self._given)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.recordable = False
            return
        self._graph = graph
