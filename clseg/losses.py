"""The contrastive kernel, its local form over regions of a feature map, and the segmentation losses.

s_ij = cos(z_i, z_j) / temperature throughout. Similarities and sums are computed in float32 (float64 stays float64),
also under autocast, whatever the type of the input; a vector of length 0 has similarity 0 to all and gets no gradient.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

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

    embedding: [B, D], of all ranks (`gather`), any length. Returns a scalar ≥ 0, float32 or float64.
    The pairs may be on the CPU while the embeddings are on a GPU: then nothing waits for the GPU.
    Memory: 30 bytes per similarity of a block of `BLOCK`, 2 B² of the pairs; time: 6 B² D multiplications.
    Raises `ValueError` for a shape unlike that of the pairs, a temperature ≤ 0, another denominator, or no positive.
    Source: released code of Zeng et al., `SupConLoss` ("all"), and of Chaitanya et al., `global_loss_exp_no` ("pair").
    *Deviation*: Zeng et al. multiply by temperature / 0.07, Chaitanya et al. divide the sum over pairs by the number of
    images in the batch; here both are plain means.
    """
    if embedding.ndim != 2:
        raise ValueError(f"embedding must be [B, D], not {list(embedding.shape)}")
    if len(embedding) != len(pairs.positive):
        raise ValueError(f"{len(embedding)} embeddings, but pairs of {len(pairs.positive)}")
    if denominator not in ("all", "pair"):
        raise ValueError(f"denominator must be 'all' or 'pair', not {denominator!r}")
    count, pair = pairs.positive.sum(dim=1, keepdim=True), denominator == "pair"  # [B, 1]
    if not count.any():
        raise ValueError("no anchor has a positive")
    with full_precision(embedding):
        direction = _directions(embedding, temperature)
        weight = (count.sum().expand_as(count) if pair else count.clamp(min=1) * count.count_nonzero()).to(direction)
        about = (pairs.positive, pairs.negative, weight.reciprocal_())
        return _Contrast.apply(direction, *(each.to(direction.device, non_blocking=True) for each in about), pair)


BLOCK = 2**18  # similarities at a time: few enough for a processor's cache


def _terms(similarity: Tensor, rivals: Tensor, weight: Tensor, pair: bool) -> Tensor:
    """The weighted sum of the terms of a contrastive loss, Σ_ij w_ij t_ij; w is 0 where j is no positive of i.

    t_ij = -log( e^{s_ij} / (e^{s_ij} + R_i) ) with `pair`, else -log( e^{s_ij} / R_i ); R_i = Σ_k e^{rivals_ik}.
    similarity, rivals: [..., b, B]; weight: of a shape that broadcasts to theirs.
    """
    margin = similarity - rivals.logsumexp(dim=-1, keepdim=True)
    return -((F.logsigmoid(margin) if pair else margin) * weight).sum()


def _exp(exponent: Tensor) -> Tensor:
    """e^x of x ≤ 0, in its place, and 0 where that is next to nothing: on a CPU underflow costs ten times as much."""
    least = 4 * torch.finfo(exponent.dtype).tiny
    return F.threshold_(exponent.clamp_(min=math.log(least)).exp_(), 2 * least, 0.0)


def _terms_and_slope(similarity: Tensor, rivals: Tensor, weight: Tensor, pair: bool) -> tuple[Tensor, Tensor]:
    """`_terms`, and its derivative by the similarities, where rivals are similarities or `LOG_ZERO`; in their place.

    Without `pair` positives are among the rivals, and the similarities are not looked at.
    """
    largest = rivals.amax(dim=-1, keepdim=True)
    share = rivals.sub_(largest)
    value = 0 if pair else -(share * weight).sum()
    total = _exp(share).sum(dim=-1, keepdim=True)  # [..., b, 1]
    if pair:
        margin = similarity - total.log().add_(largest)
        value = ((1 + _exp(-margin.abs())).log_().sub_(margin.clamp(max=0)) * weight).sum()  # log(1 + e^-margin)
        weight = margin.neg_().sigmoid_().mul_(weight)
    repelled = weight.sum(dim=-1, keepdim=True)  # [..., b, 1]
    if not pair:
        value = value + (total.log() * repelled).sum()
    return value, share.mul_(repelled / total).sub_(weight)


def _no_rivals(positive: Tensor, negative: Tensor, pair: bool) -> Tensor:
    """What is not in the denominator beside the positive itself."""
    return ~negative if pair else positive == negative  # no row is both


