"""FlexTok beside the original implementation's own numbers, as far as these go: encoder, codes, nested dropout. The
decoder beside a slow walk and a closed form; which token says what; wrong configs are refused. More in
test_conformance.py, ../test_flow_matching.py and ../quantizers/test_fsq.py."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from stage1_vq.autoencoders import flextok
from stage1_vq.autoencoders.flextok import Features, FlexTok, FlexTokConfig, kept_tokens
from stage1_vq.networks.register_transformer import causal_last, places_of
from stage1_vq.quantizers import FSQConfig, MultiscaleQuantizerConfig
from tests.golden import Golden, golden_frontier
from tests.stage1_vq.tiny import make_autoencoder

SIZES = {"encoder_width": 16, "encoder_blocks": 2, "encoder_heads": 2}
SIZES |= {"decoder_width": 24, "decoder_blocks": 2, "decoder_heads": 2}
CONFIG = FlexTokConfig(channels=1, patch=4, tokens=6, steps=3, quantizer=FSQConfig(levels=(5, 3), dim=2), **SIZES)  # type: ignore[arg-type]


def tiny(**changes: Any) -> FlexTok:
    torch.manual_seed(0)
    return FlexTok(replace(CONFIG, **changes), (8, 12)).eval()


def some_images(b: int = 3) -> Tensor:
    return torch.rand(b, 1, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---- the original ---------------------------------------------------------------------------------------------------

NAMES = {
    "encoder.module_dict.enc_patch_emb.patch_proj": "encoder.patches",
    "encoder.module_dict.enc_register_module.registers": "encoder.registers",
    "encoder.module_dict.enc_transformer.blocks": "encoder.blocks",
    "encoder.module_dict.enc_to_latents.proj": "encoder.output",
    "decoder.module_dict.dec_linear.proj": "decoder.input",
    "decoder.module_dict.dec_nested_dropout.dropout_mask_token": "decoder.absent",
    "attn.wq": "attention.query",
    "attn.wk": "attention.key",
    "attn.wv": "attention.value",
    "attn.proj": "attention.output",
    "mlp.fc1": "mlp.gate",
    "mlp.fc2": "mlp.outer",
    "mlp.fc3": "mlp.inner",
}


def of_original(number: int) -> tuple[FlexTok, Tensor, Golden]:
    """A model of the original's encoder, and its images of the size `number`, b c H W."""
    original = golden_frontier("flextok")
    config, latents = original.config, original.inputs[f"latents_{number}"]
    sizes = {f"{half}_{size}": value for half in ("encoder", "decoder")
             for size, value in (("width", config["dim"]), ("blocks", config["depth"]))}  # fmt: skip
    sizes |= {f"{half}_heads": config["dim"] // config["head_dim"] for half in ("encoder", "decoder")}
    model = FlexTok(
        FlexTokConfig(
            channels=config["channels"],
            patch=config["patch"],
            tokens=config["n_registers"],
            quantizer=FSQConfig(levels=tuple(config["levels"]), dim=len(config["levels"])),
            **sizes,
        ),
        tuple(latents.shape[1:3]),
    ).eval()
    state, taken = model.state_dict(), set()
    for key, weight in original.weights.items():
        if key == "encoder.module_dict.enc_posemb_module.posembs":
            continue
        name = key
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name].copy_(weight.view_as(state[name]))
        taken.add(name)
    assert {name for name in state if name.startswith("encoder.")} <= taken
    return model, latents.movedim(3, 1), original


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_encoder_codes_and_dropout_are_the_originals(number: int):
    model, images, original = of_original(number)
    out = {name: original.outputs[f"{name}_{number}"] for name in ("patches", "registers_out", "enc_latents", "quants")}
    h, w = model.grid
    table = original.weights["encoder.module_dict.enc_posemb_module.posembs"][0, :, :h, :w]
    torch.testing.assert_close(model.encoder.places.view(h, w, -1), table.movedim(0, 2))
    close(model.encoder.embedded(images).view(1, h, w, -1), out["patches"])
    close(model.encoder.features(images), out["registers_out"])
    z = model.latents(images)
    close(z[:, :, 0].mT, out["enc_latents"])
    z_q, codes, _, _ = model.quantizer(z)
    assert torch.equal(codes[0][:, 0], original.outputs[f"token_ids_{number}"])
    assert torch.equal(model.encode(images)[0], codes[0])
    close(z_q[:, :, 0].mT, out["quants"])
    close(model.quantizer.codes_to_latents(codes)[:, :, 0].mT, original.outputs[f"quants_from_ids_{number}"])
    kept = original.inputs["keep_k"][number : number + 1]
    close(model.decoder.tokens(z_q, kept), original.outputs[f"nested_dropout_eval_{number}"])


