"""The network against the table of the released code of Chaitanya et al."""

import pytest
import torch
from torch import nn

from clseg.errors import RequestError
from clseg.models import GlobalHead, LocalHead, UNet, transfer
from clseg.settings import NetworkConfig

PUBLISHED = NetworkConfig()
SMALL = NetworkConfig(filters=[2, 3, 4, 5, 6, 7])


def convolutions(module):
    return [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.bias is not None)
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
    ]


def test_layer_widths_are_the_published_ones():
    network = UNet(1, 4, PUBLISHED)
    widths = [1, 16, 32, 64, 128, 128, 128]
    encoder = [(widths[k + (i > 0)], widths[k + 1], 3, True) for k in range(6) for i in range(2)]
    assert convolutions(network.encoder) == encoder
    decoder, inputs = [], 128
    for k, width in enumerate([128, 128, 64, 32, 16]):
        decoder += [(inputs, width, 2, True), (2 * width, width, 3, True)] + (
            [(width, width, 3, True)] if k < 4 else []
        )
        inputs = width
    assert convolutions(network.decoder) == decoder
    assert convolutions(network.output) == [(16, 16, 3, True), (16, 16, 3, True), (16, 4, 3, False)]


def test_parameter_counts():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    network = UNet(1, 4, PUBLISHED)
    encoder = sum(i * o * k * k + o + 2 * o for i, o, k, _ in convolutions(network.encoder))
    assert count(network.encoder) == encoder == 885_552
    assert count(GlobalHead(PUBLISHED, [192, 192])) == 4608 * 1024 + 1024 * 128
    assert count(GlobalHead(PUBLISHED, [160, 160])) == 3200 * 1024 + 1024 * 128
    assert count(LocalHead(PUBLISHED, 3, 3)) == 2 * 64 * 64 + 2 * 64 + 9 * 64 * 128
    assert count(LocalHead(PUBLISHED, 3, 1)) == 2 * 64 * 64 + 2 * 64


@pytest.mark.parametrize(("size", "deepest"), [((192, 192), (6, 6)), ((160, 160), (5, 5)), ((64, 96), (2, 3))])
def test_shapes(size, deepest):
    network = UNet(2, 3, SMALL).eval()
    image = torch.randn(2, 2, *size)
    features = network.encoder(image)
    assert features[-1].shape == (2, 7, *deepest)
    assert network(image).shape == (2, 3, *size)
    assert GlobalHead(SMALL, list(size))(features[-1]).shape == (2, 128)
    for blocks, width in zip(range(1, 6), [6, 5, 4, 3, 2], strict=True):
        feature = network.decoder(features, blocks)
        assert feature.shape == (2, width, size[0] // 2 ** (5 - blocks), size[1] // 2 ** (5 - blocks))
    corners = torch.tensor([[0, 0], [1, 2], [3, 3]])
    feature = network.decoder(features, 3)
    assert LocalHead(SMALL, 3, 3).eval()(feature, corners).shape == (2, 3, 128)
    assert LocalHead(SMALL, 3, 1).eval()(feature, corners).shape == (2, 3, 4)


def test_the_network_of_zeng_et_al():
    config = NetworkConfig(architecture="pcl", filters=[32, 64, 128, 256, 512], norm_momentum=0.1)
    network = UNet(1, 4, config)
    widths = [1, 32, 64, 128, 256, 512]
    assert convolutions(network.encoder) == [
        (widths[k + (i > 0)], widths[k + 1], 3, True) for k in range(5) for i in (0, 1)
    ]
    assert not any(isinstance(m, nn.BatchNorm2d | nn.LeakyReLU) for m in network.encoder.levels[4].modules())
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.01}
    assert [type(block.up) for block in network.decoder.blocks] == [nn.ConvTranspose2d] * 4
    assert convolutions(network.output) == [(32, 4, 1, False)]
    head = GlobalHead(config, [64, 64], "pool")
    assert [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)] == [(512, 512)] * 2
    assert head(network.encoder(torch.randn(2, 1, 64, 64))[-1]).shape == (2, 512)


@pytest.mark.parametrize("architecture", ["glcl", "pcl"])
def test_in_3d_every_layer_has_one_dimension_more(architecture):
    config = NetworkConfig(architecture=architecture, filters=[2, 3, 4, 5])
    network, flat = UNet(1, 3, config, dimensions=3).eval(), UNet(1, 3, config)
    assert network(torch.randn(2, 1, 16, 24, 32)).shape == (2, 3, 16, 24, 32)
    assert list(network.state_dict()) == list(flat.state_dict())
    for name, value in network.state_dict().items():
        same = flat.state_dict()[name]
        assert value.ndim == (5 if same.ndim == 4 else same.ndim), name
    assert GlobalHead(config, [16, 24, 32])(network.encoder(torch.randn(2, 1, 16, 24, 32))[-1]).shape == (2, 128)


def test_initial_weights_are_gaussian_with_he_s_deviation():
    torch.manual_seed(0)
    for module in UNet(1, 4, PUBLISHED).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            fan_in = module.in_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
            assert module.bias.abs().max() == 0


def test_batch_norm_is_the_published_one():
    norms = [m for m in UNet(1, 4, PUBLISHED).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_transfer_copies_parameters_and_running_averages_and_leaves_heads():
    source, target = UNet(1, 4, SMALL), UNet(1, 4, SMALL)
    for _ in range(3):
        source(torch.randn(4, 1, 32, 32))
    weights = {f"encoder.{k}": v for k, v in source.encoder.state_dict().items()} | {
        "head.layers.1.weight": torch.ones(3)
    }
    before = {k: v.clone() for k, v in target.state_dict().items()}
    copied = transfer(target, weights, "weights")
    assert set(copied) == {f"encoder.{k}" for k in source.encoder.state_dict()}
    assert not torch.equal(before[average := "encoder.levels.0.0.1.running_mean"], weights[average])
    for name, value in target.state_dict().items():
        expected = weights[name] if name in copied else before[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"encoder.other": torch.ones(1)}, "encoder.other is not in the network"),
        (lambda w: w | {"encoder.levels.0.0.0.weight": torch.ones(1)}, r"has shape \(1,\)"),
        (lambda w: {"head.layers.1.weight": torch.ones(1)}, r"lacks parameter encoder.levels.0.0.0.weight"),
        (lambda w: w | {"encoder.levels.0.0.0.bias": torch.full([2], torch.nan)}, "NaN"),
    ],
)
def test_transfer_refuses_what_does_not_fit(change, message):
    network = UNet(1, 4, SMALL)
    with pytest.raises(RequestError, match=message):
        transfer(network, change(dict(network.state_dict())), "weights.safetensors")
