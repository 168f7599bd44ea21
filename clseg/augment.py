"""Augmentation of whole batches at once, on the device of the batch; slices [B, C, H, W] or blocks [B, C, D, H, W].

Random numbers are drawn on the CPU from the generator that is passed in: a step gives the same views on every device.
Lengths that the papers give in pixels are kept as fractions of the image side. Blocks are cropped, turned, scaled and
mirrored in the plane, all slices alike, so that they keep their place in the volume; elastic fields go along z, too.
"""

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from clseg.losses import full_precision

REFERENCE_PX = 192
CROP, CORNERS = 100 / REFERENCE_PX, (10 / REFERENCE_PX, 70 / REFERENCE_PX)
BRIGHTNESS, CONTRAST = (-0.3, 0.3), (0.7, 1.3)
CLIP = {"percentiles": (0.0, 1.5), "z_score": (-math.inf, math.inf)}  # by normalisation
ELASTIC_NODES, ELASTIC_SD = 3, 2 * 5 / REFERENCE_PX  # per side; at a node, in units of the [-1, 1] grid

# Zeng et al.: alpha times noise U(-1, 1) smoothed by a Gaussian of sigma pixels, on patches of 352 pixels
PCL_REFERENCE_PX = 352
PCL_ALPHA, PCL_SIGMA_PX, PCL_SHARE, PCL_SCALE = (100.0, 350.0), (14.0, 17.0), 0.67, (0.7, 1.3)
PCL_GRID = 11  # nodes per side: two sigma apart


def uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform numbers in [low, high), on the CPU."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def warp(image: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample image at grid [B, H, W, 2] or [B, D, H, W, 3] in [-1, 1]; zero outside."""
    return F.grid_sample(image, grid.to(image), mode=mode, padding_mode="zeros", align_corners=False)


@lru_cache
def _basis(nodes: int, side: int, mode: str) -> Tensor:
    """Rows of what makes a grid along a side of so many pixels [nodes + 2, side]: what each of `nodes` equally spaced
    nodes is worth there, the first and last at the ends; 1; the places of the pixels' centres in [-1, 1]."""
    rows = [torch.ones(1, side), ((2 * torch.arange(side) + 1) / side - 1)[None]]
    if nodes:
        unit = torch.eye(nodes)[None, :, None] if mode == "bicubic" else torch.eye(nodes)[None]  # [1, n, (1,) n]
        size = (1, side) if mode == "bicubic" else side
        rows.insert(0, F.interpolate(unit, size=size, mode=mode, align_corners=True).reshape(nodes, side))
    return torch.cat(rows)


def sampling_grid(image: Tensor, theta: Tensor, field: Tensor | None = None) -> Tensor:
    """Where each pixel of the images is taken from, [B, *sides, dimensions] in [-1, 1], (x, y) or (x, y, z).

    theta: an affine map of the plane per image [B, 2, 3], output to input; field: displacements [B, dimensions, n, n]
    or [B, dimensions, n, n, n] at nodes that span the image, bicubic (in 3-D linear) between them. Both are products
    of values along the sides, so that one product of small matrices makes the grid, where the images are.
    """
    dimensions, sides = image.ndim - 2, image.shape[2:]
    nodes = 0 if field is None else field.shape[-1]
    one, place = nodes, nodes + 1  # the rows of `_basis` that are no nodes
    core = torch.zeros(len(image), dimensions, *[nodes + 2] * dimensions)
    if field is not None:
        core[(..., *[slice(nodes)] * dimensions)] = field
    plane = core if dimensions == 2 else core[:, :, one]  # [B, dimensions, n + 2, n + 2]
    plane[:, :2, one, place], plane[:, :2, place, one], plane[:, :2, one, one] = theta.unbind(dim=2)
    if dimensions == 3:
        core[:, 2, place, one, one] = 1
    mode = "bicubic" if dimensions == 2 else "linear"
    *z, y, x = (_basis(nodes, side, mode).to(image.device) for side in sides)
    with full_precision(image):
        grid = y.T @ (core.to(image.device) @ x)  # [B, dimensions, (n + 2,) H, W]
        if dimensions == 3:
            grid = (z[0].T @ grid.flatten(3)).unflatten(3, sides[1:])
    return grid.movedim(1, -1)


