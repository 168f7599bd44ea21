"""Agreement of a segmented volume with its reference, in 3-D on the native grid, and what a missed structure counts."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    r"""Dice coefficient $2 |P \cap R| / (|P| + |R|)$ of two bool arrays of one shape; NaN if both are empty."""
    size = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return float(2 * np.count_nonzero(prediction & reference) / size) if size else float("nan")


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> float:
    r"""95th percentile of the symmetric Hausdorff distance between the surfaces of two masks, bool [Z, Y, X].

    $\max(Q_{95}\{d(p, \partial R) : p \in \partial P\},\; Q_{95}\{d(r, \partial P) : r \in \partial R\})$, d the
    Euclidean distance of voxel centres and the surface $\partial$ of a mask its voxels that touch the outside with a
    face, also beyond the image; in an image of one slice only neighbours inside the slice count. In the unit of
    `spacing` (z, y, x). Same value as MONAI's `compute_hausdorff_distance(percentile=95)`.
    Raises `ValueError` when a mask is empty: see `score` for what an empty mask counts.
    """
    if not (prediction.any() and reference.any()):
        raise ValueError("the surface distance of an empty mask is not defined")
    if prediction.shape[0] == 1:
        prediction, reference, spacing = prediction[0], reference[0], spacing[1:]
    box = find_objects((prediction | reference).astype(np.uint8))[0]  # all surface lies in it: smaller, same distances
    prediction, reference = prediction[box], reference[box]
    surfaces = [mask & ~binary_erosion(mask) for mask in (prediction, reference)]
    to_prediction, to_reference = (distance_transform_edt(~surface, sampling=spacing) for surface in surfaces)
    directed = to_reference[surfaces[0]], to_prediction[surfaces[1]]
    return float(max(np.percentile(distances, 95) for distances in directed))


def score(
    prediction: np.ndarray, reference: np.ndarray, class_names: Mapping[int, str], spacing_mm: Sequence[float] | None
) -> list[dict]:
    """Dice and HD95 of each structure of one volume, one row per structure, with the rule for empty masks.

    | reference | prediction | Dice | HD95 | missed | |
    |---|---|---|---|---|---|
    | there | there | measured | measured | 0 | |
    | there | empty | 0 | image diagonal | 1 | a missed structure |
    | empty | there | 0 | image diagonal | 0 | a false structure |
    | empty | empty | NaN | NaN | 0 | left out of means, and counted (`stats`) |

    The image diagonal is longer than any distance inside the image: missing is never better than finding badly.
    HD95 is in mm where the spacing is known. Elsewhere `hd95_unit` is `px`, the side of an in-plane pixel, and a slice
    step counts as **one** pixel: a lower bound, as slices are mostly thicker than pixels are wide.

    Args: `prediction`, `reference` int [Z, Y, X], class indices; `class_names` {class index: name} of the structures to
    score; `spacing_mm` (z, y, x). Returns dicts of `class_name`, `dice`, `hd95`, `hd95_unit`, `missed` (0 or 1).
    Raises `ValueError` for other shapes or a spacing that is not positive.
    Source: the papers report Dice only; the empty-mask rule is this study's.
    """
    shapes = prediction.shape, reference.shape
    if shapes[0] != shapes[1] or prediction.ndim != 3:
        raise ValueError(f"prediction and reference must be [Z, Y, X] of one shape: {shapes[0]}, {shapes[1]}")
    if spacing_mm is not None and not all(np.isfinite(step) and step > 0 for step in spacing_mm):
        raise ValueError(f"spacing must be positive: {spacing_mm}")
    unit, spacing = ("px", (1.0, 1.0, 1.0)) if spacing_mm is None else ("mm", spacing_mm)
    diagonal, rows = float(np.linalg.norm(np.multiply(reference.shape, spacing))), []
    for index, name in class_names.items():
        found, there = prediction == index, reference == index
        distance = diagonal if found.any() or there.any() else float("nan")
        if found.any() and there.any():
            distance = hd95(found, there, spacing)
        row = {"class_name": name, "dice": dice(found, there), "hd95": distance, "hd95_unit": unit}
        rows.append(row | {"missed": int(there.any() and not found.any())})
    return rows


def volume_dice(prediction: np.ndarray, reference: np.ndarray, classes: Iterable[int]) -> float:
    """Mean Dice over the class indices that prediction or reference (int, one shape) have; NaN if they have none."""
    values = np.array([dice(prediction == index, reference == index) for index in classes])
    return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")
