"""Networks: the U-Nets of two papers in 2-D and 3-D, heads that serve pre-training only, and the beta-VAE.

| | `glcl` (Chaitanya et al., released code) | `pcl` (Zeng et al., released code) |
|---|---|---|
| encoder level | 2 x (conv 3, batch norm, ReLU), max-pool 2 | with LeakyReLU; the last with ReLU and no norm |
| decoder block, up | nearest x2, conv 2 BN ReLU | transposed conv 2 |
| then, with the skip | 2 x (conv 3 BN ReLU), in the last block 1 x | 2 x (conv 3 BN LeakyReLU) |
| output | 2 x (conv 3 BN ReLU), conv 3 without bias | conv 1 without bias |

B images of C channels are [B, C, H, W], in 3-D [B, C, D, H, W]; every side is a multiple of `NetworkConfig.coarsest`.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from clseg.errors import RequestError
from clseg.regions import region_embeddings
from clseg.settings import NetworkConfig

EMBEDDING = {"flatten": 128, "pool": 512}
SLOPE = 0.01  # of LeakyReLU in `pcl`

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEAN = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class _Build:
    """The layers that two architectures and two dimensions make of one plan."""

    def __init__(self, config: NetworkConfig, dimensions: int) -> None:
        self.config, self.dimensions, self.published = config, dimensions, config.architecture == "glcl"

    def conv(self, inputs: int, outputs: int, kernel: int, norm: bool = True) -> nn.Sequential:
        """Convolution with bias, batch norm, activation; size kept (even kernels: padded at the end, as released)."""
        before = (kernel // 2 - 1, kernel // 2) * self.dimensions
        pad = [] if kernel % 2 else [nn.ZeroPad2d(before) if self.dimensions == 2 else nn.ConstantPad3d(before, 0.0)]
        conv = CONV[self.dimensions](inputs, outputs, kernel, padding=kernel // 2 if kernel % 2 else 0)
        active = nn.LeakyReLU(SLOPE, inplace=True) if norm and not self.published else nn.ReLU(inplace=True)
        return nn.Sequential(*pad, conv, *([self.norm(outputs)] if norm else []), active)

    def norm(self, width: int) -> nn.Module:
        eps = 1e-3 if self.published else 1e-5
        return NORM[self.dimensions](width, eps=eps, momentum=self.config.norm_momentum)

    def convs(self, inputs: int, outputs: int, count: int = 2, norm: bool = True) -> nn.Sequential:
        return nn.Sequential(*(self.conv(outputs if k else inputs, outputs, 3, norm) for k in range(count)))

    def up(self, inputs: int, outputs: int) -> nn.Module:
        if self.published:
            return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), self.conv(inputs, outputs, 2))
        return TRANSPOSED[self.dimensions](inputs, outputs, 2, stride=2)


class Encoder(nn.Module):
    """Images to the feature maps of all levels; level k is [B, filters[k-1], side / 2^(k-1), ...]."""

    def __init__(self, channels: int, config: NetworkConfig, dimensions: int = 2) -> None:
        super().__init__()
        build, widths = _Build(config, dimensions), list(pairwise([channels, *config.filters]))
        normed = [True] * (len(widths) - 1) + [build.published]
        self.levels = nn.ModuleList(build.convs(*width, norm=norm) for width, norm in zip(widths, normed, strict=True))
        self.pool = POOL[dimensions](2)
        self.memory_format = torch.channels_last if dimensions == 2 else torch.channels_last_3d

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [self.levels[0](image.contiguous(memory_format=self.memory_format))]
        for level in self.levels[1:]:
            features.append(level(self.pool(features[-1])))
        return features


class DecoderBlock(nn.Module):
    """Upsample, merge with the encoder's map of that size, convolve."""

    def __init__(self, build: _Build, inputs: int, outputs: int, convolutions: int) -> None:
        super().__init__()
        self.up = build.up(inputs, outputs)
        self.merge = build.convs(2 * outputs, outputs, convolutions)

    def forward(self, feature: Tensor, skip: Tensor) -> Tensor:
        return self.merge(torch.cat([self.up(feature), skip], dim=1))