def crop_resize(image: Tensor, generator: Generator) -> Tensor:
    """One random crop per image, resized to the full size: side 100/192, corner uniform in [10/192, 70/192).

    Source: Chaitanya et al., released code.
    """
    centre = 2 * uniform(*CORNERS, (len(image), 2), generator) + CROP - 1  # of the crop, (row, column), in [-1, 1]
    theta = torch.zeros(len(image), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = CROP
    theta[:, :, 2] = centre.flip(1)
    return warp(image, sampling_grid(image, theta))


def intensity(image: Tensor, generator: Generator, normalisation: str = "percentiles") -> Tensor:
    """Brightness x + U(-0.3, 0.3), then contrast (x - mean) U(0.7, 1.3) + mean, the mean that of each channel, clipped
    to [0, 1.5]; image: float, about 0..1. Z-scores, half of which lie below 0, are not clipped.

    Source: Chaitanya et al., released code. *Deviation*: one draw per image, not one for the whole batch.
    """
    each = (len(image), *[1] * (image.ndim - 1))
    shift, factor = (uniform(*bounds, each, generator).to(image) for bounds in (BRIGHTNESS, CONTRAST))
    mean = image.mean(dim=tuple(range(2, image.ndim)), keepdim=True)
    return (image * factor).add_(mean * (1 - factor) + shift).clamp_(*CLIP[normalisation])


def contrast_view(image: Tensor, generator: Generator, normalisation: str = "percentiles") -> Tensor:
    """A view for global contrast: random crop and resize, then brightness and contrast."""
    return intensity(crop_resize(image, generator), generator, normalisation)


def elastic_nodes(
    image: Tensor, generator: Generator, nodes: int = ELASTIC_NODES, sd: Tensor | float = ELASTIC_SD
) -> Tensor:
    """Random displacements N(0, sd) for `sampling_grid`; sd: one number or one per image.

    Source: Chaitanya et al., released code: 3 x 3 nodes, 5 pixels of 192, upsampled bicubically.
    """
    dimensions = image.ndim - 2
    sd = sd if isinstance(sd, float) else sd.reshape(-1, *[1] * (dimensions + 1))
    return torch.randn((len(image), dimensions, *[nodes] * dimensions), generator=generator) * sd


def _turned(angle: Tensor, scale: Tensor, mirror: Tensor, image: Tensor) -> Tensor:
    """The affine maps [B, 2, 3] that turn, scale and mirror (left to right: -1) images that may not be square."""
    cos, sin, aspect = angle.cos(), angle.sin(), image.shape[-2] / image.shape[-1]
    theta = torch.zeros(len(image), 2, 3)  # output (x, y) -> input (x, y), both in [-1, 1] of their own side
    theta[:, 0, 0], theta[:, 0, 1] = cos * mirror / scale, -sin * aspect / scale
    theta[:, 1, 0], theta[:, 1, 1] = sin * mirror / aspect / scale, cos / scale
    return theta


def warp_label(label: Tensor, grid: Tensor) -> Tensor:
    """Class probabilities [B, K, ...], background first, sampled linearly like their images; outside is background.

    Source: Chaitanya et al., released code, which deforms one-hot labels so.
    """
    organs = warp(label[:, 1:], grid)
    return torch.cat([1 - organs.sum(dim=1, keepdim=True), organs], dim=1)


def finetune_grid(image: Tensor, generator: Generator) -> Tensor:
    """The fine-tuning augmentation of Chaitanya et al. (released code), one per image, as a sampling grid.

    Each image gets one of five with equal probability: rotation U(-15, 15) degrees, scale U(0.95, 1.05), horizontal
    flip (then with probability 1/2), rotation by a random multiple of 45 degrees, nothing. The images from a random
    index U{1..B-2} to the end are also deformed elastically (3 x 3 nodes of N(0, 5/192 of the side)).

    *Deviation*: no brightness and contrast changes, which the released code computes here and drops.
    """
    batch = len(image)
    choice = torch.randint(5, (batch,), generator=generator)
    small = uniform(-math.radians(15), math.radians(15), (batch,), generator)
    eighth = torch.randint(8, (batch,), generator=generator) * (math.pi / 4)
    angle = torch.where(choice == 0, small, torch.where(choice == 3, eighth, torch.zeros(batch)))
    scale = torch.where(choice == 1, uniform(0.95, 1.05, (batch,), generator), torch.ones(batch))
    mirror = torch.where((choice == 2) & (torch.rand(batch, generator=generator) < 0.5), -1.0, 1.0)
    first = int(torch.randint(1, max(batch - 1, 2), (1,), generator=generator))
    field = elastic_nodes(image, generator)
    field[:first] = 0
    return sampling_grid(image, _turned(angle, scale, mirror, image), field)


def spatial_grid(image: Tensor, generator: Generator) -> Tensor:
    """The deformation of Zeng et al., one per image, as a sampling grid.

    Mirrored along each side with probability 1/2; with probability 0.67 turned by U(0, 2π), scaled by U(0.7, 1.3) and
    deformed elastically: alpha U(100, 350) times noise U(-1, 1) smoothed with sigma U(14, 17) pixels of 352.
    Source: Zeng et al., released code (`dataset/`).
    *Deviation*: smooth noise comes from nodes two sigma apart, of the deviation alpha / √3 / (2 √π sigma) that
    smoothing would leave; bilinear sampling, not cubic; no random crop, as the store keeps the centre.
    """
    batch = len(image)
    flips = torch.where(torch.rand((2, batch), generator=generator) < 0.5, -1.0, 1.0)
    moved = torch.rand(batch, generator=generator) < PCL_SHARE
    angle = uniform(0, 2 * math.pi, (batch,), generator) * moved
    scale = torch.where(moved, uniform(*PCL_SCALE, (batch,), generator), torch.ones(batch))
    theta = _turned(angle, scale, flips[0], image)
    theta[:, 1] *= flips[1, :, None]
    alpha, sigma = uniform(*PCL_ALPHA, (batch,), generator), uniform(*PCL_SIGMA_PX, (batch,), generator)
    deviation = alpha / math.sqrt(3) / (2 * math.sqrt(math.pi) * sigma) * moved * (2 / PCL_REFERENCE_PX)
    return sampling_grid(image, theta, elastic_nodes(image, generator, PCL_GRID, deviation))


def spatial_view(image: Tensor, generator: Generator) -> Tensor:
    """A view as Zeng et al. make it: deformed in space, intensities untouched."""
    return warp(image, spatial_grid(image, generator))


def blur(image: Tensor, sigma_px: Tensor) -> Tensor:
    """Images blurred in the plane by a Gaussian each, of these standard deviations [B] in pixels, at most 2."""
    place = torch.arange(-4, 5, device=image.device)
    weight = torch.exp(-0.5 * (place / sigma_px.to(image.device).clamp(min=1e-3)[:, None]).square())  # [B, 9]
    planes_each = image[0, ..., 0, 0].numel()  # channels, in 3-D times slices
    weight = (weight / weight.sum(dim=1, keepdim=True)).to(image).repeat_interleave(planes_each, dim=0)  # [P, 9]
    planes = image.flatten(0, -3)[None]  # [1, P, H, W]
    for kernel, pad in ((weight[:, None, :, None], (0, 0, 4, 4)), (weight[:, None, None, :], (4, 4, 0, 0))):
        planes = F.conv2d(F.pad(planes, pad, mode="replicate"), kernel, groups=len(kernel))
    return planes.reshape(image.shape)


def strong_view(image: Tensor, generator: Generator) -> Tensor:
    """Intensities changed strongly, each image for itself, shapes untouched: with probability 0.8 brightness
    x + U(-0.3, 0.3) and contrast (x - mean) U(0.5, 1.5) + mean, with 0.5 a Gaussian blur of U(0.1, 1.5) pixels.

    image: float, about 0..1. Source: UniMatch (Yang et al., CVPR 2023), its medical scenario.
    *Deviation*: no hue or saturation, which grey images lack; brightness is added, there it is a factor U(0.5, 1.5),
    and the result is clipped; blur in pixels of the network's image, not of 256, and up to 1.5, not 2.
    """
    batch, each = len(image), (len(image), *[1] * (image.ndim - 1))
    changed = torch.rand(each, generator=generator) < 0.8
    shift = uniform(-0.3, 0.3, each, generator) * changed
    factor = torch.where(changed, uniform(0.5, 1.5, each, generator), torch.ones(each))
    sigma_px = uniform(0.1, 1.5, (batch,), generator) * (torch.rand(batch, generator=generator) < 0.5)
    mean = image.mean(dim=tuple(range(2, image.ndim)), keepdim=True)
    shift, factor = shift.to(image), factor.to(image)
    return blur(image * factor + mean * (1 - factor) + shift, sigma_px)


def cutmix_boxes(image: Tensor, generator: Generator, share: float = 0.5) -> Tensor:
    """Where images take the pixels of another one: bool [B, H, W], in 3-D [B, 1, H, W], on the CPU; with probability
    `share` there is a box.

    Its area is U(0.02, 0.4) of the plane, its aspect ratio U(0.3, 1 / 0.3), its place anywhere inside; through all
    slices of a block. Source: CutMix (Yun et al., ICCV 2019) with the boxes of UniMatch.
    """
    batch, (height, width) = len(image), image.shape[-2:]
    area, ratio = uniform(0.02, 0.4, (batch,), generator), uniform(0.3, 1 / 0.3, (batch,), generator)
    there = torch.rand(batch, generator=generator) < share
    inside = []
    for side, part in ((height, (area / ratio).sqrt()), (width, (area * ratio).sqrt())):
        length = (part * side).clamp(max=side)
        first = torch.rand(batch, generator=generator) * (side - length)
        centre = torch.arange(side) + 0.5
        inside.append((centre >= first[:, None]) & (centre < (first + length)[:, None]))  # [B, side]
    box = inside[0][:, :, None] & inside[1][:, None, :] & there[:, None, None]  # [B, H, W]
    return box.reshape(batch, *[1] * (image.ndim - 4), height, width)


FINETUNE_GRIDS = {"published": finetune_grid, "pcl": spatial_grid}
