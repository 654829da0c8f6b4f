from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.errors import UserError
from pipelines.cli import main
from pipelines.codec.codec import Codec
from pipelines.commands.write import WriteConfig, write_sequences
from pipelines.demo.model import open_subject
from pipelines.latents.models import load_vae
from pipelines.stages import load_autoencoder
from stage1_vae.sequences.data import SequenceDataConfig
from stage1_vae.sequences.decoders import RecurrentConfig
from stage1_vae.sequences.sequence_vae import SequenceVAE, SequenceVAEConfig


def saved(folder: Path, *, tokens: bool) -> str:
    torch.manual_seed(0)
    config = SequenceVAEConfig(latents=2, encoder_hidden=6, decoder=RecurrentConfig(hidden=8), mixtures=2)
    model = SequenceVAE(config, 9, list("abc") if tokens else None)
    for weight in model.parameters():
        weight.data.mul_(3)
    return str(model.save_pretrained(folder / f"model{int(tokens)}"))


def test_lines_are_a_function_of_their_number_and_the_seed(tmp_path: Path, capsys):
    model = saved(tmp_path, tokens=True)
    for num in (3, 5):
        assert main(["write", "--model", model, "--num", str(num), "--out", str(tmp_path / str(num))]) == 0
    assert "5 lines in" in capsys.readouterr().out
    few, more = ((tmp_path / str(num) / "lines.txt").read_text().split("\n") for num in (3, 5))
    assert few[:3] == more[:3]
    assert len(more) == 6
    write_sequences(WriteConfig(model=model, num=5, seed=1, out=str(tmp_path / "other")))
    assert (tmp_path / "other" / "lines.txt").read_text().split("\n") != more


def test_drawings_at_several_temperatures_are_files_and_a_sheet(tmp_path: Path):
    model = saved(tmp_path, tokens=False)
    line = write_sequences(WriteConfig(model=model, num=3, temperatures=(0.0, 1.0), out=str(tmp_path / "out")))
    assert line.startswith("6 drawings")
    assert len(list((tmp_path / "out").glob("*.svg"))) == 6
    assert np.asarray(Image.open(tmp_path / "out" / "sheet.png")).std() > 1
    with pytest.raises(UserError, match="out was begun with other settings: num was 3 and is now 2; give the former"):
        write_sequences(WriteConfig(model=model, num=2, temperatures=(0.0, 1.0), out=str(tmp_path / "out")))
    again = WriteConfig(model=model, num=3, temperatures=(0.0,), out=str(tmp_path / "cold"))
    write_sequences(again)
    assert (tmp_path / "cold" / "000001.svg").read_text() == (tmp_path / "out" / "000001.svg").read_text()


def test_a_way_leads_from_one_sequence_to_another(tmp_path: Path):
    model = saved(tmp_path, tokens=True)
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(["a b", "b a", "c", "abc", "cab"] * 30), encoding="utf-8")
    with pytest.raises(UserError, match="other sequences than the model was trained on"):
        write_sequences(WriteConfig(model=model, between=str(text), out=str(tmp_path / "a")))
    text.write_text("\n".join(["aab", "ba", "a", "abc", "cab"] * 30), encoding="utf-8")
    config = WriteConfig(model=model, between=str(text), second=3, num=4, temperatures=(0.0,), out=str(tmp_path / "b"))
    assert write_sequences(config).startswith("4 lines")
    with pytest.raises(UserError, match=r"second=999, expected 0 to 99"):
        write_sequences(WriteConfig(model=model, between=str(text), second=999, out=str(tmp_path / "c")))


def test_a_way_leads_between_sequences_that_the_run_held_out(tmp_path: Path):
    """A model alone does not tell how many were held out, of which the vocabulary's order depends."""
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(["aab", "ba", "a", "abc", "cab"] * 4), encoding="utf-8")
    data = SequenceDataConfig(path=str(text), longest=9, validation_count=7)
    (run := tmp_path / "run").mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"sequences": {**asdict(data), "fonts": list(data.fonts)}}))
    saved(run, tokens=True)
    (run / "model1").rename(run / "model")
    write_sequences(WriteConfig(model=str(run), between=str(text), second=6, num=3, out=str(tmp_path / "a")))
    with pytest.raises(UserError, match="second=7, expected 0 to 6"):
        write_sequences(WriteConfig(model=str(run), between=str(text), second=7, num=3, out=str(tmp_path / "b")))


def test_commands_of_images_name_this_one(tmp_path: Path):
    model = saved(tmp_path, tokens=True)
    for opened in (partial(open_subject, device_name="cpu"), load_autoencoder, load_vae, Codec.from_pretrained):
        with pytest.raises(UserError, match="of kind sequence, expected one of images; try: zellige write --model"):
            opened(model)
    with pytest.raises(UserError, match="name the run or model folder that `zellige train-sequence` wrote"):
        write_sequences(WriteConfig(model=str(tmp_path), out=str(tmp_path / "out")))


def test_impossible_options_are_refused():
    with pytest.raises(UserError, match="first=3 and second=1 are the ends of a way, got none"):
        WriteConfig(model="m", out="o", first=3)
    with pytest.raises(UserError, match="num=1, expected at least 2"):
        WriteConfig(model="m", out="o", between="t.txt", num=1)
    with pytest.raises(UserError, match="each 0 or above"):
        WriteConfig(model="m", out="o", temperatures=(-1.0,))
