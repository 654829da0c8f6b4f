"""Features of reconstructions and of samples, against computations of their own, and what numbers are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from codes.training_images import TrainingImages, hashes_of
from common.errors import UserError
from images.datasets import to_float, to_uint8
from metrics.features import FeatureNetwork, Seen, open_features
from metrics.similarity import ms_ssim
from metrics.statistics import FeatureStatistics
from pipelines import TwoStagePipeline
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.evaluation import gathering
from pipelines.evaluation.gathering import know_all_bad_images
from pipelines.evaluation.images import images_of_size
from pipelines.evaluation.outcome import Outcome
from pipelines.evaluation.reconstruction import Reconstruction
from pipelines.evaluation.samples import note_of_binarised
from pipelines.latents.pipeline import LatentPipeline
from stage1_vae.binarise import Binarised
from tests.pipelines.conftest import make_pipeline
from tests.pipelines.feature_networks import Corners, frechet_by_scipy
from tests.pipelines.latents.test_judging import small_vae

NETWORKS = "tests.pipelines.feature_networks"
CLASSIFIER, WIDE = f"{NETWORKS}:classifier", f"{NETWORKS}:wide"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zellige" / "references"


def config_of(model: Path | None, digits: Path, folder: Path, **values: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{
            "model": None if model is None else str(model),
            "data": EvaluateDataConfig(path=str(digits), split="train"),
            "batch_size": 16,
            "features": CLASSIFIER,
            "out": str(folder / "evaluation.json"),
            **values,
        }
    )


def found_by(config: EvaluateConfig) -> dict[str, Any]:
    evaluate(config)
    return json.loads(Path(str(config.out)).read_text())


def real_images(digits: Path) -> Tensor:
    with np.load(digits) as arrays:
        return torch.from_numpy(arrays["images"])[:, None]


def files(folder: Path) -> Tensor:
    paths = sorted(folder.glob("0*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] for path in paths])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 samples of the tiny model, and samples.npz in it."""
    folder = tmp_path_factory.mktemp("samples")
    make_pipeline().save_pretrained(folder / "model")
    made = GenerateConfig(model=str(folder / "model"), out=str(folder / "made"), num=48, batch_size=16, format="npz")
    generate_files(replace(made, seed=4, temperature=0.7))
    return folder / "made"


