"""Zellige beside a project's own `pipelines/`, `training/`, `common/`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zellige.shadowing import PACKAGES, ROOT, is_another

MODEL = Path(__file__).parent.parent / "earlier_builds" / "model"

SCRIPT = f"""
import zellige
from zellige import SamplingConfig, TwoStagePipeline
import pipelines, training.mine
from pipelines.mine import answer

assert pipelines.__file__.startswith({{here!r}}) and answer == 42 and training.mine.answer == 43
pipeline = TwoStagePipeline.from_pretrained({str(MODEL)!r})
assert TwoStagePipeline.__module__ == "zellige.pipelines.two_stage"
images = pipeline.generate(2, seed=1).images
codes = pipeline.decompress(pipeline.compress(images))  # imports at the point of use, too
assert "stage1_vq" not in __import__("sys").modules
print(images.sum().item())
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with packages of its own that are called as some of ours."""
    for number, name in enumerate(("pipelines", "training", "common")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "mine.py").write_text(f"answer = {42 + number}\n")
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A process in the folder that finds Zellige as an installed package: after the folder's own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_script_has_both_its_own_packages_and_zellige(project: Path):
    (project / "script.py").write_text(SCRIPT.format(here=str(project)))
    beside = run(project, "script.py")
    assert beside.returncode == 0, beside.stderr
    (project / "plain.py").write_text(
        f"from zellige import TwoStagePipeline\n"
        f"assert TwoStagePipeline.__module__ == 'pipelines.two_stage'\n"
        f"print(TwoStagePipeline.from_pretrained({str(MODEL)!r}).generate(2, seed=1).images.sum().item())\n"
    )
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    (project / "plain.py").rename(elsewhere / "plain.py")
    alone = run(elsewhere, "plain.py")
    assert alone.returncode == 0, alone.stderr
    assert beside.stdout == alone.stdout


def test_the_program_runs_there(project: Path):
    done = run(project, "-m", "zellige", "generate", "--model", str(MODEL), "--num", "2", "--out", "samples")
    assert done.returncode == 0, done.stderr
    assert len(list((project / "samples").glob("00000*.png"))) == 2


def test_the_installed_program_stands_aside_too(project: Path):
    """Its own folder is not the first that Python looks into, but PYTHONPATH=. makes the project's so."""
    code = "import sys; sys.argv = ['zellige', '--version']; from zellige.__main__ import main; sys.exit(main())"
    done = run(project, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("zellige ")


def test_a_recipe_of_ours_is_found_beside_a_folder_called_configs(project: Path):
    (project / "configs").mkdir()
    (project / "configs" / "__init__.py").write_text("")
    done = run(project, "-m", "zellige", "train-stage1", "--config", "mnist_quickstart", "--train.steps", "0")
    assert "train.steps=0, expected at least 1" in done.stderr


def test_in_this_process_all_packages_are_ours():
    assert not any(is_another(name) for name in PACKAGES)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"zellige", "tests", "benchmarks"} == set(
        PACKAGES
    )
