"""Who is alike: four answers to the question that tells the contrastive methods apart.

Each takes what is known of the B rows of a batch and returns `Pairs`, which `clseg.losses.contrastive_loss` turns into
a number. Memory: B² bytes per mask. All raise `ValueError` for wrong shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Positions m/n arrive rounded to float32, so a difference of two is off by up to 6e-8; one this near t counts as t.
POSITION_ROUNDING = 1e-7


@dataclass(frozen=True, eq=False)
class Pairs:
    """The positives and negatives of every anchor of a batch: two bool masks [B, B].

    `positive[i, j]`: row j is alike anchor i; `negative[i, j]`: it is not. A row that is neither takes no part in the
    loss of anchor i, and no row is a positive or negative of itself. Neither mask has to be symmetric.
    Raises `ValueError` if a mask is not bool or not square, if the shapes differ, if a diagonal holds True, or if a row
    is positive and negative at once.
    """

    positive: Tensor
    negative: Tensor

    def __post_init__(self) -> None:
        for name, mask in (("positive", self.positive), ("negative", self.negative)):
            if mask.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, not {mask.dtype}")
            if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
                raise ValueError(f"{name} must be square [B, B], not {list(mask.shape)}")
        if self.positive.shape != self.negative.shape:
            raise ValueError(f"positive has {len(self.positive)} rows, negative {len(self.negative)}")
        itself = (self.positive.diagonal() | self.negative.diagonal()).any()
        both = (self.positive & self.negative).any()
        if itself | both:  # one question, so that a GPU is waited for once
            what = "a row is its own positive or negative" if itself else "a row is positive and negative of one anchor"
            raise ValueError(what)


def instance_pairs(slice_id: Tensor) -> Pairs:
    """Views of one slice (integers [B], equal for views of one slice) are alike, every other row is a negative.

    Source: SimCLR; G^R of Chaitanya et al., `global_loss_exp_no=0`.
    """
    return _all_others_negative(_equal("slice_id", slice_id))


def partition_pairs(slice_id: Tensor, partition: Tensor, strategy: str = "gd", view: Tensor | None = None) -> Pairs:
    """The same partition of any volume holds like slices; negatives are the rows of other partitions only.

    `gd-`: positives are the views of one slice; other rows of its partition are neither positive nor negative.
    `gd`: those are positives too, between rows of the same `view` if `view` is given (the released code: slices with
    slices, augmented copies with augmented copies), between all rows if not.

    slice_id, partition, view: integers [B]. Raises `ValueError` for another strategy, or views of one slice in
    different partitions. Source: Chaitanya et al., G^{D-} and G^D, `global_loss_exp_no` 1 and 2.
    """
    if strategy not in ("gd-", "gd"):
        raise ValueError(f"strategy must be 'gd-' or 'gd', not {strategy!r}")
    same_slice, positive = _equal("slice_id", slice_id), _equal("partition", partition, len(slice_id))
    negative = ~positive
    if strategy == "gd-":
        positive = same_slice
    elif view is not None:
        positive = same_slice | (positive & _equal("view", view, len(slice_id)))
    return Pairs(positive.fill_diagonal_(False), negative)


def position_pairs(position: Tensor, threshold: float) -> Pairs:
    """Slices are alike where |p_i - p_j| < threshold, also within a volume; every other row is a negative.

    The other views of a slice have difference 0 and so are always among the positives.

    position: [B], place of the slice along its volume, 0 to 1; threshold: t > 0 in the same unit, `inf` for all alike.
    Raises `ValueError` for a position that is not a number or a threshold that is not positive.
    Source: Zeng et al., `SupConLoss`, method "pcl"; t = 0.1 for CHD, 0.35 for ACDC.
    *Deviation*: a difference within float32 rounding of t counts as t (0.4 - 0.3 is not below 0.1); in the released
    code the rounding decides.
    """
    _check_vector("position", position)
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, not {threshold}")
    if not position.isfinite().all():
        raise ValueError("every position must be a finite number")
    exact = position.double()
    difference = (exact[:, None] - exact[None, :]).abs_()  # [B, B]
    return _all_others_negative(difference < threshold - min(POSITION_ROUNDING, threshold / 2))


def cluster_pairs(slice_id: Tensor, cluster: Tensor) -> Pairs:
    """Slices of one pseudo-class are alike, and so are the views of one slice; every other row is a negative.

    slice_id, cluster: integers [B]. Source: Zhang et al., figure of the method.
    """
    same_cluster = _equal("cluster", cluster, len(slice_id))
    return _all_others_negative(_equal("slice_id", slice_id) | same_cluster)


def _check_vector(name: str, values: Tensor, rows: int | None = None) -> None:
    if values.ndim != 1 or (rows is not None and len(values) != rows):
        raise ValueError(f"{name} must have shape [{'B' if rows is None else rows}], not {list(values.shape)}")


def _equal(name: str, values: Tensor, rows: int | None = None) -> Tensor:
    _check_vector(name, values, rows)
    return values[:, None] == values[None, :]  # [B, B]


def _all_others_negative(alike: Tensor) -> Pairs:
    negative = (~alike).fill_diagonal_(False)
    return Pairs(alike.fill_diagonal_(False), negative)