@pytest.mark.parametrize(
    ("nested", "name"),
    [("uniform", "uniform"), ("powers-of-two", "pow2"), ("uniform-powers-of-two", "uniform_pow2")],
)
def test_tokens_are_kept_as_the_original_keeps_them(nested: Any, name: str):
    original = golden_frontier("flextok")
    drawn = original.inputs["dropout_draws"]  # from 1 to 8; of powers the number of one, modulo 4
    uniforms = (drawn % 4 + 0.5) / 4 if name == "pow2" else (drawn - 0.5) / 8
    assert torch.equal(kept_tokens(nested, uniforms, 8), original.outputs[f"keep_k/{name}"])


# ---- the encoder ----------------------------------------------------------------------------------------------------


def test_registers_see_patches_and_those_before_them():
    sees = causal_last(3, 4)
    for asking, asked in itertools.product(range(7), repeat=2):
        assert bool(sees[asking, asked]) == (asked < 3 or asked <= asking)


@torch.no_grad()
def test_a_token_does_not_change_with_the_registers_after_it():
    model, images = tiny(), some_images()
    before = model.latents(images)
    model.encoder.registers[3] += 1
    moved = (model.latents(images) - before).abs().amax((0, 1, 2)) > 1e-6  # n
    assert moved.tolist() == [False] * 3 + [True] * 3


@torch.no_grad()
def test_each_token_tells_of_the_whole_image():
    model, images = tiny(), some_images(1)
    for row, column in ((0, 0), (7, 11), (3, 6)):
        other = images.clone()
        other[0, 0, row, column] += 1
        assert ((model.latents(other) - model.latents(images)).abs().amax((0, 1, 2)) > 1e-6).all()


def test_places_are_told_apart_and_rows_from_columns():
    places = places_of(5, 7, 16)
    assert len(places.unique(dim=0)) == 35
    grid = places.view(5, 7, 16)
    assert torch.equal(grid[:, 0, :8], grid[:, 6, :8])  # of rows
    assert torch.equal(grid[0, :, 8:], grid[4, :, 8:])  # of columns
    torch.testing.assert_close(grid[3, 0, 1], torch.tensor(3 * 10_000**-0.25).sin())


# ---- nested dropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nested", "tokens", "shares"),
    [
        ("powers-of-two", 8, {1: 300, 2: 300, 4: 300, 8: 300}),
        ("powers-of-two", 6, {1: 300, 2: 300, 4: 300, 6: 300}),
        ("powers-of-two", 2, {1: 600, 2: 600}),
        ("uniform", 6, dict.fromkeys(range(1, 7), 200)),
        ("uniform-powers-of-two", 8, {1: 150, 2: 150, 4: 300, 8: 600}),
        ("uniform-powers-of-two", 6, {1: 200, 2: 200, 4: 400, 6: 400}),
    ],
)
def test_each_number_of_tokens_has_its_share(nested: Any, tokens: int, shares: dict[int, int]):
    uniforms = (torch.arange(1200) + 0.5) / 1200
    assert Counter(kept_tokens(nested, uniforms, tokens).tolist()) == shares
    ends = kept_tokens(nested, torch.tensor([0.0, 1 - 2**-24]), tokens)
    assert ends.tolist() == [1, tokens]


