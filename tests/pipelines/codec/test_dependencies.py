"""A file depends on what decoding reads, and on nothing else: changed one by one, weights and fields change the result
and the fingerprint together."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from codes.spec import CodeSpec
from common.errors import UserError
from pipelines.codec.dependencies import NOT_READ, coding_fingerprint, decoding_fingerprint
from pipelines.codec.prior_coding import encode_with_prior
from stage1_vq.autoencoders import AUTOENCODERS, VQVAEConfig
from stage2_prior.condition import TextSpec
from stage2_prior.priors import PRIORS, Transformer, TransformerConfig
from tests.stage1_vq.tiny import AUTOENCODER_ROWS, IMAGE_SIZE, QUANTIZER_ROWS
from tests.stage2_prior.tiny import CLASSES, TINY, condition_for, random_codes, tiny_prior, tiny_spec

ROWS = AUTOENCODER_ROWS | {
    f"quantizer {row}": VQVAEConfig(width=8, residual_width=4, residual_blocks=1, quantizer=config)
    for row, config in QUANTIZER_ROWS.items()
}

OTHER_WEIGHTS = {"backbone", "backbone_pretrained", "text_loss_weight"}  # fields that decide which weights there are


def fresh(config: Any) -> Any:
    """An autoencoder whose weights are all different from zero and one."""
    torch.manual_seed(0)
    autoencoder = AUTOENCODERS[config.kind](config, IMAGE_SIZE).eval()
    for tensor in autoencoder.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.2 * torch.randn_like(tensor)
    return autoencoder


def decoded(autoencoder: Any) -> Tensor:
    """Images of fixed codes; of nested ones, some of all and some of the first ones."""
    generator = torch.Generator().manual_seed(1)
    codes = tuple(
        torch.randint(grid.vocabulary, (4, grid.height, grid.width), generator=generator)
        for grid in autoencoder.code_spec().grids
    )
    with torch.no_grad():
        images = autoencoder.decode(codes)
        if getattr(autoencoder.config, "nested", None) is None:
            return images
        return torch.cat([images, autoencoder.decode(tuple(grid[..., :2] for grid in codes))])


@pytest.mark.parametrize("row", ROWS)
def test_of_an_autoencoder_it_is_the_weights_that_decode_reads(row):
    autoencoder = fresh(ROWS[row])
    before, image = decoding_fingerprint(autoencoder), decoded(autoencoder)
    for name, tensor in autoencoder.state_dict().items():
        saved = tensor.clone()
        tensor += torch.rand_like(tensor) + 0.1 if tensor.is_floating_point() else 1
        changed = not torch.equal(decoded(autoencoder), image)
        assert (decoding_fingerprint(autoencoder) != before) == changed, name
        tensor.copy_(saved)


@pytest.mark.parametrize("kind", TINY)
def test_of_a_prior_it_is_the_weights_that_logits_read(kind):
    prior = tiny_prior(kind)
    codes, condition = random_codes(4, prior), condition_for(4, prior)

    def logits() -> Tensor:
        with torch.no_grad():
            if hasattr(prior, "logits"):
                return prior.logits(codes, condition)
            return prior.masked_logits(prior.sequence(codes, condition), condition)

    before, expected = coding_fingerprint(prior), logits()
    for name, tensor in prior.state_dict().items():
        saved = tensor.clone()
        tensor += torch.rand_like(tensor)
        assert (coding_fingerprint(prior) != before) == (not torch.equal(logits(), expected)), name
        tensor.copy_(saved)


def test_the_part_that_learned_captions_is_no_part_of_it():
    torch.manual_seed(0)
    config = TransformerConfig(layers=1, width=16, heads=2, text_loss_weight=0.1)
    prior = Transformer(config, tiny_spec(), 0, text=TextSpec(3, 7))
    before = coding_fingerprint(prior)
    with torch.no_grad():
        prior.text_output.weight += 1
    assert coding_fingerprint(prior) == before


def other_values(config: Any, name: str) -> list[Any]:
    """Values of a field that its type admits, other than the one it has."""
    value, hint = getattr(config, name), get_type_hints(type(config))[name]
    options = [option for option in get_args(hint) if isinstance(option, str)]
    if options:
        return [option for option in options if option != value]
    return [value * 0.5 + 0.25] if isinstance(value, float) else [value + 1] if isinstance(value, int) else []


def variants(config: Any) -> list[tuple[str, Any]]:
    """The config with one field of NOT_READ changed, its own or a quantizer's, by the name of the field."""
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found += [(name, replace(config, **{field.name: inner})) for name, inner in valid(variants, value)]
        elif field.name in NOT_READ - OTHER_WEIGHTS:
            found += [
                (field.name, changed)
                for other in other_values(config, field.name)
                for changed in valid(lambda c, o=other, n=field.name: [replace(c, **{n: o})], config)
            ]
    return found