class Decoder(nn.Module):
    """Blocks 1..L-1 for L levels; `forward(features, blocks=l)` stops after the first l: [B, C_l, side / 2^(L-1-l)]."""

    def __init__(self, config: NetworkConfig, dimensions: int = 2) -> None:
        super().__init__()
        build, widths = _Build(config, dimensions), list(pairwise(config.filters[::-1]))
        counts = [2] * (len(widths) - 1) + [1 if build.published else 2]
        self.blocks = nn.ModuleList(DecoderBlock(build, *w, count) for w, count in zip(widths, counts, strict=True))

    def forward(self, features: list[Tensor], blocks: int | None = None) -> Tensor:
        feature, *skips = features[::-1]
        for block, skip in zip(self.blocks[:blocks], skips, strict=False):
            feature = block(feature, skip)
        return feature


def output_layers(classes: int, config: NetworkConfig, dimensions: int = 2) -> nn.Sequential:
    """From the finest decoder map to `classes` channels."""
    build, width = _Build(config, dimensions), config.filters[0]
    before, kernel = (build.convs(width, width), 3) if build.published else ([], 1)
    return nn.Sequential(*before, CONV[dimensions](width, classes, kernel, padding=kernel // 2, bias=False))


class UNet(nn.Module):
    """Images to logits [B, classes, ...] of the same sides."""

    def __init__(self, channels: int, classes: int, config: NetworkConfig, dimensions: int = 2) -> None:
        super().__init__()
        self.config, self.dimensions = config, dimensions
        self.encoder = Encoder(channels, config, dimensions)
        self.decoder = Decoder(config, dimensions)
        self.output = output_layers(classes, config, dimensions)
        initialise(self, config)

    def forward(self, image: Tensor) -> Tensor:
        return self.output(self.decoder(self.encoder(image)))

    def placed(self, device: torch.device) -> "UNet":
        """Itself on the device, weights with the channels last: two thirds more speed on a CPU."""
        return self.to(device).to(memory_format=self.encoder.memory_format)


class GlobalHead(nn.Module):
    """The deepest feature map to an embedding [B, E]; `size`: sides of the image in pixels.

    `flatten` (g1 of Chaitanya et al.): linear 1024, ReLU, linear 128, no biases. `pool` (Zeng et al.): the mean over
    all places, linear of the same width, ReLU, linear 512.
    """

    def __init__(self, config: NetworkConfig, size: list[int], kind: str = "flatten") -> None:
        super().__init__()
        width, embedding = config.filters[-1], EMBEDDING[kind]
        if kind == "flatten":
            width *= prod(side // config.coarsest for side in size)
            linear = nn.Linear(width, 1024, bias=False), nn.Linear(1024, embedding, bias=False)
            layers = [nn.Flatten(), linear[0], nn.ReLU(), linear[1]]
        else:
            linear = nn.Linear(width, width), nn.Linear(width, embedding)
            layers = [MEAN[len(size)](1), nn.Flatten(), linear[0], nn.ReLU(), linear[1]]
        self.layers = initialise(nn.Sequential(*layers), config)

    def forward(self, feature: Tensor) -> Tensor:
        return self.layers(feature)


class LocalHead(nn.Module):
    """g2: a decoder map [B, C, h, w] and corners [R, 2] to embeddings [B, R, 128] (K = 3) or [B, R, C] (K = 1).

    conv 1 BN ReLU, conv 1; K = 3: a linear layer that all regions share; no biases. Source: Chaitanya et al.
    """

    def __init__(self, config: NetworkConfig, blocks: int, size: int) -> None:
        super().__init__()
        width, self.size = config.filters[::-1][blocks], size
        norm, point = _Build(config, 2).norm(width), [nn.Conv2d(width, width, 1, bias=False) for _ in range(2)]
        self.project = nn.Sequential(point[0], norm, nn.ReLU(inplace=True), point[1])
        self.region = nn.Identity() if size == 1 else nn.Linear(size**2 * width, EMBEDDING["flatten"], bias=False)
        initialise(self, config)

    def forward(self, feature: Tensor, corners: Tensor) -> Tensor:
        return self.region(region_embeddings(self.project(feature), corners, self.size))


def initialise(module: nn.Module, config: NetworkConfig) -> nn.Module:
    """Gaussian weights of standard deviation gain / sqrt(fan_in), zero biases; gain² = 2 ("xavier" in the code of
    Chaitanya et al.) or 2 / (1 + 0.01²) (Zeng et al.). Returns the module."""
    slope = 0.0 if config.architecture == "glcl" else SLOPE
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, a=slope)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def transfer(network: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> list[str]:
    """Copy pre-trained parameters of encoder and decoder into the network; returns their names.

    Batch-norm running averages go along; all else (heads, the auto-encoder) stays behind. Raises `RequestError` where
    one is unknown, has another shape or values that are not finite, or one of the encoder is missing.
    Source: released code of Zeng et al. *Deviation*: in that of Chaitanya et al. running averages restart; where they
    started no longer matters after some hundreds of steps with their decay of .99, some tens with .9 (`laptop`).
    """
    own = network.state_dict()
    names = [name for name in weights if name.startswith(("encoder.", "decoder."))]
    for name in names:
        about, shape = f"{source}: parameter {name}", tuple(weights[name].shape)
        if name not in own:
            raise RequestError(f"{about} is not in the network; use weights of the same architecture")
        if own[name].shape != shape:
            needed = f"the network needs {tuple(own[name].shape)}"
            raise RequestError(f"{about} has shape {shape}, {needed}; use weights of the same architecture")
        if not weights[name].isfinite().all():
            raise RequestError(f"{about} holds values that are NaN or infinite; use the weights of a finished run")
        with torch.no_grad():
            own[name].copy_(weights[name])
    if missing := [name for name in own if name.startswith("encoder.") and name not in weights]:
        raise RequestError(f"{source}: lacks parameter {missing[0]}; use the weights of a finished pre-training")
    return names


class BetaVAE(nn.Module):
    """Images [B, C, *size] to the normal distributions of their features z [B, latent], and features to images.

    A level is a convolution and a ReLU, of width 32 (the first two) or 64, and the decoder mirrors it: kernel 4 and
    stride 2 along sides that stay 4 or more, kernel 3 along the others. There are as many levels as halve a side.
    Source: Higgins et al., ICLR 2017, the layers for CelebA without their hidden linear one, for any size, 2-D and 3-D.
    *Deviation*: the layers that Zhang et al. used are not known.
    """

    def __init__(self, channels: int, size: Sequence[int], latent: int) -> None:
        super().__init__()
        dimensions, down, up, width = len(size), [], [], channels
        while 2 in (strides := [2 if side % 2 == 0 and side >= 8 else 1 for side in size]):
            outputs, kernel = 32 if len(down) < 4 else 64, [stride + 2 for stride in strides]
            down += [CONV[dimensions](width, outputs, kernel, strides, padding=1), nn.ReLU()]
            up = [nn.ReLU(), TRANSPOSED[dimensions](outputs, width, kernel, strides, padding=1), *up]
            width, size = outputs, [side // stride for side, stride in zip(size, strides, strict=True)]
        features = width * prod(size)
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(features, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, features), nn.Unflatten(1, (width, *size)), *up)
        initialise(self, NetworkConfig())

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, latent] of the features, float32."""
        return self.encoder(image).float().chunk(2, dim=1)

    def decode(self, feature: Tensor) -> Tensor:
        """Images [B, C, *size], float32."""
        return self.decoder(feature).float()