def by_all_pairs(x: Tensor, y: Tensor) -> float:
    """The kernel distance, pair by pair."""
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        values = [kernel(one, other) for i, one in enumerate(a) for j, other in enumerate(b) if not same or i != j]
        return sum(values) / len(values)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def inside(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Whether each point lies in the ball of each centre, which reaches to its k-th nearest other centre: n m."""
    among = (centres[:, None] - centres[None]).norm(dim=-1).sort(dim=1).values[:, k]
    return (points[:, None] - centres[None]).norm(dim=-1) <= among[None]


def test_figures_of_samples_are_those_of_the_files_that_generate_writes(
    model: Path, digits: Path, samples: Path, tmp_path
):
    """Drawn by evaluate, in a folder, or in an .npz file: the same images, the same figures."""
    judged = {"judge": f"{NETWORKS}:corners"}
    drawn = found_by(config_of(model, digits, tmp_path, samples=48, seed=4, temperature=0.7, **judged))
    network, made = open_features(CLASSIFIER), files(samples)
    x, y = network(real_images(digits)).double(), network(made).double()
    assert drawn["fd"] == pytest.approx(frechet_by_scipy(x, y), rel=1e-6)
    assert drawn["kd"] == pytest.approx(by_all_pairs(x, y), rel=1e-6)
    assert drawn["precision"] == float(inside(y, x, 3).any(dim=1).double().mean())
    assert drawn["recall"] == float(inside(x, y, 3).any(dim=1).double().mean())
    assert drawn["density"] == pytest.approx(float(inside(y, x, 5).sum()) / (5 * 48))
    assert drawn["coverage"] == float(inside(y, x, 5).any(dim=0).double().mean())
    probabilities = network.probabilities(made)
    assert probabilities is not None
    assert 1 <= drawn["classifier_score"] <= 3
    assert drawn["protocol"]["judge"]["network"] == f"{NETWORKS}:corners"
    agree = Corners()(to_float(made)).argmax(dim=1) == torch.arange(48) % 3
    assert drawn["classifier_agreement"] == float(agree.double().mean())
    assert (drawn["made_images"], drawn["reference_images"]) == (48, 60)
    protocol = drawn["protocol"]
    assert (protocol["made"]["seed"], protocol["made"]["sampling"]["temperature"]) == (4, 0.7)
    assert protocol["made"]["classes"] == "in turn"
    assert protocol["features"]["fingerprint"] == network.fingerprint
    assert protocol["settings"]["kd"] == "all pairs"
    names = ("fd", "kd", "precision", "recall", "density", "coverage", "classifier_score", "classifier_agreement")
    for path in (samples, samples / "samples.npz"):
        again = found_by(config_of(model, digits, tmp_path, made=str(path), **judged))
        assert {name: again[name] for name in names} == {name: drawn[name] for name in names}
        assert again["protocol"]["made"]["sha256"] == protocol["made"]["sha256"]
    folder = found_by(config_of(None, digits, tmp_path, made=str(samples)))
    assert folder["fd"] == drawn["fd"]
    assert folder["protocol"]["made"]["made_with"]["temperature"] == 0.7
    assert "psnr" not in folder


def test_the_classes_of_real_images_are_what_the_judge_finds_there(digits: Path, samples: Path, tmp_path: Path):
    pipeline = make_pipeline()
    pipeline.prior.class_names = ("0", "1", "2")  # as the digits have them
    model = pipeline.save_pretrained(tmp_path / "model")
    found = found_by(config_of(model, digits, tmp_path, made=str(samples), judge=f"{NETWORKS}:corners"))
    assert found["classifier_agreement_of_reference"] == 1
    assert found["classifier_agreement"] < 0.7


def test_reconstructions_are_rounded_as_files_are_unless_asked(model: Path, digits: Path, tmp_path: Path, capsys):
    found = found_by(config_of(model, digits, tmp_path, unrounded=True))
    pipeline, network, real = make_pipeline(), open_features(CLASSIFIER), real_images(digits)
    decoded = pipeline.decode(pipeline.encode(to_float(real)))
    rounded, exact = (frechet_by_scipy(network(real), network(images)) for images in (to_uint8(decoded), decoded))
    assert found["rfd"] == pytest.approx(rounded, rel=1e-6)
    assert found["rfd_unrounded"] == pytest.approx(exact, rel=1e-6)
    assert found["rfd"] != found["rfd_unrounded"]
    printed = capsys.readouterr().out
    assert f"rfd                               {rounded:.4f}  (60 reconstructions, rounded to 8 bits)" in printed
    assert f"rfd_unrounded                     {exact:.4f}  (60 reconstructions, not rounded)" in printed
    assert found["labels"]["rfd_unrounded"] == "60 reconstructions, not rounded"
    assert any(note.startswith("note: rfd: a Frechet distance of 60 images is larger") for note in found["notes"])
    assert "rfd_unrounded" not in found_by(config_of(model, digits, tmp_path))


def test_similarities_are_means_over_images():
    """MS-SSIM where images are large enough, LPIPS where its network is there."""
    images = torch.rand(3, 1, 180, 176) * 2 - 1
    decoded = (images + 0.1 * torch.randn_like(images)).clamp(-1, 1)

    def distance(decoded: Tensor, images: Tensor) -> Tensor:
        return (decoded - images).abs().mean(dim=(1, 2, 3))

    reconstruction = Reconstruction(None, distance)
    values = {name: value.numpy() for name, value in reconstruction.measure(images, decoded).items()}
    found = reconstruction.figures(values)
    expected = ms_ssim(decoded, images)
    assert expected is not None
    assert found["ms_ssim"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found["lpips"] == pytest.approx(float(distance(decoded, images).mean()), rel=1e-6)
    assert reconstruction.notes(values) == []


def test_lpips_says_how_its_weights_are_had(model: Path, digits: Path, tmp_path: Path):
    config = config_of(model, digits, tmp_path, lpips=True, lpips_weights=str(tmp_path / "vgg16.pth"))
    with pytest.raises(UserError, match=r"vgg16.pth is not there: .* by --lpips_weights, or give --download true"):
        evaluate(config)


def test_a_distance_of_fewer_images_than_features_is_refused(model: Path, digits: Path, samples: Path, tmp_path: Path):
    config = config_of(model, digits, tmp_path, features=WIDE, made=str(samples))
    found = found_by(config)
    assert "fd" not in found
    assert "rfd" not in found
    refused = [note for note in found["notes"] if note.startswith("refused: ")]
    assert len(refused) == 2
    assert "fd is left out: the covariance of 64 features from 48 images is singular" in refused[1]
    assert {"kd", "precision", "coverage"} <= found.keys()


def test_a_reference_that_means_something_else_is_labelled_or_refused(digits: Path, samples: Path, tmp_path: Path):
    pipeline, real = make_pipeline(), real_images(digits)
    hashes = np.unique(hashes_of(pipeline.encode(to_float(real))))
    pipeline.prior.training_images = TrainingImages(hashes, True)
    model = pipeline.save_pretrained(tmp_path / "model")
    large = np.repeat(np.repeat(real[:, 0].numpy(), 2, axis=1), 2, axis=2)
    np.savez(tmp_path / "large.npz", images=large)
    config = config_of(model, digits, tmp_path, made=str(samples), reference=str(tmp_path / "large.npz"))
    found = found_by(config)
    assert found["protocol"]["reference"]["own_size"] == "32x32"
    assert any("images of the reference are 32x32 and were scaled to 16x16" in note for note in found["notes"])
    found = found_by(replace(config, reference=str(digits)))
    comparable = found["protocol"]["reference"]["share_of_training_images"]
    assert comparable == 1
    assert any(note.startswith("note: 100% of the reference images") for note in found["notes"])
    with pytest.raises(UserError, match="holds exactly the images of the reference"):
        evaluate(config_of(model, digits, tmp_path, made=str(samples), reference=str(samples / "samples.npz")))
    with pytest.raises(UserError, match=r"made=.*large.npz holds images of 32x32, expected 16x16, the size that the"):
        evaluate(config_of(model, digits, tmp_path, made=str(tmp_path / "large.npz")))


def test_a_folder_of_samples_is_a_reference_without_its_sheet(samples: Path, tmp_path: Path):
    """The sheet that `generate` puts beside them is no image of the set."""
    others = tmp_path / "others"
    others.mkdir()
    for number, image in enumerate(files(samples).flip(-1)[:30, 0]):
        Image.fromarray(image.numpy()).save(others / f"{number}.png")
    data = EvaluateDataConfig()
    found = found_by(config_of(None, samples, tmp_path, made=str(others), data=data, reference=str(samples)))
    assert found["reference_images"] == 48
    assert found["protocol"]["reference"]["own_size"] == found["protocol"]["reference"]["own_size"].split(" to ")[0]
    with pytest.raises(UserError, match="exactly the images of the reference"):
        evaluate(config_of(None, samples, tmp_path, made=str(samples), data=data, reference=str(samples)))


def test_paths_and_judges_that_cannot_be_are_told(digits: Path, samples: Path, tmp_path: Path):
    data = EvaluateDataConfig()
    (tmp_path / "empty.npz").touch()
    for options, message in (
        ({"reference": str(tmp_path / "empty.npz")}, "empty.npz cannot be read as .npz .* damaged"),
        ({"reference": "nothing.npz"}, "^reference=nothing.npz is neither a folder"),
        ({"reference": str(digits), "made": "nothing"}, "^made=nothing is neither a folder"),
        (
            {"reference": str(digits), "judge": "tests.pipelines.feature_networks:few_classes"},
            "the judge tells 2 classes apart, and images are of class [2-9]",
        ),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(config_of(None, samples, tmp_path, **{"made": str(samples), "data": data, **options}))


def test_features_of_a_reference_are_computed_once(
    model, digits: Path, samples: Path, tmp_path: Path, cache, monkeypatch
):
    config = config_of(None, digits, tmp_path, made=str(samples), reference=str(digits))
    first = found_by(config)
    assert len(list(cache.iterdir())) == 1
    seen = []
    original = FeatureNetwork.see

    def see(self: FeatureNetwork, images: Tensor) -> Seen:
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(FeatureNetwork, "see", see)
    again = found_by(config)
    assert again["fd"] == first["fd"]
    assert sum(seen) == 1 + 48  # the one by which its width is known, and the made images
    found_by(replace(config, reference_cache=str(tmp_path / "other")))
    assert sum(seen) == 2 * (1 + 48) + 60


def test_statistics_of_others_give_the_frechet_distance_alone(model: Path, digits: Path, samples: Path, tmp_path: Path):
    network = open_features(CLASSIFIER)
    x, y = network(real_images(digits)), network(files(samples))
    FeatureStatistics.of(x).save_npz(tmp_path / "statistics.npz")
    config = config_of(None, digits, tmp_path, made=str(samples), reference=str(tmp_path / "statistics.npz"))
    found = found_by(replace(config, data=EvaluateDataConfig()))
    assert found["fd"] == pytest.approx(frechet_by_scipy(x, y), rel=1e-6)
    assert not {"kd", "precision", "coverage"} & found.keys()
    assert any("are left out: statistics are no images" in note for note in found["notes"])


def test_samples_of_a_vae_are_judged_too(digits: Path, tmp_path: Path):
    model = small_vae().save_pretrained(tmp_path / "vae")
    found = found_by(config_of(model, digits, tmp_path, samples=20, draws=5, seed=3, pixels="sample"))
    images = LatentPipeline.from_pretrained(model)
    made = to_uint8(torch.cat([images.sample([i], 3, "sample").images for i in range(20)]))
    with np.load(digits) as arrays:
        assert found["reference_images"] == len(arrays["images"])
    network = open_features(CLASSIFIER)
    assert found["made_images"] == 20
    assert found["protocol"]["made"]["pixels"] == "sample"
    reference = found_by(config_of(model, digits, tmp_path, draws=5, seed=3))["protocol"]["images"]["sha256"]
    assert found["protocol"]["reference"]["sha256"] == reference
    assert network(made).std() > 0
    assert {"rfd", "fd", "log_p"} <= found.keys()


def test_a_reference_is_not_binarised_and_that_is_said():
    vae = small_vae()
    for binarised, said in ((None, False), (Binarised("none", 0), False), (Binarised("threshold", 0), True)):
        vae.binarised = binarised
        outcome = Outcome({})
        note_of_binarised(outcome, LatentPipeline(vae))
        assert any("made black and white" in note for note in outcome.notes) is said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": None, "samples": 5}, "made images are judged by their features, and none are named"),
        ({"temperature": 0.5}, "temperature=0.5 without samples, which it is about"),
        ({"judge": "x:y"}, "judge=x:y without samples or made, which it judges"),
        ({"samples": 5, "made": "x"}, "samples=5 and made=x, expected one of them"),
        ({"features": "timm:none"}, r"no network of timm .*--features_weights FILE"),
        ({"samples": 5, "pixels": "mode"}, "pixels=mode, expected it left out"),
        ({"samples": 1}, "samples=1, expected at least 2"),
        ({"features": None, "unrounded": True}, "unrounded=True without features"),
    ],
)
def test_options_that_do_not_go_together_are_refused(model: Path, digits: Path, tmp_path: Path, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(config_of(model, digits, tmp_path, **options))


def test_the_number_of_threads_changes_nothing(model: Path, digits: Path, tmp_path: Path):
    config = config_of(model, digits, tmp_path, batch_size=8, samples=20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = found_by(config)
        torch.set_num_threads(3)
        three = found_by(config)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert {**one, "protocol": None} == {**three, "protocol": None}


def test_what_other_processes_could_not_read_is_known_to_the_first(digits: Path, monkeypatch):
    images = images_of_size(str(digits), "train", 0.02, (16, 16), 1)
    seen = [{"a.png": "broken"}, {"b.png": "broken"}]
    monkeypatch.setattr(gathering, "on_first_process", lambda own, state: own + seen)
    monkeypatch.setattr(images.bad_images, "bad", lambda: images.bad_images.seen)
    know_all_bad_images(images, PartialState(cpu=True))
    assert images.bad_images.seen.keys() == {"a.png", "b.png"}
    seen += [{f"{i}.png": "broken"} for i in range(6)]
    with pytest.raises(UserError, match="6 of 60 images cannot be read, and 5 may be"):
        know_all_bad_images(images, PartialState(cpu=True))


def test_options_of_models_are_refused_for_files_without_one(digits: Path, samples: Path, tmp_path: Path):
    for option, message in (
        ({"lpips": True}, "lpips=True without a model and test images"),
        ({"seed": 4}, "seed=4, expected it left out for files without a model"),
        ({"temperature": 1.5}, "temperature=1.5 without samples"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(config_of(None, digits, tmp_path, made=str(samples), **option))


def test_stage_one_alone_draws_nothing(digits: Path, tmp_path: Path):
    model = make_pipeline().autoencoder.save_pretrained(tmp_path / "stage1")
    with pytest.raises(UserError, match="is stage one alone, which draws nothing"):
        evaluate(config_of(model, digits, tmp_path, samples=5))


def test_a_pipeline_is_what_the_tests_take_it_for(model: Path):
    assert TwoStagePipeline.from_pretrained(model).fingerprint() == make_pipeline().fingerprint()
