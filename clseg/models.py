"""The network of Chaitanya et al. (released code): encoder, decoder, output, and two heads for pre-training only.

| part | layers (published filters) |
|---|---|
| encoder level 1..6 | 2 x (conv 3x3, batch norm, ReLU), 16, 32, 64, 128, 128, 128; 2x2 max-pool after levels 1..5 |
| decoder block 1..4 | nearest x2, conv 2x2 BN ReLU, concatenate the skip, 2 x (conv 3x3 BN ReLU), 128, 128, 64, 32 |
| decoder block 5 | the same with one 3x3 convolution, 16 |
| output | 2 x (conv 3x3 BN ReLU), conv 3x3 to classes without bias |
| `GlobalHead` (g1) | flatten, linear 1024, ReLU, linear 128, no biases |
| `LocalHead` (g2) | conv 1x1 BN ReLU, conv 1x1, no biases; K = 3: a shared bias-free linear to 128 per region |
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from clseg.config import NetworkConfig, RequestError
from clseg.losses import region_embeddings

NORM_EPS = 1e-3
LEVELS = 6
EMBEDDING = 128


def _conv(inputs: int, outputs: int, kernel: int, momentum: float) -> nn.Sequential:
    """Convolution with bias, batch norm, ReLU; size kept (even kernels are padded below and right, as released)."""
    pad = [] if kernel % 2 else [nn.ZeroPad2d((kernel // 2 - 1, kernel // 2) * 2)]
    return nn.Sequential(
        *pad,
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 if kernel % 2 else 0),
        nn.BatchNorm2d(outputs, eps=NORM_EPS, momentum=momentum),
        nn.ReLU(inplace=True),
    )


class Encoder(nn.Module):
    """Image [B, C, H, W] to the feature maps of levels 1..6; level k is [B, filters[k-1], H / 2^(k-1), W / 2^(k-1)]."""

    def __init__(self, channels: int, config: NetworkConfig) -> None:
        super().__init__()
        widths = [channels, *config.filters]
        self.levels = nn.ModuleList(
            nn.Sequential(
                _conv(widths[k], widths[k + 1], 3, config.norm_momentum),
                _conv(widths[k + 1], widths[k + 1], 3, config.norm_momentum),
            )
            for k in range(LEVELS)
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [self.levels[0](image)]
        for level in self.levels[1:]:
            features.append(level(self.pool(features[-1])))
        return features


class DecoderBlock(nn.Module):
    """Upsample, merge with the encoder's map of that size, convolve `convolutions` times."""

    def __init__(self, inputs: int, outputs: int, convolutions: int, momentum: float) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.reduce = _conv(inputs, outputs, 2, momentum)
        merged = [_conv(2 * outputs if k == 0 else outputs, outputs, 3, momentum) for k in range(convolutions)]
        self.merge = nn.Sequential(*merged)

    def forward(self, feature: Tensor, skip: Tensor) -> Tensor:
        return self.merge(torch.cat([self.reduce(self.upsample(feature)), skip], dim=1))


class Decoder(nn.Module):
    """Blocks 1..5; `forward(features, blocks=l)` stops after the first l blocks: [B, C_l, H / 2^(5-l), W / 2^(5-l)]."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        widths = config.filters[::-1]
        self.blocks = nn.ModuleList(
            DecoderBlock(widths[k], widths[k + 1], 1 if k == LEVELS - 2 else 2, config.norm_momentum)
            for k in range(LEVELS - 1)
        )

    def forward(self, features: list[Tensor], blocks: int = LEVELS - 1) -> Tensor:
        skips = features[::-1]
        feature = skips[0]
        for block, skip in zip(self.blocks[:blocks], skips[1:], strict=False):
            feature = block(feature, skip)
        return feature


class UNet(nn.Module):
    """Image [B, C, H, W] to logits [B, classes, H, W]; H and W are multiples of 32."""

    def __init__(self, channels: int, classes: int, config: NetworkConfig) -> None:
        super().__init__()
        self.encoder = Encoder(channels, config)
        self.decoder = Decoder(config)
        width = config.filters[0]
        self.output = nn.Sequential(
            _conv(width, width, 3, config.norm_momentum),
            _conv(width, width, 3, config.norm_momentum),
            nn.Conv2d(width, classes, 3, padding=1, bias=False),
        )
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        return self.output(self.decoder(self.encoder(image)))


class GlobalHead(nn.Module):
    """g1: the deepest feature map [B, C, h, w] to an embedding [B, 128]."""

    def __init__(self, config: NetworkConfig, size: list[int]) -> None:
        super().__init__()
        scale = 2 ** (LEVELS - 1)
        flat = config.filters[-1] * (size[0] // scale) * (size[1] // scale)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(flat, 1024, bias=False), nn.ReLU(), nn.Linear(1024, EMBEDDING, bias=False)
        )
        initialise(self)

    def forward(self, feature: Tensor) -> Tensor:
        return self.layers(feature)


class LocalHead(nn.Module):
    """g2: a decoder map [B, C, h, w] and corners [R, 2] to embeddings [B, R, 128] (K = 3) or [B, R, C] (K = 1)."""

    def __init__(self, config: NetworkConfig, blocks: int, size: int) -> None:
        super().__init__()
        width = config.filters[::-1][blocks]
        self.size = size
        self.project = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width, eps=NORM_EPS, momentum=config.norm_momentum),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1, bias=False),
        )
        self.region = nn.Identity() if size == 1 else nn.Linear(size * size * width, EMBEDDING, bias=False)
        initialise(self)

    def forward(self, feature: Tensor, corners: Tensor) -> Tensor:
        return self.region(region_embeddings(self.project(feature), corners, self.size))


def initialise(module: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / fan_in), zero biases (named "xavier" in the released code)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def transfer(network: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> list[str]:
    """Copy pre-trained parameters into the network; returns their names.

    Heads (`head.*`) stay behind and so do batch-norm running averages, which restart as in the released code.
    Raises `RequestError` where a parameter is unknown, has another shape, or nothing at all fits.
    """
    own = dict(network.named_parameters())
    averages = {name for name, _ in network.named_buffers()}
    copied = []
    for name, value in weights.items():
        if name.startswith("head.") or name in averages:
            continue
        if name not in own:
            raise RequestError(
                f"{source}: parameter {name} is not in the network; use weights of the same architecture"
            )
        if own[name].shape != value.shape:
            raise RequestError(
                f"{source}: parameter {name} has shape {tuple(value.shape)}, the network needs {tuple(own[name].shape)}"
            )
        with torch.no_grad():
            own[name].copy_(value)
        copied.append(name)
    if not copied:
        raise RequestError(f"{source}: holds no parameter of this network; use weights of a pre-training run")
    return copied
