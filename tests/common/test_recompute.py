"""Activations that are recomputed: the same gradients and statistics to the last bit, for every family, in less
memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from common.recompute import Recomputation, blocks_of, once_agreed, recomputing
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.vdvae import VDVAEConfig
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.models import build_model
from stage1_vae.networks import ConvolutionalConfig
from stage1_vae.networks.batch_norm import take_all_noted
from stage1_vae.objectives.terms import elbo
from stage1_vae.vae import VAEConfig
from stage1_vq.autoencoders import AUTOENCODERS, Stage1Output, VQGANConfig
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, TransformerConfig
from tests.stage1_vae.hierarchies.test_conformance import ROWS as HIERARCHIES
from tests.stage1_vq.tiny import AUTOENCODER_ROWS, IMAGE_SIZE, TINY_NEAREST
from tests.stage2_prior.tiny import TINY, random_codes, spec_of


def of_images(output: Stage1Output) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


class Family:
    """A model in training, and how one of its losses is computed and a step ended."""

    def __init__(self, build: Callable[[], nn.Module], loss: Callable[[Any], Tensor], end: Callable[[Any], Any]):
        self.build, self.loss, self.end = build, loss, end

    def step(self, *, recompute: bool) -> dict[str, Tensor]:
        """Gradients, and all that the model holds when the step has ended."""
        torch.manual_seed(0)
        model = self.build().train()
        self.loss(model).backward()  # so that a codebook's first step is none
        self.end(model)
        model.zero_grad()
        torch.manual_seed(1)
        with Recomputation(blocks_of(model)).on() if recompute else nullcontext():
            loss = self.loss(model)
        loss.backward()
        self.end(model)
        gradients = {f"gradient of {name}": weight.grad for name, weight in model.named_parameters()}
        held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return {**{name: grad for name, grad in gradients.items() if grad is not None}, **held, "loss": loss.detach()}


def autoencoder(row: str) -> Family:
    config = AUTOENCODER_ROWS[row]

    def build() -> nn.Module:
        return AUTOENCODERS[config.kind](config, IMAGE_SIZE)

    return Family(
        build,
        lambda model: of_images(model(torch.rand(3, model.channels, *IMAGE_SIZE) * 2 - 1)),
        lambda model: model.update(),
    )


def vqgan(**settings: Any) -> Family:
    config = VQGANConfig(z_channels=6, attention_levels=(), quantizer=TINY_NEAREST, **settings)
    return Family(
        lambda: AUTOENCODERS["vqgan"](config, (16, 16)),
        lambda model: of_images(model(torch.rand(2, 3, 16, 16) * 2 - 1)),
        lambda model: model.update(),
    )


def prior(config: Any) -> Family:
    """config: or its kind, of those that are tiny."""
    config = TINY[config] if isinstance(config, str) else config

    def loss(model: Any) -> Tensor:
        return model(random_codes(3, model), Condition(torch.tensor([0, 1, 2]))).loss.mean()

    return Family(lambda: PRIORS[config.kind](config, spec_of(config.kind), 4), loss, lambda model: None)


def vae(config: Any, size: tuple[int, int], channels: int) -> Family:
    def loss(model: Any) -> Tensor:
        return -elbo(model((torch.rand(4, channels, *size) > 0.5).float() * 2 - 1)).mean()

    return Family(lambda: build_model(config, size, Binarised("once", 0)), loss, take_all_noted)


CONVOLUTIONAL = ConvolutionalConfig(widths=(4, 6), residual_blocks=2)
FAMILIES: dict[str, Family] = {
    # Codebooks by EMA, which count latents, and revive codes from them; by gradient; scales of one sum; layers.
    **{
        f"autoencoder, {row}": autoencoder(row)
        for row in ("vqvae", "vqvae2, three levels, grey, residual", "vqvae, multiscale", "dvae", "vqgan", "vit_vqgan")
    },
    **{
        f"prior, {kind}": prior(kind)
        for kind in ("pixelcnn", "rq_transformer", "hierarchical", "var", "infinity", "maskgit")
    },
    "prior, transformer with dropout": prior(TransformerConfig(layers=2, width=16, heads=2, residual_dropout=0.3)),
    "VAE, convolutional": vae(VAEConfig(encoder=CONVOLUTIONAL, decoder=CONVOLUTIONAL, latents=3), (8, 8), 1),
    # Batch norms in NVAE and in the ladder; blocks of VD-VAE hand out more than they return.
    **{f"VAE, {name}": vae(HIERARCHIES[name].config, (4, 4), 1) for name in ("NVAE", "VD-VAE", "ladder")},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_statistics_are_the_same_to_the_last_bit(name: str):
    plain, recomputed = (FAMILIES[name].step(recompute=recompute) for recompute in (False, True))
    assert plain.keys() == recomputed.keys()
    assert [name for name, tensor in plain.items() if not torch.equal(tensor, recomputed[name])] == []


def peak(family: Family, *, recompute: bool) -> int:
    """Bytes of tensors at the fullest moment of a forward and backward pass."""
    torch.manual_seed(0)
    model = family.build().train()
    with MemTracker() as tracker, Recomputation(blocks_of(model) if recompute else []).on():
        family.loss(model).backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


DEEP = ConvolutionalConfig(widths=(8,), residual_blocks=8)
DEEP_VDVAE = VDVAEConfig(
    channels=1,
    width=16,
    latents=1,
    encoder_layers="8x5",
    decoder_layers="8x5",
    likelihood=BernoulliConfig(),
)


@pytest.mark.parametrize(
    ("family", "share"),
    [
        (prior(TransformerConfig(layers=6, width=16, heads=2)), 0.6),
        (vae(VAEConfig(encoder=DEEP, decoder=DEEP, latents=3), (16, 16), 1), 0.6),
        (vae(DEEP_VDVAE, (8, 8), 1), 0.6),
        # Its blocks keep two maps each for themselves (stage1_vq/networks/group_norm.py), and one when recomputed.
        (vqgan(width=8, norm_groups=4, multipliers=(1, 1), residual_blocks=3), 0.85),
    ],
    ids=["prior", "VAE", "hierarchy", "autoencoder"],
)
def test_the_fullest_moment_takes_less_memory(family: Family, share: float):
    assert peak(family, recompute=True) < share * peak(family, recompute=False)


def test_what_notes_and_what_is_a_model_is_no_block():
    quantized, hierarchical = (
        FAMILIES["autoencoder, vqvae2, three levels, grey, residual"],
        FAMILIES["prior, hierarchical"],
    )
    assert {type(block).__name__ for block in blocks_of(quantized.build())} == {"ResidualBlock"}
    assert {type(block).__name__ for block in blocks_of(hierarchical.build())} == {"Layer", "Block"}


class Counting(nn.Module):
    """Counts how often it is computed, and what it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.computed = self.noted = self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.computed += 1
        if not recomputing():
            self.noted += 1

        def ask() -> Tensor:
            self.asked += 1
            return x.detach().mean(0)

        return (self.linear(x) * once_agreed(ask)).tanh()


def test_a_graph_that_is_gone_through_twice_notes_and_asks_once():
    model = nn.Sequential(Counting(), Counting())
    x = torch.randn(4, 3, requires_grad=True)
    with Recomputation(blocks_of(model)).on():
        loss = model(x).square().sum()
    assert not recomputing()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    again = torch.autograd.grad(loss, x)[0]
    plain = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert torch.equal(first, again)
    assert torch.equal(first, plain)
    for block in model:
        assert (block.computed, block.noted, block.asked) == (4, 2, 2)
        assert "forward" not in vars(block)


def test_without_gradients_nothing_is_kept_to_recompute():
    model = nn.Sequential(Counting())
    with Recomputation(blocks_of(model)).on(), torch.no_grad():
        model(torch.randn(4, 3))
    assert (model[0].computed, model[0].noted) == (1, 1)


def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, x = nn.Sequential(nn.Sequential(Counting()), Counting()), torch.randn(4, 3)
    model(x).square().sum().backward()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    called = torch.compile(model)
    with Recomputation(blocks_of(model), compiled=True).on():
        loss = called(x).square().sum()
    loss.backward()
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
