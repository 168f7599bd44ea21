"""Augmentation, time per view: turned, scaled and deformed elastically in one interpolation, then brightness and
contrast.

Ours makes a batch of 64 at once; MONAI and batchgenerators make one view after the other, as their pipelines do. All
deform every view with 11 control points or the same smoothness per side, interpolate linearly (the published setting
of batchgenerators, cubic, is slower) and fill with zeros. They draw other random numbers, so the values are not the
same.
"""

from collections.abc import Callable

import numpy as np
import torch
from common import ROUNDS, Row, against, fastest, import_peer, in_turn
from torch import Tensor

from clseg import augment

TITLE = "augmentation per view: affine, elastic and intensity, batch of 64"
GOAL = "at least 10 times faster than MONAI and batchgenerators, per sample on the same cores, 6 times at 352 px"
PEERS = ["monai", "batchgenerators"]
BATCH, PER_SAMPLE = 64, 8  # views of a call


def ours(image: Tensor) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: augment.intensity(augment.spatial_view(image, generator), generator)


def monai(image: Tensor) -> Callable[[], list] | None:
    transforms = import_peer("monai.transforms")
    if not transforms:
        return None
    side = image.shape[-1]
    spatial = {"spacing": (side / 10, side / 10), "magnitude_range": (2, 3), "padding_mode": "zeros"}
    one = transforms.Compose(
        [
            transforms.Rand2DElastic(prob=1, rotate_range=np.pi, scale_range=0.3, **spatial),
            transforms.RandShiftIntensity(0.3, prob=1),
            transforms.RandScaleIntensityFixedMean(prob=1, factors=0.3, fixed_mean=True),
        ]
    )
    return lambda: [one(view) for view in image]


def batchgenerators(image: Tensor) -> Callable[[], list] | None:
    spatial = import_peer("batchgenerators.transforms.spatial_transforms")
    colour = import_peer("batchgenerators.transforms.color_transforms")
    if not (spatial and colour):
        return None
    side, views = image.shape[-1], image.numpy()
    pixel = side / augment.PCL_REFERENCE_PX
    alpha, sigma = (tuple(pixel * end for end in ends) for ends in (augment.PCL_ALPHA, augment.PCL_SIGMA_PX))
    elastic = {"alpha": alpha, "sigma": sigma, "scale": augment.PCL_SCALE, "order_data": 1}
    place = {"patch_center_dist_from_border": side // 2, "random_crop": False, "border_mode_data": "constant"}
    steps = [
        spatial.SpatialTransform((side, side), **place, **elastic),
        colour.BrightnessTransform(0, 0.2, per_channel=False),
        colour.ContrastAugmentationTransform(augment.CONTRAST, preserve_range=False),
    ]

    def one(view: np.ndarray) -> dict:
        data = {"data": view[None].copy()}
        for step in steps:
            data = step(**data)
        return data

    return lambda: [one(view) for view in views]


def measure(quick: bool) -> list[Row]:
    rows = []
    for side, goal in ((96, 0.1),) if quick else ((96, 0.1), (192, 0.1), (352, 1 / 6)):
        image = torch.rand(BATCH, 1, side, side, generator=torch.Generator().manual_seed(0))
        few = image[:PER_SAMPLE]
        peers = {"monai": monai(few), "batchgenerators": batchgenerators(few)}
        calls = {"ours": ours(image)} | {name: call for name, call in peers.items() if call}
        for name, call in calls.items():
            views = call()
            assert len(views) == (BATCH if name == "ours" else PER_SAMPLE), name
        per_call = in_turn(calls, 2 if quick else ROUNDS, 0.1)
        views_of = dict.fromkeys(calls, PER_SAMPLE) | {"ours": BATCH}
        samples = {name: [seconds / views_of[name] for seconds in times] for name, times in per_call.items()}
        for name in peers:
            if name in calls:
                fast = fastest(samples, [name for name in calls if name != "ours"])
                rows.append(against(f"{side} px: time per view, {name}", samples, name, goal if name == fast else None))
    return rows
