"""The layers against their definitions; the published depth and names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vq.networks.resnet import (
    FOLDED_FROM,
    Attention,
    Downsample,
    Norm,
    ResnetBlock,
    ResnetDecoder,
    ResnetEncoder,
    SpatialNorm,
    Upsample,
)

SIZES = {
    "channels": 3, "z_channels": 5, "width": 4, "multipliers": (1, 2, 3), "residual_blocks": 2,
    "attention_levels": (1,), "norm_groups": 2,
}  # fmt: skip


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.5)
    return module


def make_norm(channels: int) -> Norm:
    return Norm(channels, 2)


def test_swish_of_a_norm_is_that_of_pytorch_in_value_and_gradient():
    norm = randomised(Norm(6, 3))
    x, cotangent = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    results = []
    for swish in (norm.swish, lambda x: F.silu(F.group_norm(x, 3, norm.weight, norm.bias, eps=1e-6))):
        leaf = x.clone().requires_grad_()
        value = swish(leaf)
        results.append([value, *torch.autograd.grad(value, [leaf, norm.weight, norm.bias], cotangent)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(norm(x, x), F.group_norm(x, 3, norm.weight, norm.bias, eps=1e-6))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_behind_the_swish_of_a_norm_is_that_of_pytorch_in_value_and_gradient(kernel):
    norm, convolution = randomised(Norm(6, 3)), randomised(nn.Conv2d(6, 4, kernel, padding=kernel // 2))
    x, cotangent = torch.randn(2, 6, 4, 5), torch.randn(2, 4, 4, 5)
    plain = nn.GroupNorm(3, 6, eps=1e-6)
    plain.load_state_dict(norm.state_dict())
    results = []
    for function, used in (
        (lambda x: norm.swish_convolution(x, convolution), norm),
        (lambda x: convolution(F.silu(plain(x))), plain),
    ):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        weights = [leaf, *used.parameters(), *convolution.parameters()]
        results.append([value, *torch.autograd.grad(value, weights, cotangent)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    convolution.requires_grad_(False)  # as in a model that is only gone through
    leaf = x.clone().requires_grad_()
    norm.swish_convolution(leaf, convolution).backward(cotangent)
    torch.testing.assert_close(leaf.grad, results[1][1], atol=1e-5, rtol=1e-4)
    assert convolution.weight.grad is None


def test_swish_of_a_norm_keeps_its_input_alone():
    norm, x = Norm(8, 2), torch.randn(2, 8, 16, 16, requires_grad=True)
    convolution = nn.Conv2d(8, 8, 3, padding=1)

    def kept(swish) -> int:
        """Number of tensors as large as x that the backward pass waits with."""
        large: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: large.append(tensor.numel()) or tensor, lambda saved: saved
        ):
            swish(x * 1)
        return sum(numel == x.numel() for numel in large)

    assert kept(norm.swish) == 1
    assert kept(lambda x: F.silu(norm(x))) == 2
    assert kept(lambda x: norm.swish_convolution(x, convolution)) == 1
    assert kept(lambda x: convolution(F.silu(norm(x)))) == 3


def test_swish_of_a_norm_takes_any_memory_layout_and_bfloat16():
    norm = randomised(Norm(6, 3))
    x = torch.randn(2, 6, 4, 5)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    norm.swish(last).sum().backward()
    plain = x.clone().requires_grad_()
    norm.swish(plain).sum().backward()
    torch.testing.assert_close(last.grad, plain.grad)
    half = x.bfloat16().requires_grad_()
    assert norm.swish(half).dtype == torch.bfloat16
    norm.swish(half).float().sum().backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.float(), plain.grad, atol=0.1, rtol=0.1)


def test_a_convolution_behind_the_swish_of_a_norm_under_autocast():
    norm, convolution = randomised(Norm(6, 3)), randomised(nn.Conv2d(6, 4, 3, padding=1))
    x, gradients = torch.randn(2, 6, 4, 5), []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = norm.swish_convolution(leaf, convolution)
        assert value.dtype == (torch.bfloat16 if enabled else torch.float32)
        value.float().sum().backward()
        gradients.append([leaf.grad, convolution.weight.grad, norm.weight.grad])
        norm.weight.grad = convolution.weight.grad = None
    for half, full in zip(gradients[1], gradients[0], strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, atol=0.3, rtol=0.05)


def test_a_spatial_norm_scales_and_shifts_by_the_code_vector_above_each_place():
    norm = randomised(SpatialNorm(6, 3, latent_channels=4))
    x, z_q = torch.randn(2, 6, 8, 12), torch.randn(2, 4, 4, 3)
    enlarged = F.interpolate(z_q, size=(8, 12), mode="nearest")
    expected = norm.norm_layer(x) * norm.conv_y(enlarged) + norm.conv_b(enlarged)
    torch.testing.assert_close(norm(x, z_q), expected)
    torch.testing.assert_close(norm.swish(x, z_q), F.silu(expected))


def test_attention_is_a_softmax_over_all_places():
    attention, x = randomised(Attention(6, make_norm)), torch.randn(2, 6, 3, 4)
    q, k, v = (conv(attention.norm(x)).flatten(2) for conv in (attention.q, attention.k, attention.v))  # b c n
    weights = torch.einsum("bci,bcj->bij", q, k).div(6**0.5).softmax(dim=2)
    expected = x + attention.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels_out", [4, 6])
def test_a_residual_block_is_its_formula(channels_out):
    block, x = randomised(ResnetBlock(4, channels_out, make_norm)), torch.randn(2, 4, 5, 5)
    hidden = block.conv1(F.silu(block.norm1(x)))
    shortcut = x if channels_out == 4 else block.nin_shortcut(x)
    torch.testing.assert_close(block(x), shortcut + block.conv2(F.silu(block.norm2(hidden))))
    assert ("nin_shortcut.weight" in block.state_dict()) == (channels_out == 6)


def places_seen(layer: nn.Module, size: int, place: tuple[int, int]) -> Tensor:
    """Rows and columns of the input, n 2, that the output's `place` depends on."""
    x = torch.randn(1, 2, size, size, requires_grad=True)
    layer(x)[0, 0, place[0], place[1]].backward()
    return x.grad.abs().sum(dim=(0, 1)).nonzero()


