"""Pretext tasks: slices are changed in a way that is known, and the network says how, or undoes it. 2-D only.

The code of Chaitanya et al. has helpers that make the inputs of the first three (named below) but no loss and no script
that trains on them; PIRL, which Zeng et al. compare with, is not in their code.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clseg.augment import intensity
from clseg.data.store import fit
from clseg.errors import RequestError
from clseg.loop import Training, Work
from clseg.models import EMBEDDING, initialise, output_layers
from clseg.settings import ContextRestorationStage, InpaintingStage, NetworkConfig, PirlStage, RotationStage
from clseg.stages.sampling import random_batch, random_slices


def _pooled(config: NetworkConfig, outputs: int) -> nn.Module:
    """The deepest feature map, averaged over its pixels, to `outputs` numbers by a linear layer."""
    layers = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(config.filters[-1], outputs)
    return initialise(nn.Sequential(*layers), config)


def turns(image: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, H] turned by 0, 90, 180 and 270 degrees, turn after turn [4 B, C, H, H], and how often by 90."""
    turned = torch.cat([image.rot90(k, (2, 3)) for k in range(4)])
    return turned, torch.arange(4, device=image.device).repeat_interleave(len(image))


def rotation(work: Work, _stage: RotationStage) -> Training:
    """Cross-entropy of the four turns of a slice, all four in one batch; trains the encoder and a linear classifier.

    Raises `RequestError` where images are not square.
    Source: Gidaris et al., ICLR 2018, eq. 2 and 3; `create_rotated_imgs` of Chaitanya et al.
    *Deviation*: slices are changed in brightness and contrast before they are turned, not cropped and mirrored.
    """
    encoder, (height, width) = work.network.encoder, work.store.size
    if height != width:
        raise RequestError(f"geometry.size: rotation needs square images, not {work.store.size}; choose equal sides")
    head = _pooled(work.network.config, 4).to(work.device)

    def draw(step: int) -> tuple[Tensor]:
        image, generator = random_batch(work, "rotation", step)
        return (intensity(image, generator, work.store.normalisation),)

    def loss(image: Tensor) -> Tensor:
        turned, label = turns(image)
        return F.cross_entropy(head(encoder(turned)[-1]).float(), label)

    return Training({"encoder": encoder, "head": head}, draw, loss)


def _restoring(work: Work, spoil: Callable[[Tensor, Generator], tuple[Tensor, Tensor]]) -> Training:
    """Trains encoder, decoder and output layers to restore slices, not augmented, from what `spoil(image, generator)`
    leaves: spoilt images and a bool mask [B, 1, H, W] of the pixels whose square error counts."""
    network = work.network
    head = initialise(output_layers(work.store.channels, network.config), network.config).to(work.device)

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor]:
        image, generator = random_batch(work, "restoring", step)
        return image, *spoil(image, generator)

    def loss(image: Tensor, spoilt: Tensor, counts: Tensor) -> Tensor:
        restored = head(network.decoder(network.encoder(spoilt))).float()
        return (restored - image).square().mul(counts).sum() / counts.expand_as(image).sum()

    return Training({"encoder": network.encoder, "decoder": network.decoder, "head": head}, draw, loss)


