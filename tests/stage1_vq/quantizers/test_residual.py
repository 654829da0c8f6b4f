"""A residual quantizer is the slow loop that its paper writes down; its numbers beside published code
are in tests/stage1_vq/published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from stage1_vq.quantizers import build_quantizer, residual
from stage1_vq.quantizers.beam import beam_search
from stage1_vq.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from stage1_vq.quantizers.residual import ResidualQuantizer, ResidualQuantizerConfig

LAYER = NearestQuantizerConfig(codebook_size=12, dim=5)


def make(layer: NearestQuantizerConfig = LAYER, **settings: Any) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(ResidualQuantizerConfig(layer=layer, **{"depth": 3, **settings}))


def latents(b: int = 4, d: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(b, d, 3, 4, generator=torch.Generator().manual_seed(seed))


def brute_force(quantizer: ResidualQuantizer, z: Tensor) -> tuple[list[Tensor], Tensor]:
    """Codes of each layer and the sum of their vectors, one latent and one layer at a time."""
    b, _, h, w = z.shape
    codes, total = torch.zeros(len(quantizer.stack()), b, h, w, dtype=torch.int64), torch.zeros_like(z)
    for i, y, x in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(w)).tolist():
        residual = z[i, :, y, x].clone()
        for number, layer in enumerate(quantizer.stack()):
            codes[number, i, y, x] = (layer.codebook - residual).square().sum(1).argmin()
            nearest = layer.codebook[codes[number, i, y, x]]
            residual -= nearest
            total[i, :, y, x] += nearest
    return list(codes), total


# ---- codes, losses, gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"shared_codebook": True}, {"codebook_sizes": (20, 4, 7)}])
def test_codes_and_latents_are_those_of_the_slow_loop(settings):
    quantizer, z = make(**settings), latents()
    codes, total = brute_force(quantizer, z)
    quantized = quantizer(z)
    assert len(quantized.codes) == 3
    for number, grid in enumerate(quantized.codes):
        assert torch.equal(grid, codes[number])
    torch.testing.assert_close(quantized.z_q, total)
    torch.testing.assert_close(quantized.statistics["quantization_error"], (z - total).square().mean())


def test_there_is_a_grid_for_each_layer_with_its_own_vocabulary():
    grids = make(codebook_sizes=(20, 4, 7)).grids(3, 4)
    assert [(grid.name, grid.height, grid.width, grid.vocabulary) for grid in grids] == [
        ("depth0", 3, 4, 20),
        ("depth1", 3, 4, 4),
        ("depth2", 3, 4, 7),
    ]


def test_the_gradient_passes_once_through_the_whole_stack():
    quantizer, z, upstream = make(), latents().requires_grad_(), latents(seed=2)
    quantizer(z).z_q.backward(upstream)
    assert torch.equal(z.grad, upstream)


def test_the_commitment_loss_is_the_mean_over_the_layers_and_pulls_to_each_partial_sum():
    quantizer, z = make(), latents().requires_grad_()
    quantized = quantizer(z)
    vectors = [layer.look_up(grid) for layer, grid in zip(quantizer.stack(), quantized.codes, strict=True)]
    partial_sums = torch.stack(vectors).cumsum(0)  # of each layer
    expected = 0.25 * (z - partial_sums).square().mean()
    torch.testing.assert_close(quantized.losses["commitment_loss"], expected)
    gradient = torch.autograd.grad(quantized.losses["commitment_loss"], z)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])


def test_the_rotation_turns_the_latent_into_the_whole_sum():
    rotation = NearestQuantizerConfig(codebook_size=12, dim=5, gradient="rotation")
    quantizer, z = make(rotation), latents().requires_grad_()
    z_q = quantizer(z).z_q
    # |z_q|/|z| R is a similarity: the gradient's length is scaled by the ratio of lengths, vector by vector.
    gradient = torch.autograd.grad(z_q, z, latents(seed=2))[0]
    ratio = z_q.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(gradient.norm(dim=1), ratio * latents(seed=2).norm(dim=1))


def test_projections_stand_once_around_the_stack():
    quantizer, z = make(dim=9), latents(d=9).requires_grad_()
    assert (quantizer.dim, quantizer.project_in.weight.shape) == (9, (5, 9, 1, 1))
    quantized = quantizer(z)
    inner = quantizer.project_in(z)
    _, total = brute_force(quantizer, inner.detach())
    torch.testing.assert_close(quantized.z_q, quantizer.project_out(total))


# ---- the codebooks --------------------------------------------------------------------------------------------------


def test_k_means_of_a_layer_sees_what_the_layers_before_it_left():
    quantizer, by_hand = make(), make()
    residuals = [latents(seed=3), latents(seed=4)]
    torch.manual_seed(5)
    quantizer.initialise(residuals)
    torch.manual_seed(5)
    for layer, expected in zip(quantizer.stack(), by_hand.stack(), strict=True):
        expected.initialise(residuals)
        assert torch.equal(layer.codebook, expected.codebook)
        residuals = [z - expected.look_up(expected.codes(z)) for z in residuals]


def test_each_layer_lowers_the_error_once_the_codebooks_are_initialised():
    errors = []
    for depth in (1, 2, 4):
        quantizer, z = make(depth=depth), latents(b=16)
        torch.manual_seed(1)
        quantizer.initialise([z])
        errors.append(float(quantizer(z).statistics["quantization_error"]))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_a_shared_codebook_is_initialised_for_latents_and_residuals():
    z = latents(b=16)
    shared, first_only = (make(shared_codebook=True) for _ in range(2))
    torch.manual_seed(1)
    shared.initialise([z])
    torch.manual_seed(1)
    first_only.stack()[0].initialise([z])
    errors = [float(quantizer(z).statistics["quantization_error"]) for quantizer in (shared, first_only)]
    assert errors[0] < 0.9 * errors[1]


def test_a_shared_codebook_moves_once_by_what_all_layers_saw():
    quantizer, z = make(shared_codebook=True), latents()
    (layer,) = quantizer.layers
    by_hand = NearestQuantizer(quantizer.config.layer)
    by_hand.load_state_dict(layer.state_dict())
    residuals = [z]
    for grid in quantizer.codes(z):
        residuals.append(residuals[-1] - layer.look_up(grid))
    by_hand(torch.cat(residuals[:-1]))
    quantizer(z)
    for one in (quantizer, by_hand):
        one.update()
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_revive_the_vectors_of_one_batch(shared):
    layer = NearestQuantizerConfig(codebook_size=60, dim=5, revive_after=2)
    whole, split = (make(layer, shared_codebook=shared) for _ in range(2))
    for step in range(5):
        z = latents(b=6, seed=step) + step  # away from most codes, so that many die
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


# ---- quantizer dropout ----------------------------------------------------------------------------------------------


def test_dropout_shows_the_decoder_the_first_layers_of_each_image(monkeypatch):
    quantizer, z = make(quantizer_dropout=1.0), latents()
    monkeypatch.setattr(residual, "draw_kept", lambda *_: torch.tensor([1, 3, 2, 3]))
    z_q = quantizer(z).z_q
    for image, kept in enumerate([1, 3, 2, 3]):
        pairs = list(zip(quantizer.stack(), quantizer.codes(z), strict=True))[:kept]
        expected = sum(layer.look_up(grid)[image] for layer, grid in pairs)
        torch.testing.assert_close(z_q[image], expected)
    assert torch.equal(quantizer.eval()(z).z_q, make()(z).z_q)  # all layers where nothing is trained


def test_dropout_draws_every_number_of_layers_for_its_share_of_the_images():
    torch.manual_seed(0)
    drawn = make(depth=4, quantizer_dropout=1.0).draw_kept(4000, torch.device("cpu"))
    shares = torch.bincount(drawn, minlength=5) / 4000
    torch.testing.assert_close(shares, torch.tensor([0, 0.25, 0.25, 0.25, 0.25]), atol=0.03, rtol=0)
    drawn = make(depth=4, quantizer_dropout=0.5).draw_kept(4000, torch.device("cpu"))
    torch.testing.assert_close(float((drawn == 4).float().mean()), 0.5 + 0.125, atol=0.03, rtol=0)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_codebooks_learn_from_every_image_whatever_was_drawn(update):
    layer = NearestQuantizerConfig(codebook_size=12, dim=5, codebook_update=update)
    plain, dropped = make(layer), make(layer, quantizer_dropout=1.0)
    for quantizer in (plain, dropped):
        quantized = quantizer(latents())
        if update == "gradient":
            torch.stack(list(quantized.losses.values())).sum().backward()
        quantizer.update()
    for one, other in zip(plain.stack(), dropped.stack(), strict=True):
        assert torch.equal(one.codebook, other.codebook)
        assert update == "ema" or torch.equal(one.codebook.grad, other.codebook.grad)


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_layers_that_dropout_leaves_out_pass_no_gradient(gradient, monkeypatch):
    layer = NearestQuantizerConfig(codebook_size=12, dim=5, gradient=gradient)
    whole, dropped = (make(layer, gradient_through="layers", quantizer_dropout=share) for share in (0.0, 1.0))
    monkeypatch.setattr(residual, "draw_kept", lambda b, *_: torch.full((b,), 1))
    first = make(layer, depth=1)
    gradients = []
    for quantizer in (whole, dropped, first):
        z = latents().requires_grad_()
        gradients.append(torch.autograd.grad(quantizer(z).z_q, z, latents(seed=2))[0])
    torch.testing.assert_close(gradients[1], gradients[2])
    assert not torch.allclose(gradients[0], gradients[2])


# ---- beam search ----------------------------------------------------------------------------------------------------


def test_a_beam_as_wide_as_all_paths_finds_the_nearest_of_all_sums():
    layer = NearestQuantizerConfig(codebook_size=4, dim=5)
    quantizer, z = make(layer, depth=3, beam=16).eval(), latents()
    rows = rearrange(z, "b d h w -> (b h w) 1 d")
    paths = torch.cartesian_prod(*3 * [torch.arange(4)])  # 64 layers
    sums = sum(book.codebook[paths[:, number]] for number, book in enumerate(quantizer.stack()))
    best = paths[(rows - sums).square().sum(2).argmin(1)]
    found = torch.stack([grid.flatten() for grid in quantizer.codes(z)], 1)
    assert torch.equal(found, best)


def test_a_wider_beam_leaves_no_larger_error_on_average_and_a_beam_of_one_is_greedy(monkeypatch):
    layer = NearestQuantizerConfig(codebook_size=16, dim=5)
    z = latents(b=16)
    errors = [float(make(layer, depth=4, beam=beam).eval()(z).statistics["quantization_error"]) for beam in (1, 2, 8)]
    assert errors[0] > errors[1] > errors[2]
    greedy = make(layer, depth=4)
    rows = lambda number, _: greedy.stack()[number].code_vectors()  # noqa: E731
    found = beam_search(z, 4, rows, 1)
    assert all(map(torch.equal, found, greedy.codes(z)))
    monkeypatch.setattr("stage1_vq.quantizers.beam.TILE", 64)  # a few rows at a time
    assert all(map(torch.equal, beam_search(z, 4, rows, 1), found))


def test_with_a_beam_every_codebook_moves_to_what_its_layer_saw():
    layer = NearestQuantizerConfig(codebook_size=12, dim=5, decay=0.0, revive_after=0)
    quantizer, z = make(layer, depth=3, beam=4), latents()
    rest = rearrange(z, "b d h w -> (b h w) d")
    books = [book.codebook.clone() for book in quantizer.stack()]
    quantized = quantizer(z)
    quantizer.update()
    for book, before, grid in zip(quantizer.stack(), books, quantized.codes, strict=True):
        code = int(grid.flatten()[0])
        mean = rest[grid.flatten() == code].mean(0)
        torch.testing.assert_close(book.codebook[code], mean, rtol=1e-4, atol=1e-5)
        rest = rest - before[grid.flatten()]


# ---- what a person sees ---------------------------------------------------------------------------------------------


def test_health_is_told_by_layer_and_for_all():
    quantizer = make()
    quantizer(latents())
    quantizer.update()
    health = quantizer.health(steps_per_epoch=1)
    shares = torch.stack([health[f"depth{number}_codes_used_share"] for number in range(3)])
    torch.testing.assert_close(health["codes_used_share"], shares.mean())
    assert health["dead_codes"] == (12 * (1 - shares)).sum().round()
    assert set(health) == {
        "perplexity", "codes_used_share", "dead_codes", "revived_codes", "depth0_perplexity", "depth0_codes_used_share",
        "depth1_perplexity", "depth1_codes_used_share", "depth2_perplexity", "depth2_codes_used_share",
    }  # fmt: skip


def test_a_warning_names_the_layer_and_fields_that_exist():
    quantizer = make(NearestQuantizerConfig(codebook_size=500, dim=5, revive_after=0, kmeans_iterations=0))
    quantizer(latents())
    quantizer.update()
    metrics = {name: float(value) for name, value in quantizer.health(steps_per_epoch=1).items()}
    lines = quantizer.warnings(metrics, 1)
    assert [line.split(":")[0] for line in lines] == ["depth0", "depth1", "depth2"]
    assert "of 500 codes were used in the last epoch" in lines[2]
    assert "a smaller model.quantizer.layer.codebook_size, or model.quantizer.layer.revive_after=100, or" in lines[0]
    assert "lookup_dim" not in lines[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth=0, expected at least 1"),
        ({"codebook_sizes": (4, 4)}, r"codebook_sizes=\(4, 4\), expected one for each of the depth=3"),
        ({"codebook_sizes": (4, 4, 1)}, "expected at least 2 each"),
        ({"codebook_sizes": (4, 4, 4), "shared_codebook": True}, "expected none where shared_codebook=true"),
        ({"dim": 0}, "dim=0, expected at least 1"),
        ({"gradient_through": "all"}, "gradient_through=all, expected sum or layers"),
        ({"beam": 0}, "beam=0, expected at least 1"),
        ({"gradient_between": 0.5}, "gradient_between=0.5, expected 0 where gradient_through=sum"),
        ({"quantizer_dropout": 1.5}, "quantizer_dropout=1.5, expected a share from 0 to 1"),
        (
            {"layer": NearestQuantizerConfig(dim=64, lookup_dim=8)},
            "layer.lookup_dim=8, expected null: .* as layer.dim=8, and dim=64 beside layer",
        ),
        (
            {"layer": NearestQuantizerConfig(l2_normalise=True)},
            "layer.l2_normalise=True, expected False",
        ),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        ResidualQuantizerConfig(**{"depth": 3, **settings})


def test_a_config_survives_json():
    config = ResidualQuantizerConfig(depth=3, layer=LAYER, codebook_sizes=(8, 4, 2), quantizer_dropout=0.5)
    values = {
        "kind": "residual", "depth": 3, "codebook_sizes": [8, 4, 2], "shared_codebook": False, "dim": None,
        "quantizer_dropout": 0.5, "layer": {**vars(LAYER)},
    }  # fmt: skip
    assert ResidualQuantizer.config_from(values) == config
    assert isinstance(build_quantizer(config), ResidualQuantizer)