def test_a_step_is_that_of_a_slow_way(monkeypatch: pytest.MonkeyPatch):
    """One image at a time, of so many of its tokens: the loss, its gradient, and the reconstruction."""
    model, images = tiny(nested="uniform", unconditional=0.3, time_shift=3.0).train(), some_images(60)
    noise, times = torch.randn_like(images), torch.rand(60)
    draws = [torch.rand(60), torch.rand(60)]
    expected_kept = torch.where(draws[1] < 0.3, 0, (draws[0] * 6).long() + 1).tolist()
    assert set(expected_kept) == set(range(7))
    monkeypatch.setattr(flextok, "uniform", lambda *_, device: draws.pop(0))
    monkeypatch.setattr(flextok, "normal_like", lambda _: noise)
    monkeypatch.setattr(flextok, "drawn_times", lambda *_: times)
    output = model(images)
    assert not draws
    weight = model.decoder.head.weight
    (gradient,) = torch.autograd.grad(output.losses["flow_loss"], [weight], retain_graph=True)

    z_q = model.quantizer(model.latents(images)).z_q
    errors = []
    for number, count in enumerate(expected_kept):
        x, e, t = images[number : number + 1], noise[number : number + 1], times[number]
        t = 3 * t / (1 + 2 * t)
        x_t = (1 - t) * x + t * e
        velocity = model.decoder(x_t, t.view(1), z_q[number : number + 1, :, :, :count])
        errors.append((velocity - (x - e)).square().mean())
        torch.testing.assert_close(output.reconstruction[number : number + 1], x_t + t * velocity)
    slow = torch.stack(errors).mean()
    torch.testing.assert_close(output.losses["flow_loss"], slow)
    torch.testing.assert_close(torch.autograd.grad(slow, [weight])[0], gradient)


def test_what_is_aligned_are_patches_half_way_of_the_decoder():
    """Of a decoder of two blocks, what the first one leaves: with places, unlike the codes."""
    model, images = tiny(unconditional=0.0).train(), some_images()
    given: list[Tensor] = []
    model.decoder.blocks[0].register_forward_hook(lambda *call: given.append(call[2]))
    aligned = model(images).aligned
    assert model.aligned_has_places
    assert not model.codes_have_places
    assert aligned is not None
    assert aligned.shape == (3, model.aligned_width(), 2, 3)
    assert torch.equal(aligned[:, :, 1, 2], given[0][:, 5])
    aligned.square().sum().backward()
    assert model.encoder.patches.weight.grad is not None  # the tokens have their part in it


def test_of_tokens_that_were_dropped_no_gradient_comes():
    model, z_q = tiny().train(), torch.randn(7, 2, 1, 6, requires_grad=True)
    kept = torch.arange(7)
    model.decoder(torch.randn(7, 1, 8, 12), torch.rand(7), z_q, kept).square().sum().backward()
    learned = z_q.grad.abs().sum(dim=(1, 2)) > 0  # b n
    assert torch.equal(learned, torch.arange(6) < kept[:, None])


@torch.no_grad()
def test_validation_and_decoding_have_all_tokens_and_draw_nothing():
    model, images = tiny(), some_images()
    state = torch.get_rng_state()
    torch.testing.assert_close(model(images).reconstruction.clamp(-1, 1), model.decode(model.encode(images)))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_any_beginning_decodes_and_goes_by_its_tokens_alone():
    model = make_autoencoder("flextok, grey, nested, residual").eval()
    images = torch.rand(3, 1, 16, 24) * 2 - 1
    codes = model.encode(images)
    pictures = []
    for count in range(1, model.config.tokens + 1):
        first = tuple(grid[..., :count] for grid in codes)
        model.prefix_spec(count).check(first)
        pictures.append(model.decode(first))
        assert pictures[-1].shape == images.shape
    assert torch.equal(pictures[-1], model.decode(codes))
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.pairwise(pictures))


def test_a_model_that_was_not_trained_for_it_decodes_all_tokens_alone():
    model = tiny(nested=None)
    with pytest.raises(UserError, match=r"3 tokens, expected 6: .* model.nested=powers-of-two in training"):
        model.prefix_spec(3)
    with pytest.raises(UserError, match="7 tokens, expected 1 to 6, which this model has"):
        tiny().prefix_spec(7)
    assert tiny(nested=None, unconditional=0.0).decoder.absent is None


