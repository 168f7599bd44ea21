"""Regions of a feature map and which are the neighbours of which, as in the released code of Chaitanya et al.

The places of the regions for A = 13, as fractions 0, q = 1/4, h = 1/2, t = 3/4 and 1 of the index range; A = 9 has
those marked with a star:

        0     q     h     t     1
    0   *           *           *
    q         o           o
    h   *           *           *
    t         o           o
    1   *           *           *
"""

import torch
from torch import Tensor

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
