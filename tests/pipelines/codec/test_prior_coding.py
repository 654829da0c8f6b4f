"""Every prior that walks its codes in an order drives the coder, at the cost of its own likelihood."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from codes.spec import Grid
from common.errors import UserError
from pipelines.codec.entropy_coding import bit_length
from pipelines.codec.prior_coding import (
    check_can_code,
    check_label,
    decode_with_prior,
    encode_with_prior,
    frequencies_of,
    images_at_once,
    ready_to_code,
)
from stage2_prior.condition import EmbeddingSpec, TextSpec
from stage2_prior.priors import AutoregressivePrior
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.stage2_prior.tiny import CLASSES, TINY, labelled, random_codes, tiny_prior

ORDERED = [kind for kind in TINY if isinstance(tiny_prior(kind), AutoregressivePrior)]
EVERY_ORDERED_PRIOR = pytest.mark.parametrize("kind", ORDERED)
LABELS = [1, None]


@EVERY_ORDERED_PRIOR
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_codes_come_back_whatever_they_are_coded_beside(kind, num_classes):
    prior = tiny_prior(kind, num_classes)
    codes = random_codes(2, prior)
    labels = LABELS if num_classes else [None, None]
    payloads = encode_with_prior(prior, codes, labels)
    assert all(map(torch.equal, decode_with_prior(prior, payloads, labels), codes))
    for i in range(2):
        alone = decode_with_prior(prior, payloads[i : i + 1], labels[i : i + 1])
        assert all(torch.equal(ours[0], theirs[i]) for ours, theirs in zip(alone, codes, strict=True))
        own = tuple(grid[i : i + 1] for grid in codes)
        assert encode_with_prior(prior, own, labels[i : i + 1]) == payloads[i : i + 1]


@EVERY_ORDERED_PRIOR
def test_a_payload_costs_the_nll(kind):
    """Within 0.5% and the bit that an image ends on."""
    prior = tiny_prior(kind)
    images = 24
    condition = labelled(images, prior)
    codes = sample_codes(prior, range(images), condition, 0, SamplingConfig())
    with torch.no_grad():
        bits = prior.nll(codes, condition).double().sum(dim=1).numpy() / np.log(2)
    payloads = encode_with_prior(prior, codes, [i % CLASSES for i in range(images)])
    sizes = np.array([bit_length(payload) for payload in payloads])
    assert (sizes < 1.005 * bits + 1).all()
    assert sizes.mean() < 1.005 * bits.mean()


@EVERY_ORDERED_PRIOR
def test_the_label_shapes_the_payload(kind):
    prior = tiny_prior(kind)
    codes = random_codes(1, prior)
    payloads = [encode_with_prior(prior, codes, [label])[0] for label in (0, 1, None)]
    assert len(set(payloads)) > 1
    other = decode_with_prior(prior, payloads[:1], [1])
    assert not all(map(torch.equal, other, codes))


def test_probabilities_that_differ_give_other_codes_and_no_error():
    prior = tiny_prior("transformer")
    codes = random_codes(2, prior)
    payloads = encode_with_prior(prior, codes, LABELS)
    with torch.no_grad():
        next(prior.parameters()).mul_(1.5)
    assert not torch.equal(decode_with_prior(prior, payloads, LABELS)[0], codes[0])


def test_bytes_that_fit_no_code_spoil_their_own_image_only():
    prior = tiny_prior("transformer")
    codes = random_codes(2, prior)
    _, sound = encode_with_prior(prior, codes, LABELS)
    read = decode_with_prior(prior, [b"\xff" * 40, sound], LABELS)
    assert torch.equal(read[0][1], codes[0][1])


def test_autocast_around_it_changes_nothing():
    prior = tiny_prior("transformer")
    codes = random_codes(2, prior)
    payloads = encode_with_prior(prior, codes, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode_with_prior(prior, payloads, LABELS)[0], codes[0])


def test_a_prior_that_reads_captions_is_told_none():
    texts = {"text": TextSpec(3, 9), "embeddings": None}, {"text": None, "embeddings": EmbeddingSpec(2, 5)}
    for facts in texts:
        prior = tiny_prior("transformer", **facts)
        codes = random_codes(2, prior)
        payloads = encode_with_prior(prior, codes, LABELS)
        assert torch.equal(decode_with_prior(prior, payloads, LABELS)[0], codes[0])


def test_frequencies_are_those_of_whole_numbers():
    """As docs/format.md has them, in Python's own integers."""
    logits = torch.randn(2, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 8
    logits[0, 0] = 0  # all alike: what is left goes to the first
    logits[0, 1, 1:] = -1e4
    logits[1, 2, 7] = logits[1, 2].max() + 30
    found = frequencies_of(logits).reshape(6, 50)
    for row, own in zip(found, logits.view(6, 50), strict=True):
        numerators = [round(math.exp(x - max(own.tolist())) * 2**30) for x in own.tolist()]
        counts = [1 + t * (2**24 - 50) // sum(numerators) for t in numerators]
        counts[numerators.index(max(numerators))] += 2**24 - sum(counts)
        assert abs(row - np.array(counts)).max() <= 1  # the exact walk has an exponential of its own, to 1e-9
        assert row.sum() == 2**24
        assert row.min() >= 1
    assert found[0, 0] - found[0, 1] == 2**24 % 50
    assert found[1, 1] == 1


def test_a_prior_that_is_damaged_is_told():
    prior = tiny_prior("transformer")
    with torch.no_grad():
        prior.norm.gain[3] = float("nan")
    with pytest.raises(UserError, match="the prior's weights are not finite: they are damaged; take an earlier"):
        ready_to_code(prior)


@pytest.mark.parametrize("kind", ["transformer", "pixelsnail", "var"])
def test_weights_so_large_that_nothing_holds_what_they_make_are_told(kind):
    prior = tiny_prior(kind)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(1e25)
    codes = random_codes(2, prior)
    with pytest.raises(UserError, match="the prior's logits are not finite: its weights are damaged; take an earlier"):
        encode_with_prior(ready_to_code(prior), codes, LABELS)
    with pytest.raises(UserError, match="the prior's logits are not finite"):
        decode_with_prior(prior, [bytes(9)] * 2, LABELS)


@pytest.mark.parametrize("kind", sorted(set(TINY) - set(ORDERED)))
def test_masked_priors_are_refused(kind):
    with pytest.raises(
        UserError, match=rf"mode=prior, but a {kind} prior fills in codes in no fixed order.*choose table"
    ):
        check_can_code(tiny_prior(kind))


def test_what_cannot_drive_a_coder_is_refused():
    with pytest.raises(UserError, match="mode=prior, but this model has no prior; choose table or packed, or name an"):
        check_can_code(None)
    with pytest.raises(
        UserError, match="mode=prior, but this prior goes by other codes, which no file would hold; choose"
    ):
        check_can_code(tiny_prior("transformer", given=(Grid("top", 1, 2, 5),)))
    prior = tiny_prior("transformer")
    prior.code_spec = replace(prior.code_spec, grids=(Grid("codes", 3, 5, 2**20 + 1),))
    with pytest.raises(UserError, match="mode=prior, but a vocabulary of 1048577 is over 1048576; choose packed"):
        check_can_code(prior)


def test_labels_are_those_of_the_prior():
    prior = tiny_prior("transformer")
    for label in (None, 0, CLASSES - 1):
        check_label(prior, label)
    with pytest.raises(
        UserError, match="label 4 is out of range: this model knows the 4 classes 0 to 3; choose one of them"
    ):
        check_label(prior, CLASSES)
    with pytest.raises(UserError, match="this model has no classes, so a label cannot be chosen; leave the label out"):
        check_label(tiny_prior("transformer", 0), 0)
    with pytest.raises(
        UserError, match="trained with label_dropout=0 and must be told a class; give a label, one of the 4"
    ):
        check_label(tiny_prior("transformer", knows_null_label=False), None)


def test_large_priors_walk_fewer_images_at_once():
    prior = tiny_prior("transformer")
    assert images_at_once(prior) == 64
    prior.config = replace(prior.config, layers=24, width=4096)
    prior.code_spec = replace(prior.code_spec, grids=(Grid("codes", 4, 4, 11),))
    assert images_at_once(prior) == 2**30 // (16 * 17 * 24 * 4096 + 40 * 11)
    prior.code_spec = replace(prior.code_spec, grids=(Grid("codes", 64, 64, 11),))
    assert images_at_once(prior) == 8


def test_large_vocabularies_are_coded_a_few_images_at_once():
    prior = tiny_prior("transformer")
    prior.code_spec = replace(prior.code_spec, grids=(Grid("codes", 3, 5, 2**20),))
    assert images_at_once(prior) == 25
    scales = tiny_prior("var")
    scales.code_spec = replace(scales.code_spec, grids=(*scales.code_spec.grids[:2], Grid("last", 32, 32, 4096)))
    assert images_at_once(scales) == 8
    bits = tiny_prior("infinity")  # both grids of a scale in one step
    last = [Grid(name, 40, 40, 256) for name in "ab"]
    bits.code_spec = replace(bits.code_spec, grids=(*bits.code_spec.grids[:4], *last))
    assert images_at_once(bits) == 2**30 // (16 * (1 + 2 * (1 + 6 + 1600)) * 2 * 32 + 40 * 2 * 1600 * 256)
