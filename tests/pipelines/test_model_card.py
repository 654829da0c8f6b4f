"""Models on the hub: what is uploaded opens again, and the card says what is true. The hub is a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from common.errors import UserError
from pipelines.commands.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate
from pipelines.latents.pipeline import LatentPipeline
from pipelines.opening import from_pretrained, write_model_card
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.binarise import Binarised
from stage1_vae.networks import DenseConfig
from stage1_vae.vae import VAE, VAEConfig
from stage2_prior.sampling import SamplingConfig
from tests.pipelines.conftest import make_autoencoder, make_pipeline, make_prior
from tests.pipelines.latents.test_judging import small_vae
from tests.pipelines.test_opening import learned
from tests.pipelines.test_prompts_and_sizes import text_pipeline

MAIN = "main"


class Hub:
    """Repositories as folders, and what was said besides files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[dict[str, Any]] = []

    def place(self, repo_id: str, revision: str | None) -> Path:
        return self.root / repo_id / (revision or MAIN)

    def api(self, token: str | None) -> HubApi:
        self.said.append({"token": token})
        return HubApi(self)

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        source, copy = self.place(repo_id, revision), self.root / "cache" / repo_id / (revision or MAIN)
        shutil.rmtree(copy, ignore_errors=True)
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, copy / name)
        return str(copy)