def test_downsampling_looks_at_the_place_and_to_the_right_and_below():
    layer = Downsample(2)
    assert layer(torch.zeros(1, 2, 6, 8)).shape == (1, 2, 3, 4)
    seen = places_seen(layer, 6, (1, 0))
    assert (seen.amin(0).tolist(), seen.amax(0).tolist()) == ([2, 0], [4, 2])
    seen = places_seen(layer, 6, (2, 2))  # at the border what lies outside is zero
    assert (seen.amin(0).tolist(), seen.amax(0).tolist()) == ([4, 4], [5, 5])


@pytest.mark.parametrize("sides", [(3, 4), (16, 17)])  # plain; with the enlargement folded into the convolution
def test_upsampling_repeats_each_place_four_times_and_convolves(sides):
    layer, x = randomised(Upsample(2)), torch.randn(2, 2, *sides)
    results = []
    for function in (layer, lambda x: layer.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        cotangent = torch.linspace(-1, 1, value.numel()).view_as(value)
        results.append([value, *torch.autograd.grad(value, [leaf, *layer.parameters()], cotangent)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    assert (sides[0] * sides[1] >= FOLDED_FROM) == (sides == (16, 17))


def test_encoder_and_decoder_have_the_chosen_levels():
    encoder, decoder = ResnetEncoder(**SIZES), ResnetDecoder(**SIZES)
    assert [len(level.block) for level in encoder.down] == [2, 2, 2]
    assert [len(level.block) for level in decoder.up] == [3, 3, 3]
    assert [len(level.attn) for level in encoder.down] == [0, 2, 0]
    assert [len(level.attn) for level in decoder.up] == [0, 3, 0]
    features = encoder(torch.randn(2, 3, 16, 24))
    assert features.shape == (2, 5, 4, 6)
    assert decoder(features).shape == (2, 3, 16, 24)


def test_every_norm_of_a_spatial_decoder_sees_the_code_vectors():
    decoder = ResnetDecoder(**SIZES, latent_channels=7)
    norms = [module for module in decoder.modules() if isinstance(module, Norm | SpatialNorm)]
    assert all(isinstance(norm, SpatialNorm) for norm in norms)
    z_q = torch.randn(1, 7, 4, 4, requires_grad=True)
    decoder(torch.randn(1, 5, 4, 4), z_q).square().mean().backward()
    assert z_q.grad.abs().min() > 0
    assert all(norm.conv_y.weight.grad.abs().sum() > 0 for norm in norms)
