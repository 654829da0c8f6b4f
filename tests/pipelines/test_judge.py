"""Rejection: of the candidates of each image the one that the judge prefers, whatever the batch."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.judge import load_judge, sample_best, scores
from stage2_prior.sampling import SamplingConfig
from tests.pipelines.conftest import make_pipeline


class Brightness(nn.Module):
    """Finds a bright image to be of class 0, a dark one of class 1."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([20 * mean, -20 * mean, torch.full_like(mean, -50.0)], dim=-1)


def test_of_the_candidates_the_most_probable_is_kept():
    pipeline, judge, plain = make_pipeline(), Brightness(), SamplingConfig()
    labels = [0, 1, 0, 1]
    best = sample_best(pipeline, range(4), labels, 7, 5, judge, plain)
    for i, label in enumerate(labels):
        candidates = pipeline.sample(range(5 * i, 5 * i + 5), [label] * 5, 7, plain)
        score = scores(judge, pipeline.decode(candidates), torch.tensor([label] * 5))
        assert torch.equal(best[0][i], candidates[0][score.argmax()])
        assert score.max() > score.min()
    alone = sample_best(pipeline, [2], [0], 7, 5, judge, plain)
    assert torch.equal(alone[0][0], best[0][2])


def test_one_candidate_is_the_sample_itself():
    pipeline = make_pipeline()
    best = sample_best(pipeline, [3, 8], [0, 2], 1, 1, Brightness(), SamplingConfig())
    assert torch.equal(best[0], pipeline.sample([3, 8], [0, 2], 1)[0])


def test_without_labels_the_judge_prefers_what_it_is_sure_of():
    images = torch.stack([torch.full((1, 4, 4), value) for value in (0.02, 0.0, -0.01)])
    assert scores(Brightness(), images, None).argsort().tolist() == [1, 2, 0]


def test_an_image_of_which_the_judge_knows_nothing_is_never_preferred():
    logits = torch.tensor([[math.nan, math.nan], [-5.0, 5.0]])
    for labels in (None, torch.tensor([0, 0])):
        found = scores(lambda images: logits, torch.zeros(2, 1, 4, 4), labels)
        assert found.argmax() == 1


def test_a_judge_of_too_few_classes_is_refused():
    with pytest.raises(UserError, match="the judge tells 3 classes apart, but class 5 was asked for"):
        scores(Brightness(), torch.zeros(1, 1, 4, 4), torch.tensor([5]))


def test_generate_keeps_the_best_and_says_so(model: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "local_judge.py").write_text("from tests.pipelines.test_judge import Brightness as judge\n")
    monkeypatch.chdir(tmp_path)
    settings = {"model": str(model), "num": 4, "batch_size": 2, "seed": 7}
    generate_files(GenerateConfig(**settings, out="best", candidates=5, judge="local_judge:judge", label=0))
    generate_files(GenerateConfig(**settings, out="plain", label=0))
    recorded = json.loads(Path("best/settings.json").read_text())
    assert (recorded["candidates"], recorded["judge"]) == (5, "local_judge:judge")
    sys.modules.pop("local_judge")
    best = sample_best(make_pipeline(), range(4), [0] * 4, 7, 5, Brightness(), SamplingConfig())
    from pipelines.pictures import to_pil

    expected = to_pil(make_pipeline().decode(tuple(grid[3:] for grid in best))[0])
    from PIL import Image

    with Image.open("best/000003.png") as written:
        assert written.tobytes() == expected.tobytes()
    with pytest.raises(UserError, match="candidates was 5 and is now 1"):
        generate_files(GenerateConfig(**settings, out="best", label=0))


def test_a_timm_model_judges_with_weights_from_a_file(tmp_path: Path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    judge = load_judge("timm:test_resnet", str(tmp_path / "weights.safetensors"), 3)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    settings = timm.data.resolve_model_data_config(network)
    side = settings["input_size"][-1]
    pixels = nn.functional.interpolate(
        (images.expand(-1, 3, -1, -1) + 1) / 2, (side, side), mode="bicubic", antialias=True
    )
    mean, std = (torch.tensor(settings[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(judge(images), network((pixels - mean) / std))
    with pytest.raises(UserError, match="the weights of judge=timm:test_resnet could not be had"):
        load_judge("timm:test_resnet", str(tmp_path / "weights.safetensors"), 5)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet50", None, "judge=resnet50, expected timm:MODEL, such as timm:resnet50, or MODULE:FUNCTION"),
        ("timm:resnet9999", None, "judge=timm:resnet9999 is not a model of timm"),
        ("timm:resnet50", "none.pt", r"judge_weights=none.pt: there is no such file; give the weights of timm's"),
        ("nothing_here:judge", None, r"judge=nothing_here:judge cannot be had \(No module named 'nothing_here'\)"),
        ("math:judge", None, "judge=math:judge cannot be had"),
        ("os:getcwd", None, r"judge=os:getcwd returned str, expected a torch.nn.Module"),
        ("os:getcwd", "file.pt", "judge_weights is for judge=timm:MODEL; let os:getcwd load its own weights"),
    ],
)
def test_what_is_no_judge_is_refused(name, weights, message):
    with pytest.raises(UserError, match=message):
        load_judge(name, weights, 3)


@pytest.mark.parametrize("options", [{"candidates": 3}, {"judge": "timm:resnet50"}])
def test_candidates_and_judge_go_together(options):
    with pytest.raises(UserError, match="expected both or neither: a judge chooses among two candidates or more"):
        GenerateConfig(model="m", out="o", **options)


def test_no_candidates_are_refused():
    with pytest.raises(UserError, match="candidates=0, expected at least 1 for each image"):
        GenerateConfig(model="m", out="o", candidates=0)
