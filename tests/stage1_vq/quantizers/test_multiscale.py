"""The multi-scale quantizer is its paper's loop, and gives the published code's numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import scales
from stage1_vq.quantizers.multiscale import MultiscaleQuantizer, MultiscaleQuantizerConfig
from stage1_vq.quantizers.scales import phi_of_each_scale
from tests.golden import golden


def make(**settings: Any) -> MultiscaleQuantizer:
    torch.manual_seed(0)
    defaults = {"scales": (1, 2, 4), "codebook_size": 20, "dim": 5, "phis": 2, "codebook_update": "gradient"}
    return MultiscaleQuantizer(MultiscaleQuantizerConfig(**{**defaults, **settings}))


def latents(b: int = 4, h: int = 4, w: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(b, 5, h, w, generator=torch.Generator().manual_seed(seed))


def block_means(x: Tensor, side: int) -> Tensor:
    """x, b d 4 4, as side x side block averages, by slicing."""
    block = 4 // side
    starts = range(0, 4, block)
    means = [[x[:, :, i : i + block, j : j + block].mean((2, 3)) for j in starts] for i in starts]
    return torch.stack([torch.stack(row, -1) for row in means], -2)


# ---- codes, losses, gradients ---------------------------------------------------------------------------------------


def test_codes_and_latents_are_those_of_the_slow_loop():
    quantizer, z = make(), latents()
    quantized = quantizer(z)
    total = torch.zeros_like(z)
    for number, side in enumerate((1, 2, 4)):
        rest = rearrange(block_means(z - total, side), "b d h w -> b h w 1 d")
        codes = (rest - quantizer.layer.codebook).square().sum(-1).argmin(-1)
        assert torch.equal(quantized.codes[number], codes)
        grown = rearrange(quantizer.layer.codebook[codes], "b h w d -> b d h w")
        grown = F.interpolate(grown, size=(4, 4), mode="bicubic") if side < 4 else grown
        phi = quantizer.phis[[0, 0, 1][number]]
        total = total + 0.5 * grown + 0.5 * phi(grown)
    torch.testing.assert_close(quantized.z_q, total)


def test_the_losses_pull_latents_and_sums_together_at_every_scale():
    quantizer, z = make(commitment_weight=0.5), latents().requires_grad_()
    quantized = quantizer(z)
    sums = [quantizer.latents_of_prefix(quantized.codes[: number + 1], 4, 4) for number in range(3)]
    mean = torch.stack([(total.detach() - z).square().mean() for total in sums]).mean()
    torch.testing.assert_close(quantized.losses["commitment_loss"], 0.5 * mean)
    torch.testing.assert_close(quantized.losses["codebook_loss"], mean)
    quantized.losses["codebook_loss"].backward(retain_graph=True)
    assert z.grad is None
    assert all(weight.grad.abs().sum() > 0 for weight in quantizer.parameters())
    quantizer.zero_grad()
    quantized.losses["commitment_loss"].backward()
    assert all(weight.grad is None for weight in quantizer.parameters())
    assert z.grad.abs().min() > 0


def test_no_commitment_loss_is_computed_for_weight_0():
    assert set(make(commitment_weight=0.0)(latents()).losses) == {"codebook_loss"}


def test_the_straight_through_gradient_is_the_identity():
    quantizer, z, upstream = make(), latents().requires_grad_(), latents(seed=2)
    quantizer(z).z_q.backward(upstream)
    assert torch.equal(z.grad, upstream)
    assert quantizer.layer.codebook.grad is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4, 4), [(1, 1), (2, 2), (4, 4)]),
        ((4, 8), [(1, 2), (2, 4), (4, 8)]),
        ((6, 3), [(2, 1), (3, 2), (6, 3)]),
        ((1, 5), [(1, 1), (1, 3), (1, 5)]),
    ],
)
def test_scales_follow_the_shape_of_the_latents_and_the_last_is_theirs(size, expected):
    quantizer = make().eval()
    assert quantizer.sizes(*size) == expected
    quantized = quantizer(latents(h=size[0], w=size[1]))
    assert [tuple(grid.shape[1:]) for grid in quantized.codes] == expected
    assert [grid.name for grid in quantizer.grids(*size)] == ["scale0", "scale1", "scale2"]
    torch.testing.assert_close(quantizer.codes_to_latents(quantized.codes), quantized.z_q)


def test_published_scales_make_the_published_grids():
    grids = MultiscaleQuantizer(MultiscaleQuantizerConfig(codebook_size=8, dim=2)).grids(16, 16)
    assert [grid.size for grid in grids] == [n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    assert sum(grid.size for grid in grids) == 680


# ---- quantizer dropout, and codes by direction -----------------------------------------------------------------------


def test_dropout_shows_the_decoder_the_first_scales_of_each_image(monkeypatch):
    quantizer, z = make(quantizer_dropout=1.0), latents().requires_grad_()
    monkeypatch.setattr(scales, "draw_kept", lambda *_, **__: torch.tensor([1, 3, 2, 3]))
    quantized, whole = quantizer(z), make()(z)
    for image, kept in enumerate([1, 3, 2, 3]):
        expected = quantizer.latents_of_prefix([grid[image : image + 1] for grid in quantized.codes[:kept]], 4, 4)
        torch.testing.assert_close(quantized.z_q[image], expected[0])
    assert not torch.equal(quantized.z_q, whole.z_q)
    # Every scale learns from every image, whatever the decoder sees of it.
    for name, loss in whole.losses.items():
        assert torch.equal(quantized.losses[name], loss)
    quantized.z_q.backward(upstream := latents(seed=2))
    assert torch.equal(z.grad, upstream)
    assert torch.equal(quantizer.eval()(z).z_q, whole.z_q)


def test_dropout_leaves_every_number_of_scales_from_the_fewest_on_to_its_share():
    torch.manual_seed(0)
    quantizer = make(scales=(1, 2, 3, 4), quantizer_dropout=0.6, fewest_scales=2)
    drawn = quantizer.draw_kept(6000, torch.device("cpu"))
    shares = torch.bincount(drawn, minlength=5) / 6000
    torch.testing.assert_close(shares, torch.tensor([0, 0, 0.2, 0.2, 0.6]), atol=0.03, rtol=0)
    assert make().draw_kept(5, torch.device("cpu")) is None
    assert quantizer.eval().draw_kept(5, torch.device("cpu")) is None


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_by_direction_the_code_is_that_of_the_largest_cosine_and_its_vector_is_added_as_it_is(update):
    quantizer, z = make(scales=(4,), phis=1, compare="direction", codebook_update=update, decay=0.0), latents()
    with torch.no_grad():
        quantizer.layer.codebook.mul_(torch.linspace(0.1, 3, 20).unsqueeze(1))
    vectors = quantizer.layer.codebook.detach().clone()
    rows = rearrange(z, "b d h w -> (b h w) d")
    cosines = F.cosine_similarity(rows.unsqueeze(1), vectors, dim=2)
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0].flatten(), cosines.argmax(1))
    assert not torch.equal(quantized.codes[0], make(scales=(4,), phis=1).codes(z)[0])
    torch.testing.assert_close(rearrange(quantized.z_q, "b d h w -> (b h w) d"), vectors[cosines.argmax(1)])
    quantizer.update()
    if update == "ema":  # it moves to the latents themselves, not to their directions
        code = int(cosines.argmax(1)[0])
        mean = rows[cosines.argmax(1) == code].mean(0)
        torch.testing.assert_close(quantizer.layer.codebook[code], mean, rtol=1e-4, atol=1e-5)


# ---- what a next-scale prior sees -----------------------------------------------------------------------------------


def test_the_inputs_of_the_next_scales_are_the_prefix_sums_on_their_grids():
    quantizer, z = make(), latents()
    codes = quantizer.codes(z)
    inputs = quantizer.next_scale_inputs(codes)
    assert len(inputs) == 2
    torch.testing.assert_close(inputs[0], block_means(quantizer.latents_of_prefix(codes[:1], 4, 4), 2))
    torch.testing.assert_close(inputs[1], quantizer.latents_of_prefix(codes[:2], 4, 4))
    step_by_step = quantizer.next_scale_input(quantizer.latents_of_prefix(codes[:1], 4, 4), 1)
    torch.testing.assert_close(step_by_step, inputs[0])


def test_the_input_of_a_scale_does_not_depend_on_its_own_or_later_codes():
    quantizer, codes = make(), make().codes(latents())
    for changed in range(3):
        others = tuple((grid + 1) % 20 if n == changed else grid for n, grid in enumerate(codes))
        pairs = zip(quantizer.next_scale_inputs(codes), quantizer.next_scale_inputs(others), strict=True)
        moved = [not torch.equal(one, other) for one, other in pairs]
        assert moved == [number + 1 > changed for number in range(2)]


# ---- phi ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "expected"),
    [(4, [0, 1, 2, 3]), (5, [0, 1, 2, 2, 3]), (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3])],
)
def test_the_phi_of_each_scale_is_the_published_one_ties_included(scales, expected):
    assert phi_of_each_scale(scales, 4) == expected


def test_a_phi_that_no_scale_would_use_is_refused():
    assert set(phi_of_each_scale(7, 6)) == {0, 1, 2, 3, 5}
    seven = (1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(UserError, match=r"phis=6, expected one of \[1, 2, 3, 4, 5, 7\], of which 7 scales leave"):
        make(scales=seven, phis=6)
    used = [make(scales=seven, phis=phis).phi_of_scale for phis in (1, 4, 7)]
    assert used == [[0] * 7, [0, 0, 1, 2, 2, 3, 3], list(range(7))]


# ---- the codebook ---------------------------------------------------------------------------------------------------


def test_k_means_serves_all_scales():
    quantizer, z = make(codebook_size=60), latents(b=32)
    before = float(quantizer(z).statistics["quantization_error"])
    torch.manual_seed(1)
    quantizer.initialise([z[:20], z[20:]])
    quantized = quantizer(z)
    assert quantized.statistics["quantization_error"] < 0.8 * before
    assert len(torch.cat([grid.flatten() for grid in quantized.codes]).unique()) == 60


def test_an_ema_codebook_moves_once_by_what_all_scales_saw():
    quantizer, z = make(codebook_update="ema", decay=0.0), latents()
    rests, codes = quantizer.walk(z)
    rows = torch.cat([rearrange(rest, "b d h w -> (b h w) d") for rest in rests]).detach()
    numbers = torch.cat([grid.flatten() for grid in codes])
    quantizer(z)
    quantizer.update()
    for code in numbers.unique():  # with no memory of the past a code is the mean of what fell to it
        expected = rows[numbers == code].mean(0)
        torch.testing.assert_close(quantizer.layer.codebook[code], expected, rtol=1e-4, atol=1e-5)
    assert quantizer(z).losses["codebook_loss"].requires_grad  # phi still learns from it


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_micro_batches_revive_the_vectors_of_one_batch(update):
    whole, split = (make(codebook_size=60, revive_after=2, codebook_update=update) for _ in range(2))
    for step in range(5):
        z = latents(b=6, seed=step) + step
        whole(z)
        for part in z.split(2):
            split(part)
        for quantizer in (whole, split):
            torch.manual_seed(step)
            quantizer.update()
            health = quantizer.health(steps_per_epoch=3)
    assert health["revived_codes"] > 0, "the test must see revivals"
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_a_warning_names_fields_that_exist():
    quantizer = make(codebook_size=500, revive_after=0)
    quantizer(latents())
    quantizer.update()
    metrics = {name: float(value) for name, value in quantizer.health(steps_per_epoch=1).items()}
    (line,) = quantizer.warnings(metrics, 1)
    assert "try a smaller model.quantizer.codebook_size, or model.quantizer.revive_after=100" in line
    assert "lookup_dim" not in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, r"scales=\(\), expected one or more rising sides"),
        ({"scales": (1, 4, 2)}, r"scales=\(1, 4, 2\), expected one or more rising sides"),
        ({"codebook_size": 1}, "codebook_size=1, expected at least 2"),
        ({"phis": 4}, r"phis=4, expected one of \[1, 2, 3\], of which"),
        ({"phi_share": 0.0}, "phi_share=0.0, expected above 0"),
        ({"commitment_weight": -1.0}, "commitment_weight=-1.0, expected 0 or more"),
        ({"compare": "cosine"}, "compare=cosine, expected distance or direction"),
        ({"quantizer_dropout": 1.5}, "quantizer_dropout=1.5, expected a share from 0 to 1"),
        ({"fewest_scales": 4}, "fewest_scales=4, expected from 1 to 3, the number of scales"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_scale_latents_are_the_codebook_and_each_scales_phi_with_its_share():
    quantizer, x = make(scales=(1, 2, 3, 4), phis=2, phi_share=0.3), latents()
    for parameter in quantizer.parameters():
        torch.nn.init.normal_(parameter)
    shared = quantizer.scale_latents()
    assert {name: tuple(tensor.shape) for name, tensor in shared.items()} == {
        "codebook": (20, 5), "phi_weight": (3, 5, 5, 3, 3), "phi_bias": (3, 5)
    }  # fmt: skip
    assert torch.equal(shared["codebook"], quantizer.layer.codebook)
    for number, phi in enumerate([0, 0, 1]):
        expected = 0.7 * x + 0.3 * quantizer.phis[phi](x)
        folded = F.conv2d(x, shared["phi_weight"][number], shared["phi_bias"][number], padding=1)
        torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5)
    assert make(scales=(4,), phis=1).scale_latents() is None


def test_a_config_survives_json():
    config = make().config
    assert MultiscaleQuantizer.config_from({**asdict(config), "scales": [1, 2, 4]}) == config


# ---- VAR ------------------------------------------------------------------------------------------------------------


def test_codes_sums_losses_and_gradients_as_var():
    data = golden("var_vqvae")
    settings = data.config
    quantizer = MultiscaleQuantizer(
        MultiscaleQuantizerConfig(
            scales=tuple(settings["v_patch_nums"]),
            codebook_size=settings["vocab_size"],
            dim=settings["z_channels"],
            commitment_weight=settings["beta"],
            codebook_update="gradient",
            phis=settings["share_quant_resi"],
            phi_share=settings["quant_resi"],
        )
    )
    theirs = {
        "layer.codebook": data.weights["quantize.embedding.weight"],
        **{
            f"phis.{number}.{part}": data.weights[f"quantize.quant_resi.qresi_ls.{number}.{part}"]
            for number in range(4)
            for part in ("weight", "bias")
        },
    }
    for name, weight in quantizer.named_parameters():
        weight.data.copy_(theirs[name])

    def assert_same(ours: Tensor, reference: str) -> None:
        torch.testing.assert_close(ours, data.outputs[reference], rtol=1e-5, atol=5e-5)

    f = data.outputs["f"].clone().requires_grad_()
    codes = quantizer.codes(f)
    for number, grid in enumerate(codes):
        assert torch.equal(rearrange(grid, "b h w -> b (h w)"), data.outputs[f"idx_{number}"])
        assert_same(quantizer.latents_of_prefix(codes[: number + 1], 4, 4), f"fhat_{number}")
    inputs = torch.cat([rearrange(x, "b d h w -> b (h w) d") for x in quantizer.next_scale_inputs(codes)], 1)
    assert_same(inputs, "var_input")

    quantized = quantizer(f)
    assert all(torch.equal(one, other) for one, other in zip(quantized.codes, codes, strict=True))
    assert_same(quantized.z_q, "train/f_hat")
    loss = quantized.losses["commitment_loss"] + quantized.losses["codebook_loss"]
    assert_same(loss, "train/vq_loss")
    ((quantized.z_q * data.inputs["cotangent"]).sum() + loss).backward()
    assert_same(f.grad, "train/grad/f")
    assert_same(quantizer.layer.codebook.grad, "train/grad/embedding")
    assert_same(quantizer.phis[0].weight.grad, "train/grad/quant_resi.0")
