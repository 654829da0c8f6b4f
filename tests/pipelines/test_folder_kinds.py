"""What folders are, told by their files; those of earlier builds too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.folder_kinds import after_stage_one, kind_of_folder

EARLIER = Path(__file__).parents[1] / "earlier_builds"


@pytest.fixture
def folders(model: Path, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "model").symlink_to(model)
    for name, config in (("one", "model: {}\ndata: {path: x}\n"), ("two", "model: {}\ncodes: x\n"), ("mad", "a: {\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config)
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "index.json").write_text(json.dumps({"code_spec": {}}))
    return {
        "an assembled model": model,
        "a model of kind vqvae": model / "stage1",
        "a model of kind transformer": model / "stage2",
        "a run of stage one": tmp_path / "one",
        "a run of stage two": tmp_path / "two",
        "a run of quickstart": tmp_path / "quickstart",
        "a folder of code shards": tmp_path / "codes",
        "a folder of .zlg files": EARLIER / "zlg",
    }


def test_every_kind_is_told(folders):
    for what, folder in folders.items():
        kind = kind_of_folder(folder)
        assert kind is not None
        assert kind.what == what
        assert kind.then.startswith("zellige ")
        assert str(folder) in kind.then


def test_codes_that_stayed_as_they_were_are_not_made_anew(folders):
    """As of a decoder that was trained on codes of another model: its shards and priors are there."""
    run = folders["a run of stage one"]
    assert after_stage_one(run) == f"zellige encode --model {run} --out CODES"
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text('{"arguments": {"codes_maker": "0a1b"}}')
    assert after_stage_one(run) == f"zellige assemble --stage1 {run} --stage2 PRIOR --out MODEL"


def test_what_is_not_ours_has_no_kind(folders, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.json").write_text("no JSON")
    (tmp_path / "photos" / ".hidden.zlg").write_text("")
    for name in ("photos", "mad", "nowhere"):
        assert kind_of_folder(tmp_path / name) is None
