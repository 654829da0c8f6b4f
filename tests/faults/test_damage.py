"""A file of ours that is cut short, or in which one bit flips: what reads it works as if nothing were, mends it, or
says in one sentence which file it is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from common.model_io import load_pretrained
from pipelines.cli import main
from stage1_vq.autoencoders import AUTOENCODERS
from tests.faults.conftest import Workshop, assert_same, result
from tests.faults.workshop import line

# Each kind of file that we write, and the job that reads it: into a new folder, or, where it is the job's own, again.
KINDS = [
    ("train-stage1/model/config.json", "reconstruct"),
    ("train-stage1/model/model.safetensors", "reconstruct"),
    ("assemble/model_index.json", "generate"),
    ("assemble/stage2/training_images.safetensors", "evaluate"),
    ("assemble/tables.safetensors", "compress"),
    ("encode/index.json", "train-stage2"),
    ("encode/codes-00000-of-00003.safetensors", "train-stage2"),
    ("train-stage1/config.yaml", "encode"),
    ("train-stage1/checkpoints/*9/model.safetensors", "train-stage1"),
    ("train-vae/checkpoints/*9/state.json", "train-vae"),
    ("train-vae/checkpoints/*9/manifest.json", "train-vae"),
    ("train-stage2/config.yaml", "train-stage2"),
    ("train-vae/run.json", "train-vae"),
    ("encode/codes-00001-of-00003.safetensors", "encode"),
    ("compress/left/02.zlg", "compress"),
    ("compress/settings.json", "compress"),
    ("archive/images.zlg", "archive"),
    ("lossless/images.zlg", "lossless"),
    ("generate/000003.png", "generate"),
    ("generate/samples.jsonl", "generate"),
    ("inpaint/part_000014/left/14_1.png", "inpaint"),
    ("inpaint/.units/000014-000028.json", "inpaint"),
    ("reconstruct/psnr.json", "reconstruct"),
]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        chance = random.Random(f"{path} {how}")
        place = chance.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])


@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize(("pattern", "job"), KINDS, ids=[f"{pattern}-{job}" for pattern, job in KINDS])
def test_damage_is_harmless_mended_or_said(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], pattern: str, job: str, how: str
):
    (path,) = Path().glob(pattern)
    damage(path, how)
    out = job if pattern.startswith(f"{job}/") else f"new-{result(job)}"
    code = main(line(job, out))
    said = capsys.readouterr().err
    if code == 0:
        assert_same(job, Path(out))
        return
    assert code == 2
    assert said.startswith("zellige: ")
    assert said.count("\n") == 1
    assert any(str(place) in said for place in (path, *path.parents[:-1])), said
    assert not Path(out).exists() or out == job or not [path for path in Path(out).rglob("*") if path.is_file()]


def test_a_damaged_log_loses_its_damaged_lines_alone_and_says_so(workshop: Workshop, capsys):
    log = Path("train-stage1/metrics.jsonl")
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join([whole[0], whole[1][1:], *whole[2:]]))
    assert main(line("train-stage1", "train-stage1")) == 0
    assert (
        f"{log}: 1 damaged line taken out: curves have a gap there, and the training has none"
        in capsys.readouterr().out
    )
    assert log.read_text() == "".join([whole[0], *whole[2:]])
    log.write_bytes(b"".join([whole[0].encode(), b"\xff\x00", *[text.encode() for text in whole[1:]]]))
    Path("train-stage1/timing.jsonl").write_bytes(b'{"step": 2}\n\xff')
    assert main(line("train-stage1", "train-stage1")) == 0
    assert log.read_text() == "".join([whole[0], *whole[2:]])


def test_models_of_earlier_versions_have_no_fingerprint_and_open(workshop: Workshop):
    config = Path("train-stage1/model/config.json")
    text = config.read_text()
    config.write_text(text.replace(',\n  "fingerprint"', ',\n  "other"'))
    assert config.read_text() != text
    assert load_pretrained("train-stage1", AUTOENCODERS).fingerprint() in text


@pytest.mark.parametrize("how", ["cut", "flip", "flop"])
def test_a_damaged_evaluation_is_not_repeated(workshop: Workshop, capsys, how: str):
    damage(Path("evaluation.json"), how)
    code = main(["evaluate", "--model", "assemble", "--against", "evaluation.json"])
    assert code in (0, 2)
    assert code == 0 or "evaluation.json" in capsys.readouterr().err