class HubApi:
    """What huggingface_hub.HfApi is asked for."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool, repo_type: str) -> str:
        assert exist_ok
        assert repo_type == "model"
        self.hub.said[-1] |= {"private": private}
        self.hub.place(repo_id, None).mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        if not self.hub.place(repo_id, branch).is_dir():
            shutil.copytree(self.hub.place(repo_id, None), self.hub.place(repo_id, branch))

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        commit_message: str,
        revision: str | None,
        delete_patterns: list[str],
    ) -> None:
        self.hub.said[-1] |= {"commit_message": commit_message}
        place = self.hub.place(repo_id, revision)
        there = [str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=delete_patterns):
            (place / name).unlink()
        shutil.copytree(folder_path, place, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", found.api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


def card_of(path: Path) -> ModelCard:
    """Read as the hub reads it: its front matter, and figures in a model index, must be what they have to be."""
    return ModelCard(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["two stages", "vae", "learned prior"])
def test_what_is_uploaded_opens_again(kind: str, hub: Hub):
    pipeline = {
        "two stages": make_pipeline,
        "vae": lambda: LatentPipeline(small_vae()),
        "learned prior": lambda: learned(small_vae()),
    }[kind]()
    address = pipeline.push_to_hub(
        "owner/digits", license="mit", token="secret", private=True, commit_message="The first"
    )
    assert address == "https://huggingface.co/owner/digits"
    assert hub.said == [{"token": "secret", "private": True, "commit_message": "The first"}]
    again = from_pretrained("owner/digits")
    assert type(again) is type(pipeline)
    assert again.fingerprint() == pipeline.fingerprint()
    assert torch.equal(again.generate(3, seed=1).images, pipeline.generate(3, seed=1).images)
    with Image.open(hub.place("owner/digits", None) / "samples.png") as picture:
        assert picture.width > picture.height > 50


def test_a_revision_is_a_branch_of_its_own(hub: Hub):
    first, second = make_pipeline(), TwoStagePipeline(make_autoencoder(), make_prior(make_autoencoder()))
    with torch.no_grad():
        next(second.prior.parameters()).add_(1)
    first.push_to_hub("owner/digits")
    second.push_to_hub("owner/digits", revision="v2")
    assert from_pretrained("owner/digits").fingerprint() == first.fingerprint()
    assert from_pretrained("owner/digits", revision="v2").fingerprint() == second.fingerprint()


def test_nothing_of_a_model_that_was_there_is_left(hub: Hub):
    """A repository keeps what is not deleted: tables or a prior of another model would be opened with this one."""
    plain = make_pipeline()
    learned(small_vae()).push_to_hub("owner/model")
    place = hub.place("owner/model", None)
    (place / "notes.txt").write_text("mine")
    assert (place / "stage2" / "model.safetensors").is_file()
    alone = LatentPipeline(small_vae())
    alone.push_to_hub("owner/model")
    assert not (place / "stage2" / "model.safetensors").exists()
    assert from_pretrained("owner/model").fingerprint() == alone.fingerprint()
    plain.push_to_hub("owner/model")
    (place / "tables.safetensors").write_bytes(b"of another model")
    plain.push_to_hub("owner/model")
    assert not (place / "tables.safetensors").exists()
    assert (place / "notes.txt").read_text() == "mine"


def evaluation_of(pipeline: TwoStagePipeline, **more: Any) -> dict[str, Any]:
    model = {
        "stage1_fingerprint": pipeline.autoencoder.fingerprint(),
        "stage2_fingerprint": pipeline.prior.fingerprint(),
    }
    images = {"path": "/home/somebody/secret/digits.npz", "split": "test", "images": 60, "sha256": "ab" * 32}
    protocol = {"asked": {"model": "/home/somebody/m"}, "model": model, "images": images, "seed": 0}
    return {
        "psnr": 21.25,
        "fid": 12.5,
        "codes_used": 1.0,
        "broken": None,
        "notes": ["fid: of 60 images only"],
        "protocol": protocol,
        **more,
    }


def test_figures_stand_in_the_card_with_their_protocol(tmp_path: Path, hub: Hub):
    folder = make_pipeline().save_pretrained(tmp_path / "model")
    (folder / "evaluation.json").write_text(json.dumps(evaluation_of(make_pipeline())))
    from_pretrained(folder).push_to_hub("owner/digits", license="cc-by-4.0", datasets="ylecun/mnist")
    path = hub.place("owner/digits", None) / "README.md"
    data, text = card_of(path).data, path.read_text()
    assert (data.library_name, data.license, data.datasets) == ("zellige", "cc-by-4.0", ["ylecun/mnist"])
    assert data.pipeline_tag == "unconditional-image-generation"
    assert {"zellige", "vqvae", "transformer"} <= set(data.tags)
    figures = {result.metric_type: result.metric_value for result in data.eval_results}
    assert figures == {"psnr": 21.25, "fid": 12.5, "codes_used": 1.0}
    assert {(result.dataset_name, result.dataset_split) for result in data.eval_results} == {("digits.npz", "test")}
    for said in (
        "| fid | 12.5 |",
        "* fid: of 60 images only",
        "sha256: abab",
        make_pipeline().fingerprint(),
        "class 0, class 1, class 2",
        "zellige generate --model owner/digits",
        'from_pretrained("owner/digits")',
        "datasets/ylecun/mnist",
    ):
        assert said in text
    assert "somebody" not in text  # the machine's folders are nobody's business


@pytest.mark.parametrize("kind", ["two stages", "vae"])
def test_the_card_takes_what_evaluate_writes(kind: str, digits: Path, tmp_path: Path):
    vae = VAE(
        VAEConfig(latents=2, encoder=DenseConfig(hidden=(8,)), decoder=DenseConfig(hidden=(8,))),
        (16, 16),
        Binarised("once", 7),
    )
    pipeline = make_pipeline() if kind == "two stages" else LatentPipeline(vae)
    folder = pipeline.save_pretrained(tmp_path / "model")
    out = folder / "evaluation.json"
    data = EvaluateDataConfig(path=str(digits), split="train")
    evaluate(
        EvaluateConfig(model=str(folder), data=data, num=4, out=str(out), draws=None if kind == "two stages" else 2)
    )
    measured = json.loads(out.read_text())
    card = card_of(write_model_card(folder))
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert shown
    assert all(shown[name] == measured[name] for name in shown)
    assert ("psnr" if kind == "two stages" else "elbo") in " ".join(shown)
    assert measured["protocol"]["images"]["sha256"] in card.text


def test_only_figures_of_this_model_stand_in_its_card(tmp_path: Path):
    other = make_pipeline()
    with torch.no_grad():
        next(other.prior.parameters()).add_(1)
    folder = make_pipeline().save_pretrained(tmp_path / "model")
    for record in (evaluation_of(other), {"psnr": 3.0}, evaluation_of(other, protocol={"model": {}})):
        (folder / "evaluation.json").write_text(json.dumps(record))
        card = card_of(write_model_card(folder))
        assert card.data.eval_results is None
        assert "## Figures" not in card.text
        with pytest.raises(UserError, match=r"evaluation.json holds figures of (another model|no model that it names)"):
            write_model_card(folder, evaluation=folder / "evaluation.json")


def test_a_card_names_no_licence_that_nobody_stated(tmp_path: Path):
    folder = make_pipeline().save_pretrained(tmp_path / "model")
    card = card_of(write_model_card(folder))
    assert card.data.license is None
    assert "Not stated" in card.text
    assert card_of(write_model_card(folder, "owner/x", license="mit")).data.license == "mit"


def run_of(model: Any, run: Path, config: dict[str, Any]) -> Path:
    model.save_pretrained(run / "model")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_recipes_are_those_of_runs_whose_model_this_is(tmp_path: Path):
    pipeline = make_pipeline()
    config = {
        "model": {"kind": "vqvae"},
        "data": {"path": "/home/somebody/photos"},
        "train": {"steps": 77, "save_every": 5},
    }
    beside = tmp_path / "quickstart"
    run_of(pipeline.autoencoder, beside / "stage1", config)
    run_of(make_prior(make_autoencoder(), 0), beside / "stage2", {**config, "train": {"steps": 99}})
    folder = pipeline.save_pretrained(beside / "model")
    text = write_model_card(folder).read_text()
    assert "Recipe of the autoencoder" in text
    assert "steps: 77" in text
    assert "path: photos" in text
    assert "steps: 99" not in text  # that prior is another
    with pytest.raises(UserError, match=r"the model of .*stage2 is another, expected the run of autoencoder or prior"):
        write_model_card(folder, runs=[beside / "stage1", beside / "stage2"])
    with pytest.raises(UserError, match=r"holds no config.yaml of a training"):
        write_model_card(folder, runs=[tmp_path])
    assert "steps: 77" not in write_model_card(folder, runs=[]).read_text()


def test_a_card_can_be_read_and_edited_before_it_goes(tmp_path: Path, hub: Hub):
    folder = make_pipeline().save_pretrained(tmp_path / "model")
    card = write_model_card(folder, "owner/digits", license="mit")
    card.write_text(card.read_text() + "\n## Limits\n\nDigits only.\n")
    pipeline = from_pretrained(folder)
    pipeline.push_to_hub("owner/digits")
    uploaded = hub.place("owner/digits", None) / "README.md"
    assert "Digits only." in uploaded.read_text()
    assert (uploaded.parent / "samples.png").read_bytes() == (folder / "samples.png").read_bytes()
    pipeline.push_to_hub("owner/digits", license="apache-2.0")  # says another thing
    assert "Digits only." not in uploaded.read_text()
    with torch.no_grad():
        next(pipeline.prior.parameters()).add_(1)
    pipeline.push_to_hub("owner/digits")  # the card is of the model that it was
    assert "Digits only." not in uploaded.read_text()
    assert pipeline.fingerprint() in uploaded.read_text()
    (folder / "README.md").write_text("My own words.")
    with pytest.raises(UserError, match="was not written by zellige and is not replaced"):
        write_model_card(folder)
    assert (folder / "README.md").read_text() == "My own words."


def test_a_picture_can_be_given(tmp_path: Path):
    folder = make_pipeline().save_pretrained(tmp_path / "model")
    Image.new("RGB", (70, 30), "red").save(tmp_path / "mine.jpg")
    write_model_card(folder, picture=tmp_path / "mine.jpg")
    with Image.open(folder / "samples.png") as picture:
        assert picture.size == (70, 30)
    with pytest.raises(UserError, match="cannot be read as an image"):
        write_model_card(folder, picture=folder / "README.md")


@pytest.mark.parametrize("knows_null_label", [True, False])
def test_a_model_of_texts_is_asked_for_one(knows_null_label: bool, tmp_path: Path):
    folder = text_pipeline(knows_null_label).save_pretrained(tmp_path / "model")
    card = card_of(write_model_card(folder))
    assert card.data.pipeline_tag == "text-to-image"
    assert '--prompt "WHAT TO DRAW"' in card.text
    assert 'generate(4, prompts="WHAT TO DRAW")' in card.text
    assert (folder / "samples.png").is_file() == ("![" in card.text) == knows_null_label


def test_settings_of_sampling_are_in_the_card(tmp_path: Path):
    pipeline = make_pipeline()
    pipeline.sampling = SamplingConfig(temperature=0.9, top_k=7)
    text = write_model_card(pipeline.save_pretrained(tmp_path / "model")).read_text()
    assert "| sampling | temperature=0.9, top_k=7 |" in text


def test_what_the_hub_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def refuse(self, repo_id: str, **options: Any) -> None:
        raise LocalTokenNotFoundError("Token is required\nbut no token found")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(UserError, match=r"the hub did not take 'owner/x' .*no token found.*hf auth login"):
        make_pipeline().push_to_hub("owner/x")
    monkeypatch.undo()
    with pytest.raises(UserError, match="the hub did not take 'a/b/c'"):
        make_pipeline().push_to_hub("a/b/c")  # refused before anything is sent
