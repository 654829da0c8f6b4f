"""`zellige assemble` of a prior that was trained level by level."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from pipelines.cli import main
from pipelines.codec.tables import fit_tables
from pipelines.commands.assemble import AssembleConfig, assemble
from pipelines.options import read_options
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import VQVAE2, VQVAE2Config
from stage1_vq.quantizers import NearestQuantizerConfig
from stage2_prior.priors import HierarchicalConfig, PixelSNAILConfig, TransformerConfig
from stage2_prior.priors.hierarchical import prior_of_level
from tests.pipelines.conftest import make_prior

CONFIG = HierarchicalConfig(
    top=TransformerConfig(layers=1, width=16, heads=2),
    bottom=PixelSNAILConfig(blocks=1, residual_blocks=1, width=16, residual_width=8, heads=2, given_width=8),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `stage1`, `level0` and `level1`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4)
    autoencoder = VQVAE2(VQVAE2Config(channels=1, width=8, residual_width=4, quantizer=quantizer), (16, 16)).eval()
    autoencoder.save_pretrained(folder / "stage1")
    for level in range(2):
        facts = {"class_names": ("a", "b", "c"), "stage1_fingerprint": autoencoder.fingerprint()}
        prior = prior_of_level(CONFIG, autoencoder.code_spec(), level, 3, **facts)
        prior.save_pretrained(folder / f"level{level}")
    make_prior(autoencoder).save_pretrained(folder / "whole")
    return folder


def assembled(runs: Path, out: Path, *names: str, **settings: Any) -> TwoStagePipeline:
    stage2 = tuple(str(runs / name) for name in names)
    assemble(AssembleConfig(stage1=str(runs / "stage1"), stage2=stage2, out=str(out), **settings))
    return TwoStagePipeline.from_pretrained(out)


def assembled_folder(runs: Path, out: Path) -> Path:
    assemble(AssembleConfig(stage1=str(runs / "stage1"), stage2=str(runs / "whole"), out=str(out)))
    return out


def test_levels_become_one_model_that_generates(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    out = tmp_path / "model"
    levels = ["--stage2", "[level0, level1]", "--guidance", "1.5"]
    assert main(["assemble", "--stage1", "stage1", *levels, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"the model is in {out}; next: zellige generate")
    pipeline = TwoStagePipeline.from_pretrained(out)
    assert (pipeline.prior.kind, pipeline.num_classes, pipeline.sampling.guidance) == ("hierarchical", 3, 1.5)
    generated = pipeline.generate(labels=[0, 1, 2, 0])
    assert generated.images.shape == (4, 1, 16, 16)
    assert [tuple(grid.shape) for grid in generated.codes] == [(4, 2, 2), (4, 4, 4)]
    assert assembled(runs, tmp_path / "again", "level1", "level0", guidance=1.5).fingerprint() == pipeline.fingerprint()


def test_settings_that_the_prior_cannot_follow_are_refused(runs, tmp_path):
    with pytest.raises(
        UserError, match="steps=8 for a transformer prior, which draws its codes in an order of its own"
    ):
        assembled(runs, tmp_path / "model", "whole", steps=8)
    assert not (tmp_path / "model").exists()


def test_a_model_in_whose_place_another_comes_keeps_its_tables_and_is_told(runs, tmp_path):
    out = tmp_path / "model"
    config = AssembleConfig(stage1=str(runs / "stage1"), stage2=str(runs / "whole"), out=str(out))
    assert "in place of" not in assemble(config)
    spec = TwoStagePipeline.from_pretrained(out).prior.code_spec
    fit_tables(spec, [tuple(torch.randint(16, (20, g.height, g.width)) for g in spec.grids)]).save(out)
    assert "in place of" not in assemble(config)
    levels = (str(runs / "level0"), str(runs / "level1"))
    assert ", in place of another one; next:" in assemble(replace(config, stage2=levels))
    assert TwoStagePipeline.from_pretrained(out).tables is not None


def test_guidance_to_nothing_is_refused(runs, tmp_path):
    autoencoder = TwoStagePipeline.from_pretrained(assembled_folder(runs, tmp_path / "whole")).autoencoder
    make_prior(autoencoder, 0).save_pretrained(tmp_path / "prior")
    config = AssembleConfig(
        stage1=str(runs / "stage1"), stage2=str(tmp_path / "prior"), out=str(tmp_path / "model"), guidance=3.0
    )
    with pytest.raises(UserError, match="got guidance for a prior without classes, expected guidance=1"):
        assemble(config)


def test_one_run_is_named_by_itself_or_in_brackets(runs, tmp_path):
    arguments = ["--stage1", "a", "--out", "b", "--stage2"]
    assert read_options("assemble", AssembleConfig, [*arguments, "runs/prior"]).stage2 == "runs/prior"
    assert read_options("assemble", AssembleConfig, [*arguments, "[x, y]"]).stage2 == ("x", "y")
    alone = AssembleConfig(stage1=str(runs / "stage1"), stage2=str(runs / "whole"), out=str(tmp_path / "alone"))
    assemble(alone)
    by_itself = TwoStagePipeline.from_pretrained(tmp_path / "alone")
    assert by_itself.prior.kind == "transformer"
    assert assembled(runs, tmp_path / "brackets", "whole").fingerprint() == by_itself.fingerprint()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["level0"],
            "got priors of level0 only, expected one of level1 too; train it by `zellige train-",
        ),
        (["level1"], r'got priors of level1 only, expected one of level0 too; .* --stage2 "\[RUN, RUN\]"'),
        (["level0", "level0"], "got priors of level0 and level0 only, expected one of level1 too"),
        (["level0", "level0", "level1"], "the levels do not belong together: the prior of 2x2 codes of 16 goes by no"),
        (["level0", "whole"], "a transformer prior of .* is no level of a hierarchy"),
    ],
)
def test_levels_that_are_no_whole_hierarchy_are_refused(names, message, runs, tmp_path):
    with pytest.raises(UserError, match=message):
        assembled(runs, tmp_path / "model", *names)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("stage2", ["", "[a, '']"])
def test_an_empty_name_is_no_run(stage2, runs, tmp_path, capsys):
    arguments = ["--stage1", str(runs / "stage1"), "--stage2", stage2, "--out", str(tmp_path / "model")]
    assert main(["assemble", *arguments]) == 2
    assert "stage2 is empty, expected: run or model folder of the prior, or [RUN, RUN ...]" in capsys.readouterr().err