def box_mask(images: int, size: Sequence[int], stage: InpaintingStage, generator: Generator) -> Tensor:
    """The box of every image, bool [B, 1, H, W]: `box` times each side, in the centre or anywhere inside."""
    inside = []
    for side in size:
        length, place = max(round(stage.box * side), 1), torch.arange(side)
        first = torch.full((images, 1), (side - length) // 2)
        if stage.place == "random":
            first = torch.randint(side - length + 1, (images, 1), generator=generator)
        inside.append((place >= first) & (place < first + length))  # [B, side]
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def inpainting(work: Work, stage: InpaintingStage) -> Training:
    """Mean square error inside a box that was set to 0; trains encoder, decoder and output layers.

    Source: Pathak et al., CVPR 2016, eq. 1, the reconstruction loss; `create_inpaint_box` of Chaitanya et al.: 100
    pixels of 192, set to 0, anywhere (their default) or in the centre.
    *Deviation*: without the adversarial loss of Pathak et al. (weight 0.001) and their tenfold weight along the seam of
    the box; their network has no skip connections.
    """

    def spoil(image: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        hidden = box_mask(len(image), image.shape[2:], stage, generator).to(image.device)
        return image.masked_fill(hidden, 0.0), hidden

    return _restoring(work, spoil)


def patch_swaps(images: int, size: Sequence[int], stage: ContextRestorationStage, generator: Generator) -> Tensor:
    """The pixel each pixel takes its value from, int64 [B, H W]: `swaps` pairs of patches change places.

    Patches are cells of a lattice with a random origin; their side is `patch` times the shorter one of the image, at
    least 4 pixels. Raises `RequestError` where so many do not fit.
    """
    side = max(round(stage.patch * min(size)), 4)
    down, across = (length // side - 1 for length in size)  # cells; one less than fit, so that the origin can move
    if down * across < 2 * stage.swaps:
        raise RequestError(f"stages: {2 * stage.swaps} patches of {side} pixels do not fit; lower swaps or patch")
    cell = torch.rand((images, down * across), generator=generator).topk(2 * stage.swaps).indices  # [B, 2 S]
    room = size[0] - down * side + 1, size[1] - across * side + 1
    top, left = (torch.randint(places, (images, 1), generator=generator) for places in room)
    row, column = top + cell // across * side, left + cell % across * side  # [B, 2 S] each
    corner, step = row * size[1] + column, torch.arange(side)
    pixel = corner[..., None] + (step[:, None] * size[1] + step).flatten()  # [B, 2 S, side²]
    first, second = pixel.flatten(1).chunk(2, dim=1)  # [B, S side²] each
    source = torch.arange(size[0] * size[1]).repeat(images, 1)
    return source.scatter_(1, first, second).scatter_(1, second, first)


def rearrange(image: Tensor, source: Tensor) -> Tensor:
    """Images [B, C, H, W] with every pixel taken from where `source` [B, H W] says."""
    return image.flatten(2).gather(2, source[:, None].expand(-1, image.shape[1], -1)).reshape(image.shape)


def context_restoration(work: Work, stage: ContextRestorationStage) -> Training:
    """Mean square error of slices restored from swapped patches; trains encoder, decoder and output layers.

    Source: Chen et al., Medical Image Analysis 2019; `context_restoration` of Chaitanya et al.: 10 swaps, 5 x 5 of 192.
    *Deviation*: all patches are disjoint, not only the two of a pair; they have 4 pixels or more, as smaller ones of a
    small image hold no context.
    """

    def spoil(image: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        source = patch_swaps(len(image), image.shape[2:], stage, generator).to(image.device)
        return rearrange(image, source), torch.ones(1, dtype=torch.bool, device=image.device)

    return _restoring(work, spoil)


def jigsaw(image: Tensor, grid: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The patches of images, shuffled [B, grid², C, h, w], and the place of each, counted row by row [B, grid²]; sides
    that `grid` does not divide are cropped around the centre."""
    height, width = (side // grid for side in image.shape[2:])
    image = fit(image, (height * grid, width * grid))
    patches = image.unfold(2, height, height).unfold(3, width, width)  # [B, C, grid, grid, h, w]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # [B, grid², C, h, w]
    order = torch.rand((len(image), grid * grid), generator=generator).argsort(dim=1)
    return patches[torch.arange(len(image))[:, None], order.to(image.device)], order


class PirlHead(nn.Module):
    """f and g: feature maps of B images, and of their patches in the order of the puzzle, to embeddings [B, 128]."""

    def __init__(self, config: NetworkConfig, patches: int) -> None:
        super().__init__()
        width = EMBEDDING["flatten"]
        self.image, self.patch = _pooled(config, width), _pooled(config, width)
        self.puzzle = initialise(nn.Linear(patches * width, width), config)

    def forward(self, image: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image).float(), self.puzzle(self.patch(patches).reshape(len(image), -1)).float()


class Memory(nn.Module):
    """The memory bank: the running average of the direction of every slice's embedding, at first random."""

    def __init__(self, slices: int) -> None:
        super().__init__()
        self.register_buffer("bank", F.normalize(torch.randn(slices, EMBEDDING["flatten"]), dim=1))

    def others(self, index: Tensor, count: int, generator: Generator) -> Tensor:
        """For each slice [B] `count` different others, or all where there are fewer; int64 [B, K], on the CPU."""
        chance = torch.rand((len(index), len(self.bank)), generator=generator).scatter_(1, index[:, None], -1.0)
        return chance.topk(min(count, len(self.bank) - 1)).indices

    def loss(self, embedding: Tensor, index: Tensor, others: Tensor, temperature: float) -> Tensor:
        """Mean over slices i of -log( e^{s(z_i, m_i)} / (e^{s(z_i, m_i)} + Σ_{k ∈ others(i)} e^{s(z_i, m_k)}) )."""
        known = F.normalize(self.bank[torch.cat([index[:, None], others], dim=1)], dim=2)  # [B, 1 + K, D]
        similarity = (F.normalize(embedding, dim=1)[:, None] * known).sum(dim=2) / temperature  # [B, 1 + K]
        return F.cross_entropy(similarity, torch.zeros_like(index))

    @torch.no_grad()
    def update(self, embedding: Tensor, index: Tensor, momentum: float) -> None:
        """m_i <- momentum m_i + (1 - momentum) z_i / |z_i|."""
        self.bank[index] = self.bank[index].lerp(F.normalize(embedding, dim=1), 1 - momentum)


def pirl(work: Work, stage: PirlStage) -> Training:
    """λ L(g(puzzle of x_i), m_i) + (1 - λ) L(f(x_i), m_i), λ `weight`, L `Memory.loss`; trains encoder, f and g.

    Patches pass the encoder one by one, resized up to a multiple of its coarsest pixel. Image and puzzle are changed in
    brightness and contrast, each for itself. The bank holds the slices of `rows`.
    Source: Misra & van der Maaten, CVPR 2020, eq. 3 to 5; 3 x 3 patches, momentum 0.5, temperature 0.07, λ = 0.5.
    *Deviation*: L is InfoNCE, without the published sum of log(1 - h) over negatives; 1024 of them, not 32,000, or all
    other slices where there are fewer; no random crops.
    """
    network, store, rows, device = work.network, work.store, work.rows, work.device
    if stage.grid > min(store.size):
        raise RequestError(f"stages: grid {stage.grid} is more than the pixels of {store.size}; lower grid")
    coarsest = network.config.coarsest
    head, memory = PirlHead(network.config, stage.grid**2).to(device), Memory(len(rows)).to(device)
    patch_size = [-(-(side // stage.grid) // coarsest) * coarsest for side in store.size]

    def draw(step: int) -> list[Tensor]:
        generator = work.generator("pirl", step)
        chosen = random_slices(np.arange(len(rows)), work.slices, generator)
        image, index = store.batch(rows[chosen], device).image, torch.from_numpy(chosen)
        others, index = memory.others(index, stage.negatives, generator).to(device), index.to(device)
        patches, _ = jigsaw(intensity(image, generator, store.normalisation), stage.grid, generator)
        patches = F.interpolate(patches.flatten(0, 1), patch_size, mode="bilinear", align_corners=False)
        return [intensity(image, generator, store.normalisation), patches, index, others]

    def loss(image: Tensor, patches: Tensor, index: Tensor, others: Tensor) -> Tensor:
        whole, puzzle = head(network.encoder(image)[-1], network.encoder(patches)[-1])
        of_whole, of_puzzle = (memory.loss(z, index, others, stage.temperature) for z in (whole, puzzle))
        memory.update(whole, index, stage.momentum)
        return stage.weight * of_puzzle + (1 - stage.weight) * of_whole

    return Training({"encoder": network.encoder, "head": head}, draw, loss, state={"memory": memory})