class _Contrast(torch.autograd.Function):
    """`contrastive_loss` of directions, and on the way its gradient, a block of anchors at a time."""

    @staticmethod
    def forward(ctx, direction: Tensor, positive: Tensor, negative: Tensor, weight: Tensor, pair: bool) -> Tensor:
        value, gradient, parts = 0, 0, []
        blocks = (tensor.split(max(BLOCK // len(direction), 1)) for tensor in (direction, positive, negative, weight))
        for anchors, alike, unlike, each in zip(*blocks, strict=True):  # [b, D], [b, B], [b, B], [b, 1]
            similarity = anchors @ direction.T  # [b, B]
            rivals = similarity.clone() if pair else similarity
            rivals.masked_fill_(_no_rivals(alike, unlike, pair), LOG_ZERO)
            terms, slope = _terms_and_slope(similarity, rivals, alike * each, pair)
            value = value + terms
            if len(anchors) == len(direction):  # a single block
                gradient = (slope + slope.T) @ direction
            else:
                gradient = gradient + slope.T @ anchors
                parts.append(slope @ direction)
        ctx.pair = pair
        ctx.save_for_backward(direction, positive, negative, weight, gradient + torch.cat(parts) if parts else gradient)
        return value

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        direction, positive, negative, weight, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated again: by autograd
            similarity = direction @ direction.T
            rivals = similarity.masked_fill(_no_rivals(positive, negative, ctx.pair), LOG_ZERO)
            again = _terms(similarity, rivals, positive * weight, ctx.pair)
            (gradient,) = torch.autograd.grad(again, direction, create_graph=True)
        return gradient * outer, None, None, None, None


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
    with full_precision(first):
        a, b = _directions(first, temperature), _directions(second, temperature)  # [B, R', D]
        # rows and columns below are the regions of a map, then those of the map that it is compared with
        near = torch.zeros(regions, regions, dtype=a.dtype, device=neighbours.device)
        near[: len(neighbours)].scatter_add_(1, neighbours, near.new_ones(neighbours.shape))  # how often a neighbour
        rival = near.log_().clamp_(min=LOG_ZERO).repeat(2, 2).to(a.device, non_blocking=True)  # [2 R', 2 R']
        anchor = torch.arange(2 * regions, device=a.device) < len(neighbours)
        forth = torch.diag(anchor.to(a)).roll(regions, 1)  # from anchors to the same region of the other map

        def terms(own: Tensor, other: Tensor, weight: Tensor) -> Tensor:
            return _Local.apply(torch.cat([own, other], dim=1), rival, weight)

        i, j = ((), ()) if image_pairs is None else (index.to(a.device) for index in image_pairs.nonzero(as_tuple=True))
        count = len(neighbours) * (2 * images + len(i))
        value = terms(a, b, (forth + forth.T) / count)
        return value if image_pairs is None else value + terms(a[i], a[j], forth / count)


class _Local(torch.autograd.Function):
    """The weighted sum of the terms of regions [T, 2 R', D], and on the way its gradient."""

    @staticmethod
    def forward(ctx, direction: Tensor, rival: Tensor, weight: Tensor) -> Tensor:
        similarity = direction @ direction.mT  # [T, 2 R', 2 R']
        value, slope = _terms_and_slope(similarity, similarity + rival, weight, pair=True)
        ctx.save_for_backward(direction, rival, weight, (slope + slope.mT) @ direction)
        return value

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None, None]:
        direction, rival, weight, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # as in `_Contrast`
            similarity = direction @ direction.mT
            again = _terms(similarity, similarity + rival, weight, pair=True)
            (gradient,) = torch.autograd.grad(again, direction, create_graph=True)
        return gradient * outer, None, None


def gather(tensor: Tensor) -> Tensor:
    """The rows of all ranks, rank after rank, [W B, ...], with gradient; the tensor itself where there is one process.

    With embeddings and all that `clseg.pairs` needs gathered, every rank has the loss of one process. Backward sums
    what the W equal losses say about a rank's rows: W times their gradient, so that the mean over ranks that
    DistributedDataParallel takes is the gradient of one process. tensor: [B, ...], as many rows on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """`torch.distributed.nn.functional.all_gather`, which is deprecated, and whose successor is private."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Where products are computed in the type of what is multiplied, also under autocast."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _directions(vector: Tensor, temperature: float) -> Tensor:
    """Vectors over their length and over √temperature, so that the dot product of two is their s; [..., D]."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    vector = vector if vector.dtype == torch.float64 else vector.float()
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    # dividing by infinity gives a vector without direction the value 0 and the gradient 0
    return vector / (length.masked_fill(length < 1e-12, torch.inf) * temperature**0.5)


# Places of a region along a side of the map, as a part of its index range.
PLACES = {"0": 0.0, "q": 0.25, "h": 0.5, "t": 0.75, "1": 1.0}
# A region and its negatives, all as "row column"; hand-written in the released code and copied as they are. The order
# matters: a stage with fewer negatives takes the first ones.
_NEAR_13 = (
    "00 0h qq qh h0 hq; 0h 00 01 qq qt hh; 01 0h qh qt ht h1; h0 00 qq hh 10 tq; hh qq qt tq tt h0; "
    "h1 01 hh 11 qt tt; 10 h0 hq 1h tq th; 1h hh 10 11 tq tt; 11 ht h1 1h tt th; "
    "qq 00 0h h0 hh qt; qt 0h 01 qq hh h1; tq h0 hh 10 1h tt; tt hh h1 1h 11 tq"
)
_NEAR_13_POINT = (  # for K = 1, where it differs
    "00 0h h0 hh qq qt; 0h 00 01 hh qq qt; 01 0h hh h1 tq qt; h0 00 hh 10 qq tq; 10 h0 hh 1h tq qq; "
    "11 hh h1 1h tt tq; qt 0h 01 hh h1 tt; tq h0 hh 10 0h qq; tt hh h1 1h 11 qt"
)
_NEAR_9 = (
    "00 0h h0 hh 01 10; 0h 00 01 h0 hh h1; 01 00 0h hh h1 11; h0 00 0h hh 10 1h; hh 00 0h h0 h1 1h; "
    "h1 0h 01 hh 1h 11; 10 00 h0 hh 1h 11; 1h h0 hh h1 10 11; 11 01 hh h1 10 1h"
)
_TABLES = {(9, 1): [_NEAR_9], (9, 3): [_NEAR_9], (13, 1): [_NEAR_13, _NEAR_13_POINT], (13, 3): [_NEAR_13]}


def region_grid(map_size: tuple[int, int], size: int, regions: int) -> tuple[Tensor, Tensor]:
    """Where the regions of the released code lie on a map, and which regions are the negatives of which.

    Along a side of n pixels a region (its top left pixel) is at int(f W), W = n - 4 for K = 3 and n - 1 for K = 1, with
    f = 0, 1/4, 1/2, 3/4, 1: for K = 3 on 48 pixels at 0, 11, 22, 33, 44. A = 9 regions are {0, 1/2, 1}², A = 13 are
    those and {1/4, 3/4}².

    map_size: height and width in pixels; size: K, 1 or 3; regions: A, 9 or 13. Returns corners [R', 2] (row, column)
    and neighbours [A, 5] int64, indices of corners. The first A corners are the regions, in the order of the released
    code; for A = 13 and K = 3 four more follow, which are no regions but negatives in its tables.
    Raises `ValueError` for another number or size of regions, or a map so small that two regions would coincide.
    Source: `pos_sample_indexes`, `neg_sample_indexes` of Chaitanya et al.; `nearest_neighbours` is the regular rule.
    """
    if (regions, size) not in _TABLES:
        raise ValueError(f"regions must be 9 or 13 and size 1 or 3, not {regions} and {size}")
    margin = 4 if size == 3 else 1
    smallest = margin + (4 if regions == 13 else 2)
    if min(map_size) < smallest:
        needs, given = f"{smallest} x {smallest}", f"{map_size[0]} x {map_size[1]}"
        raise ValueError(f"{regions} regions of size {size} need a map of {needs} pixels, this one has {given}")
    near = {entry[:2]: entry[3:].split() for table in _TABLES[regions, size] for entry in table.split("; ")}
    places = list(dict.fromkeys([*near, *(place for negatives in near.values() for place in negatives)]))
    ranges = [side - margin for side in map_size]
    corners = [[int(PLACES[part] * w) for part, w in zip(place, ranges, strict=True)] for place in places]
    neighbours = [[places.index(place) for place in negatives] for negatives in near.values()]
    return torch.tensor(corners), torch.tensor(neighbours)


def nearest_neighbours(corners: Tensor, count: int) -> Tensor:
    """The `count` nearest other regions of every region, nearest first, of equally near ones the first of the list.

    corners: [R, 2]. Returns int64 [R, count]. Raises `ValueError` where there are fewer.
    """
    if not 1 <= count < len(corners):
        raise ValueError(f"count must be from 1 to {len(corners) - 1}, not {count}")
    distance = (corners[:, None] - corners[None, :]).double().square().sum(dim=-1)  # [R, R]
    return distance.fill_diagonal_(torch.inf).argsort(dim=1, stable=True)[:, :count]


def region_embeddings(feature_map: Tensor, corners: Tensor, size: int) -> Tensor:
    """The K x K patches of a map at the given corners, each flattened by row, column, channel.

    feature_map: [B, D, H, W]; corners: integers [R, 2], (row, column) of the top left pixel; size: K.
    Returns [B, R, K K D] of the map's type. Raises `ValueError` for wrong shapes or a region not inside the map.
    Source: released code of Chaitanya et al.; their shared linear layer for K = 3 belongs to the head.
    """
    if feature_map.ndim != 4 or corners.ndim != 2 or corners.shape[1] != 2:
        given = f"{list(feature_map.shape)} and {list(corners.shape)}"
        raise ValueError(f"feature_map must be [B, D, H, W] and corners [R, 2], not {given}")
    height, width = feature_map.shape[2:]
    row, column = corners.unbind(dim=1)  # [R] each
    if size < 1 or ((corners < 0).any(dim=1) | (row > height - size) | (column > width - size)).any():
        raise ValueError(f"a region of size {size} is not inside the map of {height} x {width}")
    step = torch.arange(size, device=corners.device)
    row, column = ((first[:, None] + step).to(feature_map.device) for first in (row, column))  # [R, K] each
    row, column = row[:, :, None], column[:, None, :]  # [R, K, 1], [R, 1, K]
    return feature_map.permute(0, 2, 3, 1)[:, row, column].flatten(2)  # [B, R, K, K, D] -> [B, R, K K D]


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
