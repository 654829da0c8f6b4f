"""DiVeQ and NSVQ beside the packages of both and vector-quantize-pytorch 1.32 (`vqp132_*`): codes equal,
values and gradients within 1e-5.

What theirs draw is drawn by ours from the same numbers. Not among ours:

| theirs | ours |
|---|---|
| space-filling inference: the nearest point of the line | the nearest code vector, so that codes say all of z_q |
| SFDIVEQDetach: the direction to the first end of a segment, twice | to each of its ends |
| SFDIVEQ's `skip_iters`: no quantization at first | k-means on the first batch |
| residual and product space-filling | the space-filling variant has one codebook |
| ResidualVQ DiVeQ in eval mode: a noisy step | the sum of the code vectors |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from stage1_vq.quantizers import (
    DiVeQConfig,
    DiVeQuantizer,
    diveq,
)
from tests.golden import golden_frontier
from tests.stage1_vq.published.beside import (
    as_codes,
    as_latents,
    close,
    draws_from,
    rows_as_latents,
    variant_of,
)


def diveq_of(weights: dict[str, Tensor], **settings: Any) -> DiVeQuantizer:
    """With the codebooks of a reference: k d, or one for each layer."""
    codebook = weights["codebook"]
    books = codebook if codebook.ndim == 3 else codebook.unsqueeze(0)
    count = settings.get("groups", 1)
    settings = {"codebook_size": books.shape[1], "dim": count * books.shape[2], "depth": len(books) // count} | settings
    quantizer = DiVeQuantizer(DiVeQConfig(**settings))
    with torch.no_grad():
        for layer, book in zip(quantizer.stack(), books, strict=True):
            layer.codebook.copy_(book)
    return quantizer


def codebook_gradients(quantizer: DiVeQuantizer, like: Tensor) -> Tensor:
    gradients = [layer.codebook.grad for layer in quantizer.stack()]
    assert all(gradient is not None for gradient in gradients)
    return torch.stack(gradients).view_as(like)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("diveq", "product"),
        ("nsvq", "product"),
        ("diveq", "plain"),
        ("diveq", "detach"),
        ("diveq", "residual"),
        ("nsvq", "plain"),
        ("nsvq", "diveq"),
        ("nsvq", "residual"),
    ],
)
def test_diveq_and_nsvq(file, variant, monkeypatch):
    config, weights, inputs, outputs = variant_of(golden_frontier(file), variant)
    arguments = config["args"]
    if file == "diveq":
        settings = {"noise": 0.0 if variant == "detach" else arguments.get("noise_var", 1e-3)}
    elif arguments.get("diveq"):
        settings = {"noise": arguments["diveq_noise_var"]}
    else:
        settings = {"direction": "random"}
    if variant == "product":
        settings["groups"] = arguments["num_codebooks"]
    quantizer = diveq_of(weights, **settings)
    draws_from(monkeypatch, diveq, "normal_like", [rows_as_latents(inputs["normal"][0])])

    z = rows_as_latents(inputs["z"]).requires_grad_()
    quantized = quantizer(z)
    codes = torch.stack([grid.flatten() for grid in quantized.codes])
    assert torch.equal(codes.view_as(outputs["train/indices"]), outputs["train/indices"])
    close(quantized.z_q, rows_as_latents(outputs["train/z_q"]))
    assert not quantized.losses
    (quantized.z_q * rows_as_latents(inputs["cotangent"])).sum().backward()
    close(z.grad, rows_as_latents(outputs["grad/z"]))
    close(codebook_gradients(quantizer, outputs["grad/codebook"]), outputs["grad/codebook"])

    close(quantizer.eval()(z).z_q, rows_as_latents(outputs["inference/z_q"]))
    assert torch.equal(
        torch.stack([grid.flatten() for grid in quantizer.codes(z)]).view_as(outputs["inference/indices"]),
        outputs["inference/indices"],
    )


def test_space_filling_diveq(monkeypatch):
    config, weights, inputs, outputs = variant_of(golden_frontier("diveq"), "sf")
    quantizer = diveq_of(weights, space_filling=True, noise=config["args"]["noise_var"])
    draws_from(monkeypatch, diveq, "normal_like", [rows_as_latents(noise) for noise in inputs["normal"]])
    draws_from(monkeypatch, diveq, "uniform_of_step", [inputs["dither"].flatten()])
    z = rows_as_latents(inputs["z"]).requires_grad_()
    quantized = quantizer(z)
    close(quantized.z_q, rows_as_latents(outputs["train/z_q"]))
    (quantized.z_q * rows_as_latents(inputs["cotangent"])).sum().backward()
    close(z.grad, rows_as_latents(outputs["grad/z"]))
    close(codebook_gradients(quantizer, outputs["grad/codebook"]), outputs["grad/codebook"])


def test_diveq_of_vector_quantize(monkeypatch):
    config, weights, inputs, outputs = variant_of(golden_frontier("vqp132_vectorquantize"), "diveq")
    assert config["args"]["directional_reparam"]
    quantizer = diveq_of({"codebook": weights["_codebook.embed"][0]}, noise=5e-3**0.5)
    noise = rearrange(inputs["noise"], "(b n d) -> b d n 1", b=2, n=12)
    draws_from(monkeypatch, diveq, "normal_like", [noise])
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["train/indices"]))
    close(quantized.z_q, as_latents(outputs["train/quantized"]))
    (quantized.z_q * as_latents(inputs["cotangent"])).sum().backward()
    close(z.grad, as_latents(outputs["grad/x"]))
    close(quantizer.stack()[0].codebook.grad, outputs["grad/_codebook.embed"][0])
    close(quantizer.eval()(z).z_q, as_latents(outputs["eval/quantized"]))


def test_residual_diveq_of_residual_vq(monkeypatch):
    """Its codes and the training step; in eval mode theirs adds noise, ours is the plain sum, `output_from_indices`."""
    _, weights, inputs, outputs = variant_of(golden_frontier("vqp132_residual"), "rvq_diveq")
    books = torch.cat([weights[f"layers.{number}._codebook.embed"] for number in range(3)])
    quantizer = diveq_of({"codebook": books}, noise=5e-3**0.5)
    draws_from(monkeypatch, diveq, "normal_like", [as_latents(inputs["noise"][1])])
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    codes = torch.stack([grid.squeeze(-1) for grid in quantized.codes], -1)
    assert torch.equal(codes, outputs["train/indices"])
    close(quantized.z_q, as_latents(outputs["train/quantized"]))
    (quantized.z_q * as_latents(inputs["cotangent"])).sum().backward()
    close(z.grad, as_latents(outputs["grad/x"]))
    for number, layer in enumerate(quantizer.stack()):
        close(layer.codebook.grad, outputs[f"grad/layers.{number}._codebook.embed"][0])
    close(quantizer.eval()(z).z_q, as_latents(outputs["eval/output_from_indices"]))