def valid(make: Any, config: Any) -> list[Any]:
    """What `make` gives; nothing where the config refuses the value."""
    try:
        return make(config)
    except UserError:
        return []


def test_fields_that_are_not_read_change_neither_the_result_nor_the_fingerprint():
    tried, done = set(), set()
    for config in ROWS.values():
        plain = fresh(config)
        expected, image = decoding_fingerprint(plain), decoded(plain)
        for name, changed in variants(config):
            if (type(config), type(config.quantizer), name) in done:
                continue
            done.add((type(config), type(config.quantizer), name))
            other = AUTOENCODERS[config.kind](changed, IMAGE_SIZE).eval()
            other.load_state_dict(plain.state_dict(), strict=name != "codebook_update")
            assert decoding_fingerprint(other) == expected, name
            assert torch.equal(decoded(other), image), name
            tried.add(name)
    for kind, config in TINY.items():
        prior = tiny_prior(kind)
        for name, changed in variants(config):
            other = PRIORS[kind](changed, prior.code_spec, CLASSES)
            other.load_state_dict(prior.state_dict())
            assert coding_fingerprint(other) == coding_fingerprint(prior), name
            tried.add(name)
    assert NOT_READ - tried == OTHER_WEIGHTS


def test_the_size_of_training_images_the_type_and_the_names_of_classes_are_no_part_of_it():
    config = ROWS["vqvae"]
    autoencoder = fresh(config)
    other = AUTOENCODERS["vqvae"](config, (32, 8))
    other.load_state_dict(autoencoder.state_dict())
    assert decoding_fingerprint(other) == decoding_fingerprint(autoencoder)

    prior = tiny_prior("transformer")
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(parameter.bfloat16())
    expected = coding_fingerprint(prior)
    spec = CodeSpec(prior.code_spec.grids, 24, 40, 1)
    renamed = Transformer(TINY["transformer"], spec, CLASSES, class_names=["a", "b", "c", "d"], stage1_fingerprint="0")
    renamed.load_state_dict(prior.state_dict())
    assert coding_fingerprint(renamed) == expected
    assert coding_fingerprint(prior.bfloat16()) == expected
    assert coding_fingerprint(prior.double()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_same_where_the_smallest_numbers_are_taken_for_zero(dtype):
    prior = tiny_prior("transformer").to(dtype)
    with torch.no_grad():
        prior.output.weight[0, :2] = torch.tensor([1e-40, -1e-39])
    expected, codes = coding_fingerprint(prior), random_codes(2, prior)
    payloads = encode_with_prior(prior, codes, [0, 1])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        assert coding_fingerprint(prior) == expected
        assert encode_with_prior(prior, codes, [0, 1]) == payloads
    finally:
        torch.set_flush_denormal(False)


def test_what_shapes_the_arithmetic_is_part_of_it():
    prior = tiny_prior("transformer")
    other = Transformer(replace(TINY["transformer"], heads=2), prior.code_spec, CLASSES)
    other.load_state_dict(prior.state_dict())
    assert coding_fingerprint(other) != coding_fingerprint(prior)
    autoencoder = fresh(ROWS["vqgan"])
    regrouped = AUTOENCODERS["vqgan"](replace(ROWS["vqgan"], norm_groups=2), IMAGE_SIZE)
    regrouped.load_state_dict(autoencoder.state_dict())
    assert decoding_fingerprint(regrouped) != decoding_fingerprint(autoencoder)
