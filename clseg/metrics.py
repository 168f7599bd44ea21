"""Agreement of a segmented volume with its reference, in 3-D on the native grid, and what a missed structure counts."""

from collections.abc import Iterable, Mapping

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    r"""Dice coefficient of two masks: $2 |P \cap R| / (|P| + |R|)$.

    Args: two bool arrays of one shape. Returns a value in [0, 1]; NaN when both are empty.
    """
    size = np.count_nonzero(prediction) + np.count_nonzero(reference)
    return float(2 * np.count_nonzero(prediction & reference) / size) if size else float("nan")


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> float:
    r"""95th percentile of the symmetric Hausdorff distance between the surfaces of two masks that are not empty.

    $\max(Q_{95}\{d(p, \partial R) : p \in \partial P\},\; Q_{95}\{d(r, \partial P) : r \in \partial R\})$, with d the
    Euclidean distance between voxel centres and the surface $\partial$ of a mask those of its voxels that touch the
    outside with a face; what lies beyond the image is outside. An image of one slice is two-dimensional: there only
    neighbours inside the slice count. Same value as MONAI's `compute_hausdorff_distance(percentile=95)`.

    Args: two bool arrays [Z, Y, X]; `spacing` (z, y, x) of a voxel in any unit, which is the unit of the result.
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
    prediction: np.ndarray,
    reference: np.ndarray,
    class_names: Mapping[int, str],
    spacing_mm: tuple[float, float, float] | None,
) -> list[dict]:
    """Dice and HD95 of each structure of one volume, one row per structure, with the rule for empty masks.

    | reference | prediction | Dice | HD95 | missed | |
    |---|---|---|---|---|---|
    | there | there | measured | measured | 0 | |
    | there | empty | 0 | image diagonal | 1 | a missed structure |
    | empty | there | 0 | image diagonal | 0 | a false structure |
    | empty | empty | NaN | NaN | 0 | left out of means, and counted (`stats`) |

    The image diagonal, from corner to corner of the volume, is longer than any distance inside the image, so missing a
    structure is never better than finding it badly.

    HD95 is in mm where the spacing is known. Where it is not, `hd95_unit` is `px`, the side of an in-plane pixel, and a
    slice step counts as **one** pixel. Slices are mostly thicker than pixels are wide; then the true distance in pixels
    is longer, and the `px` value is a lower bound of it. (Distances inside slices only would have a cleaner unit but no
    value in a slice where one of both has nothing; there every such slice would have to count as a miss.)

    Args: `prediction`, `reference` int [Z, Y, X], class indices; `class_names` {class index: name} of the structures to
    score, without the background; `spacing_mm` (z, y, x) of a voxel.
    Returns dicts with keys `class_name`, `dice` in [0, 1], `hd95`, `hd95_unit`, `missed` (0 or 1).
    Raises `ValueError` for other shapes or a spacing that is not positive.
    Source: the papers report Dice only; the empty-mask rule is this study's.
    """
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(
            f"prediction and reference must be [Z, Y, X] of one shape: {prediction.shape}, {reference.shape}"
        )
    if spacing_mm is not None and not all(np.isfinite(step) and step > 0 for step in spacing_mm):
        raise ValueError(f"spacing must be positive: {spacing_mm}")
    unit, spacing = ("px", (1.0, 1.0, 1.0)) if spacing_mm is None else ("mm", spacing_mm)
    diagonal = float(np.linalg.norm(np.multiply(reference.shape, spacing)))

    rows = []
    for index, name in class_names.items():
        found, there = prediction == index, reference == index
        if found.any() and there.any():
            distance = hd95(found, there, spacing)
        else:
            distance = diagonal if found.any() or there.any() else float("nan")
        missed = int(there.any() and not found.any())
        rows.append(
            {"class_name": name, "dice": dice(found, there), "hd95": distance, "hd95_unit": unit, "missed": missed}
        )
    return rows


def volume_dice(prediction: np.ndarray, reference: np.ndarray, classes: Iterable[int]) -> float:
    """Mean Dice over the classes that prediction or reference have; NaN when they have none.

    The quick score of validation during training. Args: int arrays of one shape; `classes` class indices.
    """
    values = np.array([dice(prediction == index, reference == index) for index in classes])
    return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")