def test_it_learns_which_picture_is_meant_from_any_number_of_tokens():
    """Two pictures, dark and bright: what is wrong with the decoded ones is a small share of their variance, where one
    for the other would be four times all of it."""
    sizes = {f"{half}_{size}": number for half in ("encoder", "decoder") for size, number in
             (("width", 16), ("blocks", 1), ("heads", 2))}  # fmt: skip
    config = FlexTokConfig(channels=1, patch=2, tokens=4, steps=8, time_shift=3.0,
                           quantizer=FSQConfig(levels=(5, 4, 3), dim=3), **sizes)  # fmt: skip
    torch.manual_seed(0)
    model, images = FlexTok(config, (4, 4)), torch.tensor([-0.9, 0.9]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(images.repeat(8, 1, 1, 1)).losses["flow_loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        (codes,) = model.encode(images)
        for count in range(1, 5):
            error = (model.decode((codes[..., :count],)) - images).square().mean() / images.square().mean()
            assert error < 0.1, count


# ---- decoding -------------------------------------------------------------------------------------------------------


class OfGaussians(nn.Module):
    """In a decoder's place, for pixels of mean m and deviation s, each by itself: E[x - e | x_t], in closed form. The
    mean is that of the token, or another one without."""

    def __init__(self, mean: float, deviation: float, without: float = 0.0) -> None:
        super().__init__()
        self.mean, self.variance, self.without = mean, deviation**2, without
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, z_q: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.last(self.trunk(x, t, z_q, kept).last)

    def trunk(self, x: Tensor, t: Tensor, z_q: Tensor, kept: Tensor | None = None) -> Features:
        t, mean = t[:, None, None, None], self.mean if kept is None else self.without
        covariance, variance = (1 - t) * self.variance - t, (1 - t) ** 2 * self.variance + t**2
        return Features(mean + covariance / variance * (x - (1 - t) * mean), z_q)

    def last(self, features: Tensor) -> Tensor:
        return self.scale * features


@torch.no_grad()
def test_many_steps_lead_from_noise_to_the_gaussian_and_guidance_further_from_the_one_without_tokens():
    model = tiny(steps=400)
    model.decoder = OfGaussians(0.3, 0.5, without=0.1)
    noise, z_q = torch.randn(50, 1, 8, 12, generator=torch.Generator().manual_seed(4)), torch.zeros(50, 2, 1, 6)
    plain = model.walk(noise, z_q)
    torch.testing.assert_close(plain, 0.3 + 0.5 * noise, rtol=0, atol=0.02)
    model = tiny(steps=400, guidance=3.0, guidance_form="plain")
    model.decoder = OfGaussians(0.3, 0.5, without=0.1)
    # Velocities are linear in the mean here: the guided ones are those of the mean 0.1 + 3 (0.3 - 0.1).
    torch.testing.assert_close(model.walk(noise, z_q), 0.7 + 0.5 * noise, rtol=0, atol=0.02)


@torch.no_grad()
def test_a_walk_is_eulers_with_guidance_in_each_step():
    model = tiny(guidance=3.0, guidance_length=0.5, time_shift=2.0)
    noise, z_q = torch.randn(2, 1, 8, 12), torch.randn(2, 2, 1, 4)
    x, last = noise, torch.zeros(2, 96)
    for t, then in ((1, 4 / 5), (4 / 5, 1 / 2), (1 / 2, 0)):  # 2 t / (1 + t) of thirds
        times = torch.full((2,), t)
        given = model.decoder(x, times, z_q).flatten(1)
        without = model.decoder(x, times, z_q[..., :0]).flatten(1)
        last = given - without - 0.5 * last
        moved = last * (0.5 / last.norm(dim=1, keepdim=True)).clamp(max=1)
        unit = given / given.norm(dim=1, keepdim=True)
        moved = moved - (moved * unit).sum(1, keepdim=True) * unit
        x = x + (t - then) * (given + 2 * moved).view_as(x)
    torch.testing.assert_close(model.walk(noise, z_q), x, rtol=1e-4, atol=1e-5)
    assert (model.walk(noise, z_q) - tiny().walk(noise, z_q)).abs().max() > 1e-4


@torch.no_grad()
def test_the_same_codes_become_the_same_image_in_any_batch_and_other_seeds_others():
    model, images = tiny(), some_images(6)
    codes = model.encode(images)
    together = model.decode(codes)
    torch.manual_seed(99)
    for number in range(6):
        torch.testing.assert_close(model.decode((codes[0][number : number + 1],))[0], together[number])
    assert torch.equal(model.decode(codes), together)
    other = tiny(noise_seed=1)
    assert (other.decode(codes) - together).abs().max() > 0.01


def test_fewer_tokens_begin_with_the_same_noise_and_another_first_token_with_another():
    model = tiny()
    codes = torch.tensor([[[3, 1, 4, 1, 5, 9]], [[3, 0, 0, 0, 0, 0]], [[2, 1, 4, 1, 5, 9]]])
    noise = model.noise_of((codes,))
    assert torch.equal(noise[0], noise[1])
    assert not (noise[0] == noise[2]).any()
    assert torch.equal(model.noise_of((codes[..., :2],)), noise)


@torch.no_grad()
def test_steps_and_guidance_can_be_chosen_and_are_part_of_what_the_model_is(tmp_path):
    model, images = tiny(), some_images()
    codes, before = model.encode(images), model.fingerprint()
    three = model.decode(codes)
    model.decode_in_steps(2)
    two = model.decode(codes)
    model.decode_guided(4.0)
    guided = model.decode(codes)
    assert min((two - three).abs().max(), (guided - two).abs().max()) > 1e-4
    assert model.fingerprint() != before == model.codes_fingerprint()
    loaded = FlexTok.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert (loaded.config.steps, loaded.config.guidance) == (2, 4.0)
    assert torch.equal(loaded.decode(codes), guided)
    with pytest.raises(UserError, match=r"steps=0, expected at least 1"):
        model.decode_in_steps(0)
    with pytest.raises(UserError, match=r"guidance=0.5, expected 1 \(none\) or more"):
        model.decode_guided(0.5)
    with pytest.raises(UserError, match=r"guidance=2.0, expected 1 where model.unconditional=0"):
        tiny(unconditional=0.0).decode_guided(2.0)
    with pytest.raises(UserError, match="a guidance of 2, but the decoder of a vqvae model was never without codes"):
        make_autoencoder("vqvae").decode_guided(2)


def test_time_noise_and_every_token_count():
    model = tiny()
    x, z_q, t = torch.randn(1, 1, 8, 12), torch.randn(1, 2, 1, 6), torch.tensor([0.5])
    velocity = model.decoder(x, t, z_q)
    others = [(x + 0.1, t, z_q), (x, t + 0.1, z_q), (x, t, z_q.flip(-1))]
    for token in range(6):
        changed = z_q.clone()
        changed[..., token] += 1
        others.append((x, t, changed))
    for other in others:
        assert (model.decoder(*other) - velocity).abs().max() > 1e-5


def test_the_defaults_are_of_the_papers_smallest():
    with torch.device("meta"):
        model = FlexTok(FlexTokConfig(), (256, 256))
    assert model.code_spec().describe() == "1x256 codes of 64000 (256x256x3 images)"
    for half in (model.encoder, model.decoder):
        assert len(half.blocks) == 12
        attention = half.blocks[0].attention
        assert attention.query.in_features // attention.heads == 64
        assert attention.query.bias is None
        assert half.blocks[0].mlp.gate.out_features == 2048


# ---- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0, expected at least 1"),
        ({"decoder_blocks": 0}, "decoder_blocks=0, expected at least 1"),
        ({"encoder_width": 15}, "encoder_width=15, expected a multiple of model.encoder_heads=2"),
        ({"decoder_width": 22}, "decoder_width=22, expected a multiple of 4"),
        ({"decoder_width": 12}, "decoder_width=12, expected at least 16, the numbers of a patch of model.patch=4"),
        ({"time_shift": 0.0}, "time_shift=0.0, expected above 0"),
        ({"nested": "halves"}, "nested=halves, expected powers-of-two, uniform, uniform-powers-of-two, or null"),
        ({"tokens": 1}, "nested=powers-of-two, expected null with model.tokens=1, or more tokens"),
        ({"unconditional": 1.0}, "unconditional=1.0, expected a share from 0 to below 1"),
        ({"times": "late"}, "times=late, expected stratified, logit-normal or mode"),
        ({"guidance": 0.0}, r"guidance=0.0, expected 1 \(none\) or more"),
        ({"guidance": 2.0, "unconditional": 0.0}, "guidance=2.0, expected 1 where model.unconditional=0"),
        ({"guidance_form": "loud"}, "guidance_form=loud, expected normalised or plain"),
        ({"guidance_length": 0.0}, "guidance_length=0.0, expected above 0"),
        ({"noise_seed": -1}, "noise_seed=-1, expected 0 or more"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)


def test_a_quantizer_with_scales_is_refused():
    quantizer = MultiscaleQuantizerConfig(scales=(1, 2), codebook_size=8, dim=4, phis=2)
    with pytest.raises(UserError, match="expected a code for each: take a quantizer without scales"):
        tiny(quantizer=quantizer)
