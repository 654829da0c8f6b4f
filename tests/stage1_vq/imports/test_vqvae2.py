"""Weights of vq-vae-2-pytorch give its codes and images here, and its next training steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from stage1_vq.autoencoders.vqvae2 import VQVAE2
from stage1_vq.imports.vqvae2 import import_vqvae2
from tests.golden import Golden, golden, real_shapes


def imported(data: Golden) -> VQVAE2:
    return import_vqvae2(data.weights, data.config)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)


def test_codes_and_images_at_rest():
    data = golden("vqvae2")
    model, x = imported(data), data.inputs["x0"]
    assert model.image_size == (16, 32)
    codes = model.encode(x)
    for ours, level in zip(codes, "tb", strict=True):
        assert torch.equal(ours, data.outputs[f"id_{level}"])
    output = model(x)
    assert_same(output.reconstruction, data.outputs["recon"])
    assert_same(model.decode(codes), data.outputs["recon_from_codes"].clamp(-1, 1))
    for number, level in enumerate("tb"):
        assert_same(model.quantizers[number].codes_to_latents((codes[number],)), data.outputs[f"quant_{level}"])
    assert_same(sum(output.statistics.values()), data.outputs["diff"][0])


def test_three_training_steps_move_the_codebooks_alike():
    data = golden("vqvae2")
    model = imported(data).train()
    for step in range(3):
        x = data.inputs[f"x{step}"].clone().requires_grad_()
        output = model(x)
        for ours, level in zip(output.codes, "tb", strict=True):
            assert torch.equal(ours, data.outputs[f"step{step}/id_{level}"])
        assert_same(output.reconstruction, data.outputs[f"step{step}/recon"])
        if step == 0:
            loss = torch.stack(list(output.losses.values())).sum()
            assert_same(loss, data.outputs["step0/loss"])
            loss.backward()
            assert_same(x.grad, data.outputs["step0/grad/x"])
            assert_same(model.encoders[1][0].weight.grad, data.outputs["step0/grad/enc_b.blocks.0.weight"])
            assert_same(model.to_latents[0].weight.grad, data.outputs["step0/grad/quantize_conv_t.weight"])
        model.update()
        for quantizer, level in zip(model.quantizers, "tb", strict=True):
            after = f"step{step}/after/quantize_{level}"
            assert_same(quantizer.codebook.t(), data.outputs[f"{after}.embed"])
            assert_same(quantizer.entries.vector_sums.t(), data.outputs[f"{after}.embed_avg"])
            assert_same(quantizer.entries.cluster_sizes, data.outputs[f"{after}.cluster_size"])


def test_the_published_model_is_recognised_by_its_shapes():
    with torch.device("meta"):
        model = import_vqvae2({name: torch.empty(shape) for name, shape in real_shapes("vqvae2_default").items()})
    assert model.code_spec().describe() == "32x32 codes of 512 + 64x64 codes of 512 (256x256x3 images)"
    assert (model.config.width, model.config.residual_width, model.config.residual_blocks) == (128, 32, 2)
    assert model.config.quantizer.dim == 64


def test_missing_and_unexpected_names_are_told():
    data = golden("vqvae2")
    weights = {name: tensor for name, tensor in data.weights.items() if not name.startswith("upsample_t")}
    with pytest.raises(UserError, match=r"missing: upsample_t.weight, upsample_t.bias; not expected: extra\.weight\)"):
        import_vqvae2({**weights, "extra.weight": torch.zeros(1)})


def test_weights_of_something_else_are_refused():
    with pytest.raises(UserError, match=r"the weights have no quantize_t.embed of 2 axes: .* check --kind"):
        import_vqvae2({"encoder.weight": torch.zeros(3)})


def test_a_config_of_other_weights_is_refused():
    data = golden("vqvae2")
    with pytest.raises(UserError, match="the config has n_embed=64, but the weights are of a model with n_embed=32"):
        import_vqvae2(data.weights, {**data.config, "n_embed": 64})
