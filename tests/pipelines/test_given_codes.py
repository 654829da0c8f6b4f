"""Image to image: a model that goes by the codes of other pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from codes.shards import CodeShardWriter
from codes.spec import CodeSpec, Grid
from common.errors import UserError
from pipelines import TwoStagePipeline
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.pictures import to_pil
from stage2_prior.priors import Transformer, TransformerConfig
from tests.pipelines.conftest import make_autoencoder
from tests.stage2_prior.tiny import tiny_prior

MAP = Grid("map", 2, 2, 8)


def make_pipeline(given_fingerprint: str | None = "maps") -> TwoStagePipeline:
    autoencoder = make_autoencoder()
    torch.manual_seed(1)
    config = TransformerConfig(layers=1, width=16, heads=2)
    facts = {"given": (MAP,), "given_fingerprint": given_fingerprint}
    prior = Transformer(config, autoencoder.code_spec(), 0, **facts).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return TwoStagePipeline(autoencoder, prior)


def maps(count: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(8, (count, 2, 2), generator=torch.Generator().manual_seed(0)),)


def write_maps(folder: Path, grid: Grid = MAP, fingerprint: str = "maps") -> Path:
    spec = CodeSpec((grid,), 16, 16, 3)
    writer = CodeShardWriter(folder, spec, ["train", "validation"], stage1_fingerprint=fingerprint)
    codes = (torch.randint(8, (3, grid.height, grid.width), generator=torch.Generator().manual_seed(0)),)
    for number, names in enumerate(([], ["a", "b", "c"])):  # no training images, three held-out ones
        writer.write(number, (codes[0][: len(names)],), torch.full((len(names),), -1), names)
    writer.finish()
    return folder


def test_samples_go_by_the_codes_they_are_given():
    pipeline, given = make_pipeline(), maps(4)
    codes = pipeline.generate(4, given=given, batch_size=3).codes[0]
    assert torch.equal(pipeline.generate(1, given=(given[0][2:3],), first_index=2).codes[0], codes[2:3])
    other = (given[0].flip(0),)
    assert not torch.equal(pipeline.generate(4, given=other).codes[0], codes)


def test_inpainting_goes_by_them_too():
    pipeline, given = make_pipeline(), maps(2)
    known = torch.full((2, 4, 4), -1)
    drawn = pipeline.redraw((known,), given=given, seed=3)
    assert torch.equal(drawn.codes[0], pipeline.generate(2, given=given, seed=3).codes[0])


def test_the_command_takes_them_from_code_shards(tmp_path: Path):
    pipeline = make_pipeline()
    model = pipeline.save_pretrained(tmp_path / "model")
    folder = write_maps(tmp_path / "maps")
    config = GenerateConfig(model=str(model), out=str(tmp_path / "out"), num=4, batch_size=2, given=str(folder))
    generate_files(config)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert len(settings["given"]) == 64  # a fingerprint of the shards
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4  # three pictures: the fourth sample goes by the first


@pytest.mark.parametrize("known", [True, False])
def test_without_a_label_the_class_is_that_of_the_picture_whose_codes_are_given(known: bool, tmp_path: Path):
    """The two conditions would contradict each other, if the classes took turns."""
    names, autoencoder = ("cat", "dog"), make_autoencoder()
    prior = tiny_prior("transformer", 2, autoencoder.code_spec(), given=(MAP,), class_names=names)
    model = TwoStagePipeline(autoencoder, prior).save_pretrained(tmp_path / "model")
    classes = names if known else ("boat", "car")
    writer = CodeShardWriter(tmp_path / "maps", CodeSpec((MAP,), 16, 16, 3), ["validation"], class_names=classes)
    writer.write(0, maps(3), torch.tensor([1, 1, 0]), ["a", "b", "c"])
    writer.finish()
    out = tmp_path / "out"
    config = GenerateConfig(model=str(model), out=str(out), num=4, given=str(tmp_path / "maps"))
    generate_files(config)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["label"] for sample in samples] == ([1, 1, 0, 1] if known else [0, 1, 0, 1])
    expected = TwoStagePipeline.from_pretrained(model).generate(
        labels=[sample["label"] for sample in samples], given=(maps(3)[0][[0, 1, 2, 0]],)
    )
    with Image.open(out / "000001.png") as written:
        assert written.tobytes() == to_pil(expected.images[1]).tobytes()
    with pytest.raises(UserError, match=r"label was .* and is now 0"):
        generate_files(replace(config, label=0))


@pytest.mark.parametrize(
    ("grid", "split", "message"),
    [
        (
            Grid("map", 2, 4, 8),
            "validation",
            r"holds 2x4 codes of 8 .*, expected 2x2 codes of 8, which this model goes",
        ),
        (MAP, "train", "holds no train images; give the other given_split"),
    ],
)
def test_codes_that_do_not_fit_are_refused(tmp_path: Path, grid, split, message):
    model = make_pipeline().save_pretrained(tmp_path / "model")
    folder = write_maps(tmp_path / "maps", grid)
    with pytest.raises(UserError, match=message):
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path), given=str(folder), given_split=split))


def test_codes_of_another_tokenizer_of_the_same_shape_are_refused(tmp_path: Path):
    model = make_pipeline().save_pretrained(tmp_path / "model")
    folder = write_maps(tmp_path / "maps", fingerprint="others")
    with pytest.raises(UserError, match="maps holds codes of autoencoder others, and this model goes by those of maps"):
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "out"), num=1, given=str(folder)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recorded", "fingerprint", "note"),
    [
        (None, "maps", "compared by their shape only, for this model does not record whose it goes by: those"),
        ("maps", "", "compared by their shape only, for they do not record their maker: those of another"),
        ("maps", "maps", None),
    ],
)
def test_codes_are_taken_with_a_note_where_nothing_tells_whose_they_must_be(
    tmp_path: Path, capsys, recorded: str | None, fingerprint: str, note: str | None
):
    model = make_pipeline(recorded).save_pretrained(tmp_path / "model")
    folder = write_maps(tmp_path / "maps", fingerprint=fingerprint)
    generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "out"), num=1, given=str(folder)))
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "000000.png").exists()
    assert "note:" not in printed if note is None else f"note: the given codes of {folder} were {note}" in printed


def test_a_judge_is_no_judge_of_what_was_given():
    with pytest.raises(UserError, match="got a judge with a prompt, given codes or a size, expected either"):
        GenerateConfig(model="m", out="o", given="codes", judge="timm:resnet50", candidates=2)


def test_a_model_that_needs_them_says_so_and_one_that_does_not_refuses_them(model: Path, tmp_path: Path):
    with pytest.raises(UserError, match="this model goes by codes of other pictures, 2x2 codes of 8, and got none"):
        make_pipeline().generate(1)
    with pytest.raises(UserError, match="this model goes by no other codes; leave given out"):
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path), given=str(write_maps(tmp_path / "maps"))))
