"""The contrastive loss, its local form over regions of a feature map, and the segmentation losses.

s_ij = cos(z_i, z_j) / temperature throughout. Similarities and sums are computed in float32 (float64 stays float64),
also under autocast, whatever the type of the input; a vector of length 0 has similarity 0 to all and gets no gradient.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from clseg.pairs import Pairs

# Stands for the logarithm of 0 in masked sums: finite, so that the gradient of an empty sum is 0 and not NaN.
LOG_ZERO = -1e30


def contrastive_loss(embedding: Tensor, pairs: Pairs, temperature: float = 0.1, denominator: str = "all") -> Tensor:
    """Contrastive loss of a batch: the positives P_i of each anchor i against its negatives N_i, both of `pairs`.

    `denominator="all"`: mean over the anchors with a positive of
        -1/|P_i| Σ_{j ∈ P_i} log( e^{s_ij} / Σ_{k ∈ P_i ∪ N_i} e^{s_ik} )
    `denominator="pair"`: mean over the ordered positive pairs (i, j) of
        -log( e^{s_ij} / (e^{s_ij} + Σ_{k ∈ N_i} e^{s_ik}) )
    With one positive per anchor the two are equal.

    embedding: [B, D], of all ranks (`ranks.gather`), any length. Returns a scalar ≥ 0, float32 or float64.
    The pairs may be on the CPU while the embeddings are on a GPU: then nothing waits for the GPU.
    Memory: about 20 bytes per similarity, 20 B²; time: 6 B² D multiplications.
    Raises `ValueError` for a shape unlike that of the pairs, a temperature ≤ 0, another denominator, or no positive.
    Source: released code of Zeng et al., `SupConLoss` ("all"), and of Chaitanya et al., `global_loss_exp_no` ("pair").
    *Deviation*: Zeng et al. multiply by temperature / 0.07, Chaitanya et al. divide the sum over pairs by the number of
    images in the batch; here both are plain means.
    """
    _check_pairs(embedding, pairs, denominator)
    masks = (mask.to(embedding.device, non_blocking=True) for mask in (pairs.positive, pairs.negative))
    return contrastive_terms(embedding, *masks, temperature, denominator)


def contrastive_terms(
    embedding: Tensor, positive: Tensor, negative: Tensor, temperature: float, denominator: str
) -> Tensor:
    """`contrastive_loss` of masks [B, B] on the device of the embeddings, which are taken as they are."""
    with full_precision(embedding):
        z, count = directions(embedding, temperature), positive.sum(dim=1)  # [B, D], positives of each anchor [B]
        s = z @ z.T  # [B, B]
        if denominator == "pair":
            rivals = s.masked_fill(~negative, LOG_ZERO).logsumexp(dim=1, keepdim=True)  # [B, 1]
            return -(F.logsigmoid(s - rivals) * positive).sum() / count.sum()
        log_share = s - s.masked_fill(~(positive | negative), LOG_ZERO).logsumexp(dim=1, keepdim=True)  # [B, B]
        of_anchor = -(log_share * positive).sum(dim=1) / count.clamp(min=1)  # [B]
        return of_anchor.sum() / count.count_nonzero()


def local_contrastive_loss(
    first: Tensor, second: Tensor, neighbours: Tensor, temperature: float = 0.1, image_pairs: Tensor | None = None
) -> Tensor:
    """Contrastive loss of a region against its neighbours: it is alike the same region of another map.

    The term of region r of map a, compared with map b, is
        t(a, b, r) = -log( e^{s(a_r, b_r)} / (e^{s(a_r, b_r)} + Σ_{m ∈ near(r)} [e^{s(a_r, a_m)} + e^{s(a_r, b_m)}]) ).
    The loss is the mean over images i and regions r of t(first_i, second_i, r) and t(second_i, first_i, r) (L^R). With
    `image_pairs` the terms t(first_i, first_j, r) of all i, j with `image_pairs[i, j]` join that mean, each with the
    weight of any other term (L^D); they go one way, from i to j, unless `image_pairs[j, i]` holds too.

    first, second: [B, R', D], regions of two views of B images that correspond by place; neighbours: integers [R, M],
    region indices below R'. Where R < R' the anchors are the first R regions and the others serve as negatives only.
    image_pairs: bool [B, B], diagonal False, not necessarily symmetric. Returns a scalar ≥ 0, float32 or float64.
    Memory: O(T R'²) for T = B, and with `image_pairs` as many more as it has pairs.
    Raises `ValueError` for wrong shapes, a neighbour that is no region, an image paired with itself, a temperature ≤ 0.
    Source: released code of Chaitanya et al., `local_loss_exp_no` 0 (L^R) and 1 (L^D).
    *Deviation*: the released L^D leaves out t(second_i, first_i, r) and divides the sum by regions and maps.
    """
    _check_regions(first, second, neighbours, image_pairs)
    near, regions = neighbours.to(first.device, non_blocking=True), len(neighbours)
    with full_precision(first):
        a, b = directions(first, temperature), directions(second, temperature)  # [B, R', D]

        def terms(own: Tensor, other: Tensor) -> Tensor:
            inside, across = own @ own.mT, own @ other.mT  # s of regions of one map, of two maps [T, R', R']
            alike = across.diagonal(dim1=1, dim2=2)[:, :regions]  # [T, R]
            index = near.expand(len(own), -1, -1)  # [T, R, M]
            rivals = torch.cat([s[:, :regions].gather(2, index) for s in (inside, across)], dim=2)  # [T, R, 2 M]
            return -F.logsigmoid(alike - rivals.logsumexp(dim=2))

        every = [terms(a, b), terms(b, a)]
        if image_pairs is not None:
            i, j = (index.to(a.device) for index in image_pairs.nonzero(as_tuple=True))
            every.append(terms(a[i], a[j]))
        return torch.cat(every).mean()


def directions(vector: Tensor, temperature: float) -> Tensor:
    """Vectors [..., D] over their length and over √temperature, so that the dot product of two is their s."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    vector = vector if vector.dtype == torch.float64 else vector.float()
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    # dividing by infinity gives a vector without direction the value 0 and the gradient 0
    return vector / (length.masked_fill(length < 1e-12, torch.inf) * temperature**0.5)


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Where products are computed in the type of what is multiplied, also under autocast."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _check_pairs(embedding: Tensor, pairs: Pairs, denominator: str) -> None:
    if embedding.ndim != 2:
        raise ValueError(f"embedding must be [B, D], not {list(embedding.shape)}")
    if len(embedding) != len(pairs.positive):
        raise ValueError(f"{len(embedding)} embeddings, but pairs of {len(pairs.positive)}")
    if denominator not in ("all", "pair"):
        raise ValueError(f"denominator must be 'all' or 'pair', not {denominator!r}")
    if not pairs.positive.any():
        raise ValueError("no anchor has a positive")


def _check_regions(first: Tensor, second: Tensor, neighbours: Tensor, image_pairs: Tensor | None) -> None:
    if first.ndim != 3 or first.shape != second.shape or len(first) == 0:
        raise ValueError(f"first and second must both be [B, R, D], not {list(first.shape)} and {list(second.shape)}")
    images, regions, _ = first.shape
    if neighbours.ndim != 2 or not 1 <= len(neighbours) <= regions or neighbours.shape[1] == 0:
        raise ValueError(f"neighbours must be [R, M] with R from 1 to {regions}, not {list(neighbours.shape)}")
    if ((neighbours < 0) | (neighbours >= regions)).any():
        raise ValueError(f"neighbours must be region indices from 0 to {regions - 1}")
    if image_pairs is not None:
        if image_pairs.dtype != torch.bool or image_pairs.shape != (images, images):
            given = f"{image_pairs.dtype} {list(image_pairs.shape)}"
            raise ValueError(f"image_pairs must be bool [{images}, {images}], not {given}")
        if image_pairs.diagonal().any():
            raise ValueError("image_pairs pairs an image with itself")


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """One minus the soft Dice coefficient, averaged over images and over all classes, the background among them.

    1 - mean_{b, k} 2 Σ_x p_bk(x) y_bk(x) / (Σ_x p_bk(x) + Σ_x y_bk(x) + 1e-10), p the softmax of the logits, y one-hot.
    As the smoothing is in the denominator only, a class that is not in the label counts 0 whatever the prediction.

    logits: [B, K, ...]; label: int64 [B, ...], 0 to K - 1, or y itself, float [B, K, ...] (mixed or predicted labels).
    Returns a scalar in [0, 1], float32 or float64. Raises `ValueError` for shapes that do not fit.
    Source: `dice_loss_with_backgrnd` of Chaitanya et al.
    """
    logits, label = _checked(logits, label)
    probability = logits.softmax(dim=1).flatten(2)  # [B, K, X]
    target = label.flatten(2) if label.ndim == logits.ndim else torch.zeros_like(probability)  # [B, K, X]
    if label.ndim < logits.ndim:
        target.scatter_(1, label[:, None].flatten(2), 1.0)
    overlap = (probability * target).sum(dim=2)  # [B, K]
    return 1 - (2 * overlap / (probability.sum(dim=2) + target.sum(dim=2) + 1e-10)).mean()


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over all pixels of the batch of -Σ_k y_k log p_k, the loss of Zeng et al.; all else as in `dice_loss`."""
    return F.cross_entropy(*_checked(logits, label))


def dice_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """The sum of `dice_loss` and `cross_entropy`."""
    return dice_loss(logits, label) + cross_entropy(logits, label)


SEGMENTATION_LOSSES = {"dice": dice_loss, "cross_entropy": cross_entropy, "dice+cross_entropy": dice_cross_entropy}


def _checked(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim < 3 or label.shape not in (logits.shape, (logits.shape[0], *logits.shape[2:])):
        given = f"{list(logits.shape)}, {list(label.shape)}"
        raise ValueError(f"logits must be [B, K, ...] and label [B, ...], not {given}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits, label.to(logits.dtype) if label.ndim == logits.ndim else label
