"""Figures and pictures of codes, samples and their neighbours, on cases with a known answer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codes.shards import CodeDataset, CodeShardWriter
from codes.spec import CodeSpec, Grid
from images.datasets import DataConfig, ImageDataset, open_images, to_float
from pipelines.report import codebook, memorisation
from pipelines.report import pictures as pictures_module
from pipelines.report.collect import Run, Subject, subject_of
from pipelines.report.facts import training_speeds
from pipelines.report.models import load_models
from pipelines.report.pictures import LEVELS, Picture, encoded, heat, sources_of, strip
from pipelines.report.samples import draw
from tests.pipelines.conftest import make_autoencoder, make_pipeline
from tests.stage1_vq import test_conformance as conformance
from tests.stage1_vq.tiny import AUTOENCODER_ROWS

SPEC = CodeSpec((Grid("codes", 2, 2, 4),), 8, 8, 1)


def test_use_and_entropy_of_codes_with_a_known_answer():
    """One place is always 0, one is even over four codes, two are even over two."""
    count = 4000
    codes = torch.stack(
        [torch.zeros(count), torch.arange(count) % 4, torch.arange(count) % 2, torch.arange(count) % 2], dim=1
    ).long()
    found = codebook.codes_of_images((codes.view(count, 2, 2),), SPEC, "images")
    (use,) = codebook.use_of(SPEC, found)
    shares = [0.25 + 0.25 * 0.25 + 0.25, 0.0625 + 0.25, 0.0625, 0.0625]
    entropy = -sum(share * math.log2(share) for share in shares)
    assert (use.used, use.codes, use.images) == (4, 4 * count, count)
    assert use.entropy == pytest.approx(entropy)
    assert use.perplexity == pytest.approx(2**entropy)
    (places,) = codebook.places_of(SPEC, found, None)
    values = [[float(value) for _, value, _ in row] for row in places.maps[0].rows]
    assert values == [[0.0, 2.0], [1.0, 1.0]]


def test_codes_of_shards_are_counted_as_those_in_memory(tmp_path: Path):
    codes = torch.randint(4, (50, 2, 2), generator=torch.Generator().manual_seed(0))
    writer = CodeShardWriter(tmp_path / "codes", SPEC, ("train",))
    writer.write(0, (codes,), torch.full((50,), -1), [str(i) for i in range(50)])
    writer.finish()
    of_shards = codebook.codes_of_shards(CodeDataset(tmp_path / "codes"), "x")
    of_images = codebook.codes_of_images((codes,), SPEC, "x")
    assert torch.equal(of_shards.totals[0], of_images.totals[0])
    assert torch.equal(of_shards.places[0], of_images.places[0])


def test_codes_are_shown_by_use_where_they_occur_and_alone():
    autoencoder = make_autoencoder(codebook_size=16)
    codes = torch.full((6, 4, 4), 3)
    codes[:, 1, 2] = 9  # 6 of 96
    found = codebook.codes_of_images((codes,), autoencoder.code_spec(), "images")
    (book,) = codebook.books_of(autoencoder, found, 4)
    (in_place, _, occurring), (alone, _, every) = book.tabs
    assert (in_place, alone) == ("Where it occurs", "Alone, on grey")
    assert [tile.code for tile in occurring] == [3, 9]
    assert [tile.code for tile in every][:2] == [3, 9]
    assert [tile.unused for tile in every] == [False] * 2 + [True] * 14
    image = autoencoder.decode((codes[:1],))[0, 0]  # code 9 lies in one place only: its mean patch is that patch
    patch = image[0:12, 4:16]
    shown = np.asarray(occurring[1].picture.image).astype(float) / 127.5 - 1
    assert np.abs(shown - patch.detach().clamp(-1, 1).numpy()).max() <= 1 / 127.5


def test_a_code_of_the_field_itself_changes_nothing_there():
    autoencoder = make_autoencoder(codebook_size=16)
    field = codebook.field_of(autoencoder)
    own = int(field[0][0, field[0].shape[1] // 2, field[0].shape[2] // 2])
    with torch.no_grad():
        same, other = codebook.alone_in(autoencoder, field, 0, torch.tensor([own, (own + 1) % 16]), 2)
    assert float(same.abs().max()) < 1e-6
    assert float(other.abs().max()) > 1e-4


@pytest.mark.parametrize("row", AUTOENCODER_ROWS)
def test_codes_of_every_autoencoder_have_pictures_and_figures(row):
    autoencoder = conformance.make_autoencoder(row).eval()
    with torch.no_grad():
        codes, spec = autoencoder.encode(conformance.images_for(autoencoder, 3)), autoencoder.code_spec()
    found = codebook.codes_of_images(codes, spec, "images")
    books = codebook.books_of(autoencoder, found, 4)
    assert [book.grid for book in books] == list(spec.grids)
    for book in books:
        assert len(book.tabs[-1][2]) + book.left_out == book.grid.vocabulary
    uses = codebook.use_of(spec, found)
    assert [use.codes for use in uses] == [3 * grid.size for grid in spec.grids]
    assert [len(place.maps[0].rows) for place in codebook.places_of(spec, found, None)] == [
        g.height for g in spec.grids
    ]


def test_a_copied_sample_is_found_by_codes_and_by_pixels(folders: Path):
    codes = CodeDataset(folders / "quick & <b>" / "codes")
    held_out = CodeDataset(folders / "quick & <b>" / "codes", "validation")
    autoencoder = make_autoencoder()
    copied = codes.fetch([7], [7])["codes"]
    made = torch.randint(16, (3, 4, 4), generator=torch.Generator().manual_seed(3))
    samples = (torch.cat([made, copied[0]]),)
    with torch.no_grad():
        found = memorisation.by_codes(samples, autoencoder.decode(samples), codes, held_out, autoencoder.decode)
    assert (found.copies, found.training, found.held_out) == (1, 48, 4)
    assert "number 7" in found.pairs[0].training.alt
    assert found.pairs[0].distance == "0% of the codes differ"
    nearest = memorisation.nearest_codes(made.flatten(1).numpy(), codes)
    stored = np.concatenate([part[0] for part in codes.stored()]).reshape(48, -1)
    shares = (stored[None] != made.flatten(1).numpy()[:, None]).mean(-1)
    assert nearest.distances == pytest.approx(shares.min(1))
    assert nearest.indices.tolist() == shares.argmin(1).tolist()


def test_distances_of_pixels_are_those_of_a_direct_computation(digits: Path):
    config = DataConfig(path=str(digits), image_size=16, channels=1)
    training = ImageDataset(open_images(config), config)
    all_images = to_float(training.fetch(range(60), range(60))["images"])
    images = torch.cat([all_images[5:6], torch.rand(2, 1, 16, 16) * 2 - 1])
    found = memorisation.by_pixels(images, training, "digits", all_images[:10])
    direct = ((images[:, None] - all_images[None]) * 127.5).square().mean(dim=(2, 3, 4)).sqrt()  # 3 60
    assert found.median == pytest.approx(float(direct.min(1).values.median()), abs=0.05)
    assert found.held_out_median == pytest.approx(0, abs=0.1)
    assert "number 5" in found.pairs[0].training.alt


def test_samples_are_those_of_generate_and_each_slider_starts_at_the_models_own():
    pipeline = make_pipeline(num_classes=3)
    said: list[str] = []
    found = draw(pipeline, seed=4, num=6, batch_size=4, say=said.append)
    assert said == ["6 samples at each of 9 settings"]
    assert [slider.name for slider in found.sliders] == ["temperature", "guidance"]
    for slider in found.sliders:
        assert [setting.own for setting in slider.settings].index(True) == slider.start
        assert [name for name, _ in slider.settings[0].rows] == ["class 0", "class 1", "class 2"]
    made = pipeline.generate(found.num, seed=4)
    assert found.labels == [0, 0, 1, 1, 2, 2]
    assert torch.equal(found.codes[0], made.codes[0][[0, 3, 1, 4, 2, 5]])
    first, second = found.sliders[0].settings[0].rows, found.sliders[0].settings[-1].rows
    assert any(a.image.tobytes() != b.image.tobytes() for (_, a), (_, b) in zip(first, second, strict=True))


def test_a_prior_without_classes_has_one_slider():
    found = draw(make_pipeline(num_classes=0), seed=0, num=3, batch_size=4, say=print)
    assert [slider.name for slider in found.sliders] == ["temperature"]
    assert [name for name, _ in found.sliders[0].settings[0].rows] == [""]


def test_small_pictures_are_kept_without_loss_and_many_large_ones_stay_below_the_limit(monkeypatch):
    small = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert encoded(small, LEVELS[0]).startswith("data:image/png")
    monkeypatch.setattr(pictures_module, "LIMIT", 300_000)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    pictures = [Picture(Image.fromarray(noise), "noise") for _ in range(40)]
    sources, note = sources_of(pictures)
    assert 50_000 < sum(map(len, sources.values())) <= 300_000
    assert note
    assert sources_of([Picture(small, "small")])[1] == ""


def test_a_strip_keeps_every_pixel_with_a_gap_between():
    left, right = (Image.fromarray(np.full((4, 3), value, dtype=np.uint8)) for value in (10, 200))
    row = np.asarray(strip([left, right]))
    assert row.shape == (4, 7, 2)
    assert (row[:, :3, 0] == 10).all()
    assert (row[:, 4:, 0] == 200).all()
    assert row[0, :, 1].tolist() == [255] * 3 + [0] + [255] * 3


def test_the_colours_of_heat_get_brighter():
    colours = np.asarray(heat(np.linspace(0, 1, 50)[None])).astype(float)[0]
    brightness = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > 0).all()
    assert np.asarray(heat(np.array([[np.nan, 7.0]])))[0].tolist() == [[0, 0, 4], [252, 255, 164]]


def test_figures_of_another_model_are_left_out(tmp_path: Path):
    """An evaluation.json may be of an earlier state of a run, or of a model that lay there before."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    stage1, stage2 = pipeline.autoencoder.fingerprint(), pipeline.prior.fingerprint()
    for model, shown in (
        ({"stage1_fingerprint": stage1, "stage2_fingerprint": stage2}, True),
        ({"stage1_fingerprint": stage1, "stage2_fingerprint": "0" * 64}, False),
        ({}, True),  # of an earlier version, which did not tell
    ):
        evaluation = {"psnr": 12.5, "protocol": {"model": model}}
        (tmp_path / "model" / "evaluation.json").write_text(json.dumps(evaluation))
        subject = subject_of(str(tmp_path / "model"))
        load_models(subject, torch.device("cpu"))
        assert (subject.evaluation is not None) is shown
        assert any("figures are of another model" in note for note in subject.notes) is not shown


def test_a_damaged_clock_has_no_speeds():
    lines = [{"step": 5, "seconds": 4.0, "images": 60, "training_seconds": 2.0, "waiting_seconds": 0.5}]
    run = Run(Path("run"), "stage one", {}, [], lines, {})
    speeds = dict(training_speeds(Subject("run", "run", "a run", (run,))))
    assert speeds["Training samples per second, stage one"] == "30"
    lines[0]["seconds"] = "soon"  # type: ignore[assignment]
    assert training_speeds(Subject("run", "run", "a run", (run,))) == []
