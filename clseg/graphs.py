"""Steps on a GPU from a recorded CUDA graph: small networks wait for launches, not for arithmetic.

A step of these networks is some hundred small kernels; started one by one from Python they leave a fast card idle most
of the time. Recorded once and replayed, they follow each other without gaps. Batches are drawn as ever and copied in.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # steps before a recording: libraries choose their kernels, optimisers make their state

Batch = Sequence[Tensor]


class Replay:
    """Takes steps: one by one, and on a GPU from a recording once `WARM_UP` steps of the same shapes were taken.

    take: does one whole step (loss, backward, optimiser) on tensors of a GPU, without asking it for a value, and
    returns the loss. A step that cannot be recorded is taken one by one ever after, and said once.
    """

    def __init__(self, take: Callable[[Batch], Tensor]) -> None:
        self.take, self.taken, self.graph, self.able = take, 0, None, True
        self.stream = torch.cuda.Stream()

    def __call__(self, batch: Batch) -> Tensor:
        if self.graph is not None and [t.shape for t in batch] == [t.shape for t in self.inputs]:
            return self._replay(batch)
        if self.able and self.graph is None and self.taken >= WARM_UP:
            self._record(batch)
            if self.graph is not None:
                return self._replay(batch)
        self.taken += 1
        self.stream.wait_stream(
            torch.cuda.current_stream()
        )  # what is recorded later must not have run on the first one
        with torch.cuda.stream(self.stream):
            loss = self.take(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _record(self, batch: Batch) -> None:
        self.inputs = [tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss = self.take(self.inputs)
        except RuntimeError as error:
            self.able = False
            print(f"steps are not recorded: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
        else:
            self.graph = graph

    def _replay(self, batch: Batch) -> Tensor:
        for mine, new in zip(self.inputs, batch, strict=True):
            mine.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()
