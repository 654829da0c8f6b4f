"""What every quantizer and every autoencoder owes its users: tables of classes times properties.

A new class is one row in a table; a test fails until it has one.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.model_io import load_pretrained
from pipelines.fields import kinds_of
from stage1_vq.autoencoders import (
    AUTOENCODERS,
    AutoencoderConfig,
)
from stage1_vq.quantizers import (
    QUANTIZERS,
    QuantizerConfig,
)
from tests.stage1_vq.tiny import (
    AUTOENCODER_ROWS,
    IMAGE_SIZE,
    QUANTIZER_ROWS,
    assert_equal_states,
    images_for,
    latents,
    make_autoencoder,
    make_quantizer,
    state,
)


def test_no_class_is_missing_from_the_tables():
    assert {config.kind for config in QUANTIZER_ROWS.values()} == set(QUANTIZERS) == set(kinds_of(QuantizerConfig))
    assert {config.kind for config in AUTOENCODER_ROWS.values()} == set(AUTOENCODERS)
    assert set(AUTOENCODERS) == set(kinds_of(AutoencoderConfig))


def test_each_kind_names_its_own_classes():
    for kind, quantizer in QUANTIZERS.items():
        assert quantizer.config_class is kinds_of(QuantizerConfig)[kind]
    for kind, autoencoder in AUTOENCODERS.items():
        assert autoencoder.kind == kind
        assert autoencoder.config_class is kinds_of(AutoencoderConfig)[kind]


# ---- quantizers -----------------------------------------------------------------------------------------------------

each_quantizer = pytest.mark.parametrize("row", QUANTIZER_ROWS)


@each_quantizer
def test_codes_fit_the_grids_and_latents_keep_their_shape(row):
    quantizer, z = make_quantizer(row), latents(3)
    quantized = quantizer(z)
    assert quantized.z_q.shape == (3, quantizer.dim_out, 4, 5)
    for codes, grid in zip(quantized.codes, quantizer.grids(4, 5), strict=True):
        assert codes.shape == (3, grid.height, grid.width)
        assert codes.dtype == torch.int64
        assert 0 <= codes.min() <= codes.max() < grid.vocabulary


@each_quantizer
def test_codes_are_enough_to_rebuild_the_latents(row):
    quantizer, z = make_quantizer(row).eval(), latents(3)
    quantized = quantizer(z)
    assert all(torch.equal(one, other) for one, other in zip(quantizer.codes(z), quantized.codes, strict=True))
    torch.testing.assert_close(quantizer.codes_to_latents(quantized.codes), quantized.z_q)


@each_quantizer
def test_codes_of_an_image_do_not_depend_on_its_batch(row):
    quantizer, z = make_quantizer(row).eval(), latents(7)
    alone = [quantizer.codes(image) for image in z.split(1)]
    for number, together in enumerate(quantizer.codes(z)):
        assert torch.equal(together, torch.cat([codes[number] for codes in alone]))


@each_quantizer
def test_after_a_beginning_of_its_own_come_its_own_codes_and_after_another_none_that_fit_worse(row):
    """Codes of grids that somebody else chose stay, and those of later grids make up for them as far as they can."""
    quantizer, z = make_quantizer(row).eval(), latents(3)
    own, other = quantizer.codes(z), quantizer.codes(latents(3, seed=2))
    for number in range(len(own)):
        completed = quantizer.codes_after(z, own[:number])
        assert all(map(torch.equal, completed, own))
    for number in range(1, len(own)):
        made_up = quantizer.codes_after(z, other[:number])
        assert all(map(torch.equal, made_up[:number], other[:number]))
        with torch.no_grad():
            error, former = (
                (quantizer.codes_to_latents(codes) - quantizer.codes_to_latents(own)).square().mean()
                for codes in (made_up, (*other[:number], *own[number:]))
            )
        dependent = row.startswith(
            (
                "residual",
                "qinco",
                "multiscale",
                "hierarchical",
                "grouped residual",
                "grouped multiscale",
                "diveq, residual",
            )
        )
        assert error < former if dependent else error == former


@each_quantizer
def test_losses_are_means_so_that_they_do_not_depend_on_the_batch_size(row):
    quantizer, z = make_quantizer(row).eval(), latents(3)
    one, many = quantizer(z).losses, quantizer(z.repeat(5, 1, 1, 1)).losses
    assert one.keys() == many.keys()
    for name in one:
        assert one[name].ndim == 0
        torch.testing.assert_close(one[name], many[name])


@each_quantizer
def test_gradients_reach_the_latents_and_every_weight(row):
    quantizer, z = make_quantizer(row), latents(3).requires_grad_()
    quantized = quantizer(z)
    target = torch.randn(quantized.z_q.shape, generator=torch.Generator().manual_seed(2))
    ((quantized.z_q - target).square().mean() + sum(quantized.losses.values())).backward()
    assert z.grad.abs().min() > 0
    for name, weight in quantizer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


@each_quantizer
def test_a_forward_pass_leaves_the_state_alone_and_in_eval_mode_nothing_to_update_from(row):
    quantizer = make_quantizer(row)
    before = state(quantizer)
    quantizer(latents(3))
    assert_equal_states(state(quantizer), before)
    quantizer.discard()
    waiting = dict(quantizer.named_buffers())
    waiting = {name: tensor.clone() for name, tensor in waiting.items()}
    quantizer.eval()(latents(3))
    assert_equal_states(dict(quantizer.named_buffers()), waiting)


@each_quantizer
def test_micro_batches_equal_one_batch(row):
    whole, split = make_quantizer(row), make_quantizer(row)
    for step in range(4):
        z = latents(6, seed=step)
        whole(z)
        for part in z.split(2):
            split(part)
        for quantizer in (whole, split):
            torch.manual_seed(step)
            quantizer.update()
    assert_equal_states(state(whole), state(split), tolerance=1e-5)


@each_quantizer
def test_a_skipped_step_leaves_no_trace(row):
    skipped, clean = make_quantizer(row), make_quantizer(row)
    for step in range(4):
        skipped(latents(3, seed=100 + step) * torch.nan)
        skipped.discard()
        for quantizer in (skipped, clean):
            quantizer(latents(3, seed=step))
            torch.manual_seed(step)
            quantizer.update()
    assert_equal_states(state(skipped), state(clean))


@each_quantizer
def test_a_model_cast_to_bfloat16_and_back_keeps_its_quantizer_to_the_last_bit(row):
    quantizer, z = make_quantizer(row).eval(), latents(2)
    expected, before = quantizer(z), {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    nn.ModuleList([quantizer]).bfloat16()
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    found = quantizer(z)
    assert torch.equal(found.z_q, expected.z_q)
    assert quantizer(z.bfloat16()).z_q.dtype == torch.bfloat16
    assert all(tensor.device.type == "meta" for tensor in quantizer.to("meta").state_dict().values())


@each_quantizer
def test_bfloat16_autocast_gives_the_codes_of_float32(row):
    quantizer, z = make_quantizer(row).eval(), latents(20)
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer.codes(z)
    assert all(torch.equal(one, other) for one, other in zip(under, quantizer.codes(z), strict=True))


@each_quantizer
def test_health_is_scalars_by_name(row):
    quantizer = make_quantizer(row)
    quantizer(latents(3))
    quantizer.update()
    health = quantizer.health(steps_per_epoch=3)
    for name, value in health.items():
        assert value.ndim == 0, name
        assert value.isfinite(), name


# ---- autoencoders ---------------------------------------------------------------------------------------------------

each_autoencoder = pytest.mark.parametrize("row", AUTOENCODER_ROWS)


@each_autoencoder
@pytest.mark.parametrize("size", [IMAGE_SIZE, (8, 8), (32, 16)])
def test_codes_are_as_the_code_spec_says_and_decode_to_images_of_that_size(row, size):
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 3, size=size)
    if not autoencoder.codes_have_places and size != IMAGE_SIZE:
        with pytest.raises(UserError, match=f"{size[0]}x{size[1]} images, expected 16x24: "):
            autoencoder.encode(images)
        return
    codes = autoencoder.encode(images)
    autoencoder.code_spec(*size).check(codes)
    assert all(grid.dtype == torch.int64 for grid in codes)
    decoded = autoencoder.decode(codes)
    assert decoded.shape == images.shape
    assert -1 <= decoded.min() <= decoded.max() <= 1
    assert autoencoder.code_spec() == autoencoder.code_spec(*IMAGE_SIZE)


@each_autoencoder
def test_completing_what_somebody_else_began_keeps_it_and_of_its_own_beginnings_makes_encode(row):
    autoencoder = make_autoencoder(row).eval()
    images, others = images_for(autoencoder, 2), images_for(autoencoder, 2, seed=2)
    with torch.no_grad():
        own, other, complete = autoencoder.encode(images), autoencoder.encode(others), autoencoder.completing(images)
        for number in range(len(own) + 1):
            assert all(map(torch.equal, complete(own[:number]), own))
            mixed = complete(other[:number])
            assert all(map(torch.equal, mixed[:number], other[:number]))
            autoencoder.code_spec(*IMAGE_SIZE).check(mixed)


@each_autoencoder
def test_decoding_the_codes_gives_the_reconstruction(row):
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 3)
    output = autoencoder(images)
    codes = autoencoder.encode(images)
    assert all(torch.equal(one, other) for one, other in zip(codes, output.codes, strict=True))
    torch.testing.assert_close(autoencoder.decode(codes), output.reconstruction.clamp(-1, 1))


@each_autoencoder
def test_an_image_does_not_depend_on_its_batch(row):
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 5)
    together = autoencoder.encode(images)
    alone = [autoencoder.encode(image) for image in images.split(1)]
    for number, codes in enumerate(together):
        assert torch.equal(codes, torch.cat([one[number] for one in alone]))
    torch.testing.assert_close(autoencoder.decode(together), torch.cat([autoencoder.decode(one) for one in alone]))


@each_autoencoder
def test_one_loss_trains_every_weight_and_is_a_mean(row):
    autoencoder = make_autoencoder(row)
    images = images_for(autoencoder, 3)
    losses = autoencoder.eval()(images).losses  # without the noise that some quantizers have in training
    again = autoencoder(images.repeat(4, 1, 1, 1)).losses
    for name, loss in losses.items():
        assert loss.ndim == 0
        torch.testing.assert_close(loss, again[name])
    torch.stack(list(autoencoder.train()(images).losses.values())).sum().backward()
    for name, weight in autoencoder.named_parameters():  # DistributedDataParallel waits for each of them
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


@each_autoencoder
def test_a_model_folder_brings_the_same_model_back(row, tmp_path):
    autoencoder = make_autoencoder(row)
    images = images_for(autoencoder, 3)
    autoencoder(images)
    autoencoder.update()
    folder = autoencoder.save_pretrained(tmp_path / "model")
    loaded = load_pretrained(folder, AUTOENCODERS)
    assert type(loaded) is type(autoencoder)
    assert loaded.fingerprint() == autoencoder.fingerprint()
    assert json.loads(json.dumps(loaded.arguments())) == json.loads(json.dumps(autoencoder.arguments()))
    assert loaded.code_spec() == autoencoder.code_spec()
    autoencoder.eval()
    assert torch.equal(loaded.decode(loaded.encode(images)), autoencoder.decode(autoencoder.encode(images)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each_autoencoder
def test_cast_to_another_type_it_runs_and_comes_back_from_its_folder_as_it_was_saved(row, dtype, tmp_path):
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 2)
    in_float32 = autoencoder.decode(autoencoder.encode(images))
    autoencoder.to(dtype)
    types = {name: tensor.dtype for name, tensor in autoencoder.state_dict().items() if tensor.is_floating_point()}
    assert dtype in types.values()
    assert all(kind == (torch.float32 if "quantizer" in name else dtype) for name, kind in types.items())
    codes = autoencoder.encode(images)
    decoded = autoencoder.decode(codes)
    autoencoder.code_spec().check(codes)
    assert decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()
    if dtype == torch.float64:
        assert (decoded - in_float32).abs().max() < 1e-4
    bits = autoencoder.decoder_bits(images, codes)
    assert bits is None or torch.isfinite(bits).all()
    loaded = load_pretrained(autoencoder.save_pretrained(tmp_path / "model"), AUTOENCODERS)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in autoencoder.state_dict().items()
    }
    assert loaded.fingerprint() == autoencoder.fingerprint()
    again = loaded.encode(images)
    assert all(torch.equal(grid, same) for grid, same in zip(again, codes, strict=True))
    assert torch.equal(loaded.decode(codes), decoded)


@each_autoencoder
def test_bfloat16_autocast_gives_finite_losses_and_valid_codes(row):
    autoencoder = make_autoencoder(row)
    images = images_for(autoencoder, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = autoencoder(images)
    autoencoder.code_spec().check(output.codes)
    for name, loss in output.losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.isfinite(), name


@each_autoencoder
@pytest.mark.parametrize("size", [(16, 25), (18, 24), (0, 8)])
def test_a_size_off_the_stride_is_refused_with_one_that_fits(row, size):
    autoencoder = make_autoencoder(row)
    with pytest.raises(UserError, match=f"cannot encode {size[0]}x{size[1]} images: both sides must be multiples of"):
        autoencoder.encode(images_for(autoencoder, 1, size=size))
    with pytest.raises(UserError, match="both sides must be multiples of"):
        autoencoder.code_spec(*size)
    with pytest.raises(UserError, match="both sides must be multiples of"):
        type(autoencoder)(autoencoder.config, size)


@each_autoencoder
def test_images_of_the_wrong_kind_are_refused(row):
    autoencoder = make_autoencoder(row)
    with pytest.raises(UserError, match=r"got images of shape \(2, 7, 16, 16\), expected \(batch, "):
        autoencoder.encode(torch.zeros(2, 7, 16, 16))
    with pytest.raises(UserError, match=r"got images of type torch.uint8, expected floats in \[-1, 1\]"):
        autoencoder.encode(torch.zeros(2, autoencoder.channels, 16, 16, dtype=torch.uint8))


@each_autoencoder
def test_codes_that_are_none_are_refused(row):
    autoencoder = make_autoencoder(row)
    codes = autoencoder.encode(images_for(autoencoder, 2))
    with pytest.raises(UserError, match="grids, expected"):
        autoencoder.decode((*codes, codes[0]))
    with pytest.raises(UserError, match="holds codes from"):
        autoencoder.decode(tuple(grid + 10**6 for grid in codes))
    with pytest.raises(UserError, match=r"has shape \(\d+,\), expected \d+x\d+"):
        autoencoder.decode(tuple(grid.flatten(1) for grid in codes))
    with pytest.raises(UserError, match="got codes of 0 grids, expected"):
        autoencoder.decode(())


SUMS = (
    "vqvae, multiscale",
    "vqvae, grouped multiscale",
    "titok, grey, nested, residual",
    "flow_decoder, grey, one step, two grids",
    "infinity_tokenizer",
    "flextok, grey, nested, residual",
)


@each_autoencoder
@torch.no_grad()
def test_first_grids_decode_where_the_others_only_add_and_are_refused_elsewhere(row):
    """All of them are the whole; those of a sum tell of it, whatever the size of the image."""
    autoencoder = make_autoencoder(row).eval()
    images = images_for(autoencoder, 2)
    codes = autoencoder.encode(images)
    if row not in SUMS:
        # Of a single grid there is none without the others.
        with pytest.raises(UserError, match=r"grids, expected 1 to|all of use|expected those of all"):
            autoencoder.decode_first((*codes, codes[0]) if len(codes) == 1 else codes[:1], *IMAGE_SIZE)
        return
    step = 2 if row == "vqvae, grouped multiscale" else 1
    torch.testing.assert_close(autoencoder.decode_first(codes, *IMAGE_SIZE), autoencoder.decode(codes))
    for count in range(step, len(codes), step):
        first = autoencoder.decode_first(codes[:count], *IMAGE_SIZE)
        assert first.shape == images.shape
        assert not torch.equal(first, autoencoder.decode(codes))
        changed = tuple((grid + 1) % 16 for grid in codes[:count])
        assert not torch.equal(autoencoder.decode_first(changed, *IMAGE_SIZE), first)
    if step == 2:
        with pytest.raises(UserError, match="got codes of 1 grid, expected a multiple of 2"):
            autoencoder.decode_first(codes[:1], *IMAGE_SIZE)
    if autoencoder.codes_have_places:
        larger = images_for(autoencoder, 2, size=(32, 16))
        assert autoencoder.decode_first(autoencoder.encode(larger)[:step], 32, 16).shape == larger.shape
        with pytest.raises(UserError, match="has shape"):
            autoencoder.decode_first(autoencoder.encode(larger)[: 2 * step], *IMAGE_SIZE)
