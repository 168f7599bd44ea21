"""Which slices make a batch."""

import numpy as np
import torch
from torch import Generator, Tensor

from clseg.data.store import Store
from clseg.errors import RequestError
from clseg.loop import Work


def random_slices(rows: np.ndarray, count: int, generator: Generator) -> np.ndarray:
    """`count` of these slices without repetition, or all of them where there are fewer."""
    return rows[torch.randperm(len(rows), generator=generator)[:count].numpy()]


def random_batch(work: Work, stream: str, step: int) -> tuple[Tensor, Generator]:
    """The images of `random_slices` of a step, and the generator they were drawn with."""
    generator = work.generator(stream, step)
    chosen = random_slices(work.rows, work.slices, generator)
    return work.store.batch(chosen, work.device, generator).image, generator


def partition_slices(
    store: Store, rows: np.ndarray, partitions: int, count: int, generator: Generator
) -> tuple[np.ndarray, Tensor]:
    """One random slice of each of S partitions of as many random volumes as `count` slices allow.

    Partition k of a volume of D slices holds the indices [k floor(D/S), (k+1) floor(D/S)); the last D mod S slices are
    never drawn, as in the released code of Chaitanya et al. Volumes with fewer than S slices are left out.
    Returns rows [m S] and their partition [m S] int64. Raises `RequestError` where no volume is long enough.
    """
    volumes = store.volumes.iloc[np.unique(store.slices["volume"].to_numpy()[rows])]
    volumes = volumes[volumes["slices"] >= partitions]
    if volumes.empty:
        raise RequestError(f"stages: no volume has {partitions} slices; lower partitions")
    chosen = torch.randperm(len(volumes), generator=generator)[: max(count // partitions, 1)].numpy()
    first = volumes["first_row"].to_numpy()[chosen, None]  # [m, 1]
    length = volumes["slices"].to_numpy()[chosen, None] // partitions  # [m, 1]
    draw = torch.rand((len(chosen), partitions), generator=generator).numpy()  # [m, S]
    index = np.arange(partitions) * length + (draw * length).astype(np.int64)  # [m, S]
    return (first + index).reshape(-1), torch.arange(partitions).repeat(len(chosen))


def equal_partitions(store: Store, rows: np.ndarray, partitions: int) -> Tensor:
    """The partition of every slice [B] int64, as Zeng et al. cut: D/S slices each, half rounded up, the last takes the
    rest."""
    slices = store.slices.iloc[rows]
    length = np.floor(slices["slices_in_volume"] / partitions + 0.5).clip(lower=1)
    return torch.from_numpy((slices["slice"] // length).clip(upper=partitions - 1).to_numpy(np.int64))
