"""All steps of a batch as one CUDA graph. Where there is no GPU: nothing of a batch waits for one or copies to it, and
a stand-in for the graph shows what is read and written at each replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage2_prior import cuda_graph
from stage2_prior.condition import Condition
from stage2_prior.cuda_graph import RecordedDraw
from stage2_prior.priors import PRIORS, AutoregressivePrior
from stage2_prior.sampling import SamplingConfig, draw_in_order, sample_codes
from tests.imaginary_gpu import WAITED, OnTheDevice, imaginary_gpu
from tests.stage2_prior.tiny import CLASSES, TINY, labelled, random_codes, spec_of, tiny_prior

ORDERED = [kind for kind in TINY if issubclass(PRIORS[kind], AutoregressivePrior)]
EVERY_ORDERED_PRIOR = pytest.mark.parametrize("kind", ORDERED)
SAMPLINGS = [
    SamplingConfig(temperature=0.9, top_k=5, top_p=0.9, min_p=0.01),
    SamplingConfig(guidance=2.0, guidance_schedule="cosine"),
    SamplingConfig(temperature=0),
]


@pytest.mark.parametrize(
    "careless",
    [
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="cuda"),
        lambda x: x.cpu(),
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
    ],
)
def test_the_imaginary_gpu_notices_who_waits_or_copies(careless):
    with imaginary_gpu():
        x = torch.zeros(3)
        with pytest.raises((AssertionError, *WAITED)), OnTheDevice():
            careless(x)


@EVERY_ORDERED_PRIOR
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("inpainting", [False, True])
def test_no_step_waits_for_a_gpu_or_copies_to_it(kind, sampling, inpainting, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", torch.nn.init.normal_)  # which looks at its numbers
    with imaginary_gpu(), torch.no_grad():
        prior = PRIORS[kind](TINY[kind], spec_of(kind), CLASSES).eval()
        positions = prior.code_spec.codes_per_image
        condition = Condition(torch.zeros(3, dtype=torch.int64))
        uniforms = torch.zeros(3, positions, dtype=torch.float64)
        known = torch.full((3, positions), -1) if inpainting else None
        with OnTheDevice():
            codes, finite = draw_in_order(prior, condition, uniforms, sampling, known)
        assert codes.shape == (3, positions)
        assert codes.device.type == finite.device.type == "cuda"


@pytest.fixture
def recordings(monkeypatch) -> list[Callable[[], None]]:
    """A stand-in for CUDA graphs that keeps to their rules: a replay reads the same inputs and writes the same outputs
    as the run that was recorded. Holds what replays each recording."""
    replays: list[Callable[[], None]] = []

    def record(work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        outputs = work()

        @torch.inference_mode()
        def replay() -> None:
            for tensor, value in zip(outputs, work(), strict=True):
                tensor.copy_(value)

        replays.append(replay)
        return outputs, replay

    monkeypatch.setattr(cuda_graph, "record", record)
    return replays


def test_batches_that_are_alike_share_a_recording_and_each_has_its_own_codes(recordings):
    prior, recorded, sampling = tiny_prior("transformer"), RecordedDraw(draw_in_order), SamplingConfig(guidance=2.0)
    requests = [(range(4), [0, 1, 2, 3], 0), (range(4, 8), [3, 2, 1, 0], 0), (range(4), [1, 1, 2, 2], 7)]
    drawn = [
        sample_codes(prior, indices, Condition(torch.tensor(labels)), seed, sampling, recorded=recorded)[0]
        for indices, labels, seed in requests
    ]
    assert len(recordings) == 1
    for codes, (indices, labels, seed) in zip(drawn, requests, strict=True):
        assert torch.equal(codes, sample_codes(prior, indices, Condition(torch.tensor(labels)), seed, sampling)[0])
    assert not torch.equal(drawn[0], drawn[1])


def test_another_kind_of_batch_is_recorded_anew(recordings):
    prior, recorded = tiny_prior("transformer"), RecordedDraw(draw_in_order)
    known = random_codes(3, prior)
    known[0][:, 1:] = -1
    warm, cold = SamplingConfig(), SamplingConfig(temperature=0.5)
    for number, (batch, sampling, kept, one_more) in enumerate(
        [(3, warm, None, 1), (3, warm, None, 0), (3, cold, None, 1), (2, cold, None, 1), (3, warm, known, 1)]
    ):
        before = len(recordings)
        codes = sample_codes(prior, range(batch), labelled(batch, prior), 0, sampling, kept, recorded)[0]
        assert len(recordings) - before == one_more, number
        assert torch.equal(codes, sample_codes(prior, range(batch), labelled(batch, prior), 0, sampling, kept)[0])
    before = len(recordings)
    with torch.autocast("cpu", torch.bfloat16):
        sample_codes(prior, range(3), labelled(3, prior), 0, warm, known, recorded)
    assert len(recordings) == before + 1
    other = tiny_prior("transformer", noise=0.4)
    codes = sample_codes(other, range(3), labelled(3, other), 0, warm, known, recorded)[0]
    assert torch.equal(codes, sample_codes(other, range(3), labelled(3, other), 0, warm, known)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_ORDERED_PRIOR
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_cuda_graph_draws_the_codes_that_the_steps_draw(kind, sampling):
    prior, recorded = tiny_prior(kind).cuda(), RecordedDraw(draw_in_order)
    for seed in (0, 1):
        condition = labelled(3, prior)
        codes = sample_codes(prior, range(3), condition, seed, sampling, recorded=recorded)
        expected = sample_codes(prior, range(3), condition, seed, sampling)
        assert all(map(torch.equal, codes, expected))
