"""A volume: one 3-D image on its native grid, and where it lies."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clseg.errors import RequestError


@dataclass(frozen=True)
class Volume:
    """One 3-D image on its native grid, slices along Z, with its labels if it has any."""

    image: np.ndarray  # float32 [C, Z, Y, X], native intensities
    label: np.ndarray | None  # uint8 [Z, Y, X], class indices 0..K (0 background)
    spacing_mm: tuple[float, float, float] | None  # (z, y, x); None where the files carry none
    subject: str
    phase: str  # "" where a subject has one volume
    affine: np.ndarray | None = None  # 4 x 4 of the NIfTI file as stored (axes x, y, z)
    axes: tuple[int, int, int] = (0, 1, 2)  # which axis of the file (z, y, x) became Z, Y and X
    flips: tuple[bool, bool, bool] = (False, False, False)  # whether Z, Y and X are reversed
    slice_axis: str = ""  # world axis that slices are ordered along; "" where they are as stored
    notes: tuple[str, ...] = ()  # what was decided about its files that a user should know, a sentence each

    def as_stored(self, array: np.ndarray) -> np.ndarray:
        """An array [..., Z, Y, X] with its last axes in the order and direction of the file (z, y, x)."""
        lead = array.ndim - 3
        turned = np.flip(array, [lead + axis for axis in range(3) if self.flips[axis]])
        return turned.transpose(*range(lead), *(lead + axis for axis in np.argsort(self.axes).tolist()))


def both(path: Path) -> list[Path]:
    """The files of a volume: of a pair header and voxels, else itself."""
    pair = {".hdr": ".img", ".img": ".hdr"}.get(path.suffix)
    return [path, path.with_suffix(pair)] if pair else [path]


@dataclass(frozen=True)
class VolumeRef:
    """Where one volume lies: enough to read it and to notice that it changed."""

    subject: str
    phase: str
    images: tuple[Path, ...]  # one, one per channel, or one per slice; none where it is computed
    label: Path | None  # h5: the label lies in the image files
    root: Path  # the folder that was scanned
    stamp: str = ""  # what computes it, and its version

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it is read from, each once: of a pair, header and voxels."""
        named = filter(None, [*self.images, self.label])
        return tuple(dict.fromkeys(file for path in named for file in both(path)))

    @property
    def source(self) -> str:
        """What a message about the volume names."""
        return str(self.images[0]) if self.images else self.subject


def checked(volume: Volume, source: str | Path, label: Path | None = None) -> Volume:
    """The volume itself if it can be used, else a `RequestError` that names the file and what is wrong with it."""
    shape, spacing = volume.image.shape, volume.spacing_mm
    if len(shape) != 4 or 0 in shape:
        problem = f"holds no 3-D image (shape {list(shape)})"
    elif not np.isfinite(volume.image).all():
        bad = np.count_nonzero(~np.isfinite(volume.image))
        problem = f"holds {bad} intensities that are NaN or infinite"
        raise RequestError(f"{source}: {problem}; repair or remove the volume, or give options.nan a value such as 0")
    elif constant := [channel for channel, image in enumerate(volume.image) if image.min() == image.max()]:
        problem = f"channel {constant[0]} is constant"
    elif volume.label is not None and volume.label.shape != shape[1:]:
        source, needed = label or source, list(shape[1:])
        problem = f"the label has shape {list(volume.label.shape)} and the image {needed} (z, y, x)"
    elif spacing is not None and not (min(spacing) > 1e-6 and max(spacing) < 1e5 and np.isfinite(spacing).all()):
        problem = f"the header gives the voxel spacing {spacing} mm, which cannot be"
    else:
        return volume
    raise RequestError(f"{source}: {problem}; repair or remove the volume")
