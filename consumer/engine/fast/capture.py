"""CUDA graphs: a function is recorded once and launched as a whole from then on."""

from collections.abc import Callable
from typing import Any

import torch

from consumer.engine.common import describe
from consumer.errors import ModelBroken

Pool = Any  # of memory: what torch.cuda.graph_pool_handle() gives


class Captured:
    """The recording of a function without arguments and results, over tensors at fixed addresses.

    Every call is given the same function. The first one runs it as it is, which also makes kernels and plans ready, and
    then records it; later ones replay the recording. The function is not kept: an object with a recording of its own
    method would be part of a cycle, and its memory free too late. `pool`: what recordings share their memory by, as no
    two of them ever run at the same time; None on a CPU, where the function is simply called. Raises ModelBroken where
    the device breaks the recording off.
    """

    def __init__(self, pool: Pool | None) -> None:
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, function: Callable[[], None]) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        function()
        if self._pool is None:
            return
        graph = torch.cuda.CUDAGraph()
        # thread_local: the next job's LoRA may be on its way to the GPU meanwhile
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
        except torch.AcceleratorError as error:
            # torch stays on the recording's stream then, and its allocator in the middle of it, for good
            raise ModelBroken(f"A recording broke: {describe(error)}") from None
        self._graph = graph
