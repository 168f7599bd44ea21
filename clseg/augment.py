"""Augmentation of whole batches at once, on the device of the batch.

Random numbers are drawn on the CPU from the generator that is passed in: a step gives the same views on every device.
Lengths that the papers give in pixels of a 192-pixel image are kept as fractions of the image side.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

REFERENCE_PX = 192
CROP = 100 / REFERENCE_PX
CORNERS = (10 / REFERENCE_PX, 70 / REFERENCE_PX)
CLIP = (0.0, 1.5)
ELASTIC_SIGMA = 5 / REFERENCE_PX
ELASTIC_GRID = 3


def uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform numbers in [low, high), on the CPU."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def warp(image: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample image [B, C, H, W] at grid [B, H, W, 2] in [-1, 1]; zero outside."""
    return F.grid_sample(image, grid.to(image), mode=mode, padding_mode="zeros", align_corners=False)


def crop_resize(image: Tensor, generator: Generator) -> Tensor:
    """One random crop per image, resized to the full size: side 100/192, corner uniform in [10/192, 70/192).

    image [B, C, H, W] float -> the same shape. Source: Chaitanya et al., released code.
    """
    corner = uniform(*CORNERS, (len(image), 2), generator)
    centre = 2 * corner + CROP - 1  # of the crop, (row, column), in [-1, 1]
    theta = torch.zeros(len(image), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = CROP
    theta[:, :, 2] = centre.flip(1)
    return warp(image, F.affine_grid(theta, list(image.shape), align_corners=False))


def intensity(
    image: Tensor,
    generator: Generator,
    brightness: float = 0.3,
    contrast: tuple[float, float] = (0.7, 1.3),
) -> Tensor:
    """Brightness x + U(-b, b), then contrast (x - mean) c + mean with the mean of each channel, clipped to [0, 1.5].

    image [B, C, H, W] float, about 0..1 -> the same shape. Source: Chaitanya et al., released code.
    *Deviation*: one draw per image; the released code draws once for the whole batch.
    """
    shift = uniform(-brightness, brightness, (len(image), 1, 1, 1), generator).to(image)
    factor = uniform(*contrast, (len(image), 1, 1, 1), generator).to(image)
    shifted = image + shift
    mean = shifted.mean(dim=(2, 3), keepdim=True)
    return ((shifted - mean) * factor + mean).clamp(*CLIP)


def contrast_view(image: Tensor, generator: Generator) -> Tensor:
    """A view for global contrast: random crop and resize, then brightness and contrast."""
    return intensity(crop_resize(image, generator), generator)


def elastic_field(batch: int, size: tuple[int, int], generator: Generator) -> Tensor:
    """Smooth displacements [B, H, W, 2] in units of the [-1, 1] grid.

    A 3 x 3 grid of N(0, 5/192 of the side), upsampled bicubically. Source: Chaitanya et al., released code.
    """
    coarse = torch.randn((batch, 2, ELASTIC_GRID, ELASTIC_GRID), generator=generator) * (2 * ELASTIC_SIGMA)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def finetune_views(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """The published fine-tuning augmentation, the same deformation for image and label.

    Each image gets one of five with equal probability: rotation U(-15, 15) degrees, scale U(0.95, 1.05), horizontal
    flip (then with probability 1/2), rotation by a random multiple of 45 degrees, nothing. The images from a random
    index U{1..B-2} to the end are also deformed elastically.

    image [B, C, H, W] float, label [B, H, W] int64 -> the same shapes. Source: Chaitanya et al., released code.
    *Deviation*: the released code computes brightness and contrast changes here and drops them; they are left out.
    """
    batch, _, height, width = image.shape
    choice = torch.randint(5, (batch,), generator=generator)
    small = uniform(-math.radians(15), math.radians(15), (batch,), generator)
    eighth = torch.randint(8, (batch,), generator=generator) * (math.pi / 4)
    angle = torch.where(choice == 0, small, torch.where(choice == 3, eighth, torch.zeros(batch)))
    scale = torch.where(choice == 1, uniform(0.95, 1.05, (batch,), generator), torch.ones(batch))
    flip = torch.where((choice == 2) & (torch.rand(batch, generator=generator) < 0.5), -1.0, 1.0)
    cos, sin, aspect = angle.cos(), angle.sin(), height / width
    theta = torch.zeros(batch, 2, 3)  # output (x, y) -> input (x, y), both in [-1, 1] of their own side
    theta[:, 0, 0], theta[:, 0, 1] = cos * flip / scale, -sin * aspect / scale
    theta[:, 1, 0], theta[:, 1, 1] = sin * flip / aspect / scale, cos / scale
    grid = F.affine_grid(theta, [batch, 1, height, width], align_corners=False)
    first = int(torch.randint(1, max(batch - 1, 2), (1,), generator=generator))
    field = elastic_field(batch, (height, width), generator)
    field[:first] = 0
    grid = grid + field
    warped = warp(label[:, None].to(image.dtype), grid, mode="nearest")[:, 0]
    return warp(image, grid), warped.to(label.dtype)
