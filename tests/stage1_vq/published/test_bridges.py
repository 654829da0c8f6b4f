"""FVQ's bridge beside vector-quantize-pytorch 1.32 (`vqp132_*`), and IBQ beside its repository: codes equal,
values and gradients within 1e-5, or 5e-5 for IBQ.

What theirs draw is drawn by ours from the same numbers. Not among ours:

| theirs | ours |
|---|---|
| VectorQuantize `vq_bridge`: codes are looked up in the table before the bridge | after it |
"""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from stage1_vq.quantizers import (
    FVQConfig,
    FVQuantizer,
    IBQConfig,
    IBQuantizer,
    diveq,
)
from stage1_vq.quantizers.soft_codes import soft_statistics
from tests.golden import golden_frontier, part
from tests.stage1_vq.published.beside import (
    as_codes,
    as_latents,
    close,
    draws_from,
    variant_of,
)

# ---- FVQ ------------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """The bridge of the reference: the table and a small MLP of it."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        layers = [nn.Linear(*weights[f"{number}.weight"].shape[::-1]) for number in (0, 2)]
        self.net = nn.Sequential(layers[0], nn.GELU(), layers[1])
        self.net.load_state_dict(weights)

    def forward(self, table: Tensor) -> Tensor:
        return table + self.net(table)


@pytest.mark.parametrize("variant", ["bridge", "bridge_ste"])
def test_codebook_bridge(variant):
    """Their commitment loss is one squared error with gradients to both sides: our two, the codebook's as weighted."""
    arguments, weights, inputs, outputs = variant_of(golden_frontier("vqp132_vectorquantize"), variant)
    arguments = arguments["args"]
    k, d = weights["_codebook.embed"].shape[1:]
    weight = arguments.get("commitment_weight", 1.0)
    gradient = "rotation" if arguments.get("rotation_trick", True) else "straight-through"
    config = FVQConfig(codebook_size=k, dim=d, patch=1, commitment_weight=weight, gradient=gradient)
    quantizer = FVQuantizer(config)
    quantizer.bridge = StandIn(part(weights, "_codebook.vq_bridge.net."))
    with torch.no_grad():
        quantizer.table.copy_(weights["_codebook.embed"][0])
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["train/indices"]))
    close(quantized.z_q, as_latents(outputs["train/quantized"]))
    close(quantized.losses["commitment_loss"], outputs["train/loss"])
    losses = quantized.losses["commitment_loss"] + weight * quantized.losses["codebook_loss"]
    ((quantized.z_q * as_latents(inputs["cotangent"])).sum() + losses).backward()
    close(z.grad, as_latents(outputs["grad/x"]))
    close(quantizer.table.grad, outputs["grad/_codebook.embed"][0])
    for name, parameter in quantizer.bridge.net.named_parameters():
        close(parameter.grad, outputs[f"grad/_codebook.vq_bridge.net.{name}"])

    found = quantizer.eval()(z)
    assert torch.equal(found.codes[0], as_codes(outputs["eval/indices"]))
    close(found.z_q, as_latents(outputs["eval/quantized"]))
    torch.testing.assert_close(quantizer.codes_to_latents(found.codes), found.z_q)


def test_codebook_bridge_with_the_directional_step(monkeypatch):
    _, weights, inputs, outputs = variant_of(golden_frontier("vqp132_vectorquantize"), "both")
    k, d = weights["_codebook.embed"].shape[1:]
    quantizer = FVQuantizer(FVQConfig(codebook_size=k, dim=d, patch=1, gradient="diveq", noise=5e-3**0.5))
    quantizer.bridge = StandIn(part(weights, "_codebook.vq_bridge.net."))
    with torch.no_grad():
        quantizer.table.copy_(weights["_codebook.embed"][0])
    noise = rearrange(inputs["noise"], "(b n d) -> b d n 1", b=2, n=12)
    draws_from(monkeypatch, diveq, "normal_like", [noise])
    z = as_latents(inputs["x"]).requires_grad_()
    quantized = quantizer(z)
    assert torch.equal(quantized.codes[0], as_codes(outputs["train/indices"]))
    close(quantized.z_q, as_latents(outputs["train/quantized"]))
    assert not quantized.losses
    (quantized.z_q * as_latents(inputs["cotangent"])).sum().backward()
    close(z.grad, as_latents(outputs["grad/x"]))
    close(quantizer.table.grad, outputs["grad/_codebook.embed"][0])
    for name, parameter in quantizer.bridge.net.named_parameters():
        close(parameter.grad, outputs[f"grad/_codebook.vq_bridge.net.{name}"])
    close(quantizer.eval()(z).z_q, as_latents(outputs["eval/quantized"]))


# ---- IBQ ------------------------------------------------------------------------------------------------------------


def test_ibq():
    """Codes by the largest product, three squared errors and the entropies, each with its gradients. Theirs has beta on
    the codebook's side, and 1e-5 inside the logarithm of the mean."""
    file = golden_frontier("ibq_tokenizer")
    config, outputs = file.config, file.outputs
    codebook = file.weights["quantize.embedding.weight"]
    quantizer = IBQuantizer(
        IBQConfig(
            codebook_size=config["n_embed"],
            dim=config["embed_dim"],
            commitment_weight=1.0,
            codebook_weight=config["beta"],
            entropy_weight=config["entropy_loss_weight"],
            temperature=config["entropy_temperature"],
        )
    )
    quantizer.load_state_dict({"codebook": codebook}, strict=False)
    for name in ("grad_output", "grad_quant_loss", "grad_entropy_loss"):
        quantizer.codebook.grad = None
        z = outputs["prequant"].clone().requires_grad_()
        quantized = quantizer(z)
        assert torch.equal(quantized.codes[0], outputs["indices"])
        close(quantized.z_q, outputs["quant"], 5e-5)
        squares = sum(quantized.losses[f"{part}_loss"] for part in ("index", "codebook", "commitment"))
        sample, mean = soft_statistics(quantizer.rows(z), quantizer.codebook, 1 / config["entropy_temperature"])
        entropies = sample + (mean * (mean + 1e-5).log()).sum()
        if name == "grad_output":
            (quantized.z_q * file.inputs["cotangent"]).sum().backward()
        else:
            (squares if name == "grad_quant_loss" else entropies).backward()
        close(z.grad, outputs[f"train/{name}/prequant"], 5e-5)
        close(quantizer.codebook.grad, outputs[f"train/{name}/embedding"], 5e-5)
    close(squares, outputs["train/quant_loss"], 5e-5)
    close(quantized.statistics["sample_entropy"], outputs["train/sample_entropy"], 5e-5)
    close(entropies, outputs["train/entropy_loss"], 5e-5)
    close(quantizer.codes_to_latents(quantized.codes), outputs["quant_from_indices"], 5e-5)
