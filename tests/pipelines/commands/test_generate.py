"""Generated files depend on model, settings and index alone: not on interruptions, number or processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import pipelines.commands.generate
from codes.spec import Codes
from common.errors import UserError
from images.sources import open_source
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.generation import results, work
from pipelines.generation.store import FolderStore
from pipelines.labels import class_number
from pipelines.pictures import to_pil
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import VQVAE
from tests.pipelines.conftest import make_pipeline
from tests.processes import Processes, run_zellige


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def test_images_sheet_and_record(model: Path, tmp_path: Path):
    out = tmp_path / "out"
    line = generate_files(GenerateConfig(model=str(model), out=str(out), num=7, seed=3, top_k=5, batch_size=4))
    assert line == (
        f"7 images in {out}, 7 of them new; the first are on {out}/sheet.png, all of them in {out}/samples.jsonl"
    )
    numbered = [f"{i:06d}.png" for i in range(7)]
    assert sorted(contents(out)) == [*numbered, "samples.jsonl", "settings.json", "sheet.png"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["file"] for sample in samples] == numbered
    assert [sample["label"] for sample in samples] == [0, 1, 2, 0, 1, 2, 0]
    fingerprint = make_pipeline().fingerprint()
    size = (out / "000005.png").stat().st_size
    assert samples[5] == {"file": "000005.png", "index": 5, "label": 2, "class_name": "class 2", "bytes": size}
    assert json.loads((out / "settings.json").read_text()) == {
        "command": "generate", "label": None, "given": None, "model": fingerprint,
        "prompt": None, "size": None, "plan": None, "format": "png", "quality": None, "compression": None,
        "images_per_shard": 1000,
        "seed": 3, "batch_size": 4, "temperature": 1.0, "top_k": 5, "top_p": 1.0, "min_p": 0.0, "guidance": 1.0,
        "guidance_schedule": "constant", "guidance_power": 1.0, "guidance_start": 0.0, "guidance_end": 1.0,
        "guidance_layer": 0,
        "steps": None, "order": None, "choice_temperature": None, "mask_schedule": None, "remask": "off",
        "remask_rate": None, "remask_start": None, "remask_end": None, "remask_filled": None,
        "precision": None, "decoder_precision": None, "candidates": 1,
        "judge": None, "judge_weights": None,
    }  # fmt: skip
    with Image.open(out / numbered[0]) as image:
        assert (image.mode, image.size) == ("L", (16, 16))


def test_files_are_what_the_pipeline_generates(model: Path, tmp_path: Path):
    generate_files(GenerateConfig(model=str(model), out=str(tmp_path), num=3, seed=8, batch_size=3))
    images = make_pipeline().generate(3, seed=8).images
    for i, image in enumerate(images):
        with Image.open(tmp_path / f"{i:06d}.png") as written:
            assert written.tobytes() == to_pil(image).tobytes()


def test_a_run_that_was_cut_is_continued_to_the_same_files(model: Path, tmp_path: Path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    generate_files(GenerateConfig(model=str(model), out=str(whole), num=10, batch_size=4))

    write, written = FolderStore.write, []

    def write_five(store: FolderStore, name: str, data: bytes) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(name)
        write(store, name, data)

    monkeypatch.setattr(FolderStore, "write", write_five)
    with pytest.raises(KeyboardInterrupt):
        generate_files(GenerateConfig(model=str(model), out=str(cut), num=10, batch_size=4))
    monkeypatch.setattr(FolderStore, "write", write)
    assert 5 <= len(list(cut.glob("0*.png"))) < 10
    (cut / ".000009.png.123.tmp").write_bytes(b"half")  # as kill -9 leaves it
    (cut / "000001.png").write_bytes((cut / "000001.png").read_bytes()[:50])  # as a power failure leaves it

    line = generate_files(GenerateConfig(model=str(model), out=str(cut), num=10, batch_size=4))
    assert contents(cut) == contents(whole)
    assert "10 images" in line


def test_an_archive_for_evaluators_holds_all_files_and_their_classes(model: Path, tmp_path: Path):
    out = tmp_path / "out"
    config = GenerateConfig(model=str(model), out=str(out), num=7, batch_size=4, format="npz")
    assert "7 of them new, all in " in generate_files(config)
    written = (out / "samples.npz").read_bytes()
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert arrays["arr_0"].shape == (7, 16, 16, 3)  # of grey images too, as the evaluator takes no others
        for i, pixels in enumerate(arrays["arr_0"]):
            with Image.open(out / f"{i:06d}.png") as image:
                assert np.array_equal(np.asarray(image.convert("RGB")), pixels)
    (out / "samples.npz").unlink()
    (out / "000005.png").unlink()  # as after a kill: what lacks is made, and the archive from all
    assert "1 of them new" in generate_files(config)
    assert (out / "samples.npz").read_bytes() == written
    generate_files(replace(config, num=5))
    with np.load(out / "samples.npz") as arrays:
        assert len(arrays["arr_0"]) == len(arrays["arr_1"]) == 5
    source = open_source(str(out / "samples.npz"), "train", tmp_path)
    with Image.open(out / "000002.png") as image:
        assert np.array_equal(source.read(2, 16, 16, 1)[:, :, 0], np.asarray(image))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2, 0, 1]


def test_what_is_there_is_not_made_again(model: Path, tmp_path: Path, monkeypatch):
    config = GenerateConfig(model=str(model), out=str(tmp_path), num=5, batch_size=4)
    generate_files(config)
    before = contents(tmp_path)

    def refuse(*arguments, **settings):
        raise AssertionError("sampled although everything was there")

    monkeypatch.setattr(pipelines.commands.generate.TwoStagePipeline, "sample", refuse)
    assert "0 of them new" in generate_files(config)
    assert contents(tmp_path) == before


def test_a_larger_number_adds_to_the_same_files(model: Path, tmp_path: Path):
    grown, at_once = tmp_path / "grown", tmp_path / "at_once"
    generate_files(GenerateConfig(model=str(model), out=str(grown), num=5, batch_size=4))
    line = generate_files(GenerateConfig(model=str(model), out=str(grown), num=9))  # batch size as recorded
    generate_files(GenerateConfig(model=str(model), out=str(at_once), num=9, batch_size=4))
    assert contents(grown) == contents(at_once)
    assert "9 images" in line


def sizes_of_batches(monkeypatch) -> list[int]:
    """Of those that are sampled from now on."""
    batches: list[int] = []
    sample = TwoStagePipeline.sample

    def noted(self, indices, *arguments, **settings):
        batches.append(len(indices))
        return sample(self, indices, *arguments, **settings)

    monkeypatch.setattr(TwoStagePipeline, "sample", noted)
    return batches


def test_a_batch_size_that_nobody_asked_for_binds_nobody(model: Path, tmp_path: Path, monkeypatch):
    """Two images and then more are, byte for byte, those that are made at once, and in full batches."""
    grown, at_once = tmp_path / "grown", tmp_path / "at_once"
    monkeypatch.setattr(results, "BATCH_SIZE", 8)
    monkeypatch.setattr(work, "BATCH_SIZE", 8)
    config = GenerateConfig(model=str(model), out=str(grown), num=2)
    generate_files(config)
    batches = sizes_of_batches(monkeypatch)
    generate_files(replace(config, num=12))
    assert batches == [8, 8]
    generate_files(replace(config, num=12, out=str(at_once)))
    assert contents(grown) == contents(at_once)
    assert json.loads((grown / "settings.json").read_text())["batch_size"] is None


def test_a_batch_size_that_was_asked_for_is_the_folder_s(model: Path, tmp_path: Path, monkeypatch, capsys):
    config = GenerateConfig(model=str(model), out=str(tmp_path), num=2, batch_size=2)
    generate_files(config)
    batches = sizes_of_batches(monkeypatch)
    generate_files(replace(config, num=3, batch_size=None))
    assert batches == [2]
    assert capsys.readouterr().out == ""
    before = contents(tmp_path)
    generate_files(replace(config, num=8, batch_size=3))  # what is there stays as it is
    assert batches == [2, 3, 3]
    assert "was begun in batches of 2; what is missing is made in batches of 3" in capsys.readouterr().out
    after = contents(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name[0] == "0")
    assert json.loads((tmp_path / "settings.json").read_text())["batch_size"] == 2


@pytest.mark.parametrize(("recorded", "kept"), [(2, None), (4, 4)])
def test_of_builds_that_always_recorded_a_batch_size_the_number_of_images_does_not_bind(
    model: Path, tmp_path: Path, recorded, kept
):
    config = GenerateConfig(model=str(model), out=str(tmp_path), num=2)
    generate_files(config)
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["batch_size"] = recorded
    del settings["command"], settings["judge_weights"], settings["min_p"]  # fields that it did not have
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    generate_files(replace(config, num=5))
    assert json.loads((tmp_path / "settings.json").read_text())["batch_size"] == kept
    with pytest.raises(UserError, match=r"min_p was 0.0 and is now 0.2"):
        generate_files(replace(config, min_p=0.2))


def test_a_model_that_moved_is_the_same(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "a")
    config = GenerateConfig(model=str(tmp_path / "a"), out=str(tmp_path / "out"), num=2)
    generate_files(config)
    (tmp_path / "a").rename(tmp_path / "b")
    assert generate_files(replace(config, model=str(tmp_path / "b"), num=3)).startswith("3 images in")


def test_a_cuda_graph_is_refused_before_anything_is_written(model: Path, tmp_path: Path):
    with pytest.raises(UserError, match="got cuda_graph on the device cpu"):
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "out"), cuda_graph=True, device="cpu"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"got cuda_graph with size=\(32, 16\), expected either"):
        GenerateConfig(model=str(model), out=str(tmp_path), cuda_graph=True, size=(32, 16))


def test_a_smaller_number_leaves_the_record_of_what_is_there(model: Path, tmp_path: Path):
    config = GenerateConfig(model=str(model), out=str(tmp_path), num=9, batch_size=4)
    generate_files(config)
    before = contents(tmp_path)
    generate_files(replace(config, num=2))
    assert contents(tmp_path) == before


def test_images_of_others_are_not_written_over(model: Path, tmp_path: Path):
    Image.new("L", (4, 4)).save(tmp_path / "000001.png")
    with pytest.raises(UserError, match=r"holds 000001.png, which this command did not write; name another --out"):
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path), num=3))
    assert [path.name for path in tmp_path.iterdir()] == ["000001.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (30, 28)}, r"size=\(30, 28\), expected two multiples of 4, the pixels to a code of this model"),
        ({"steps": 5}, "steps=5 for a transformer prior"),
    ],
)
def test_what_cannot_be_drawn_leaves_no_folder(options, message, model: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "out"), num=3, **options))
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_and_named(model: Path, tmp_path: Path):
    generate_files(GenerateConfig(model=str(model), out=str(tmp_path), num=2))
    before = contents(tmp_path)
    with pytest.raises(UserError) as refused:
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path), num=2, seed=1, temperature=0.5))
    assert str(refused.value) == (
        f"{tmp_path} was begun with other settings: seed was 0 and is now 1; "
        "temperature was 1.0 and is now 0.5; "
        "give the former values to continue it, or name another --out folder"
    )
    assert contents(tmp_path) == before


def test_settings_bind_once_there_is_an_image(model: Path, tmp_path: Path):
    config = GenerateConfig(model=str(model), out=str(tmp_path), num=2, guidance=1e300)
    with pytest.raises(UserError, match="not finite: guidance=1e\\+300 is too large"):
        generate_files(config)
    generate_files(replace(config, guidance=1.5))


def test_a_seed_out_of_range_is_refused_at_once():
    with pytest.raises(UserError, match="seed=-1, expected 0 to"):
        GenerateConfig(model="nowhere", out="out", seed=-1)


def test_a_class_whose_name_is_a_number_goes_by_its_name(model: Path):
    pipeline = TwoStagePipeline.from_pretrained(model)
    pipeline.prior.class_names = ("1950", "2", "1")
    assert [class_number(pipeline.class_names, label) for label in (1950, 2, 1, "1", 0)] == [0, 1, 2, 2, 0]


def test_a_file_where_the_folder_should_be_is_left_alone(model: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is a file, expected a folder to write to"):
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "notes.txt"), num=2))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_do_not_depend_on_the_number_of_threads_or_the_batch(model: Path, tmp_path: Path, monkeypatch):
    def sensitive(codes: Codes) -> torch.Tensor:
        """A decoder whose pixels depend on threads and batch as rounding errors do, only more."""
        shade = 0.1 * torch.get_num_threads() + 0.01 * len(codes[0])
        return torch.full((len(codes[0]), 1, 16, 16), shade)

    monkeypatch.setattr(VQVAE, "decode", lambda self, codes: sensitive(codes))
    made, before = [], torch.get_num_threads()
    for threads, batch_size in ((1, 5), (3, 5), (3, 2)):
        torch.set_num_threads(threads)
        try:
            out = tmp_path / f"{threads} {batch_size}"
            generate_files(GenerateConfig(model=str(model), out=str(out), num=5, batch_size=batch_size))
            assert torch.get_num_threads() == threads  # as it was before
        finally:
            torch.set_num_threads(before)
        made.append([(out / f"{i:06d}.png").read_bytes() for i in range(5)])
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("label", [2, "class 2"])
def test_one_class_by_number_or_name(model: Path, tmp_path: Path, label):
    generate_files(GenerateConfig(model=str(model), out=str(tmp_path), num=3, label=label))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["label"] for sample in samples] == [2, 2, 2]
    images = make_pipeline().generate(3, labels=2).images
    with Image.open(tmp_path / "000001.png") as written:
        assert written.tobytes() == to_pil(images[1]).tobytes()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "label 3 is out of range: this model knows the 3 classes 0 to 2; choose one of them"),
        (
            "cat",
            "this model has no class named 'cat': its classes are class 0, class 1, class 2; choose one of them",
        ),
    ],
)
def test_a_class_that_does_not_exist_is_refused_before_anything_is_written(model: Path, tmp_path: Path, label, message):
    with pytest.raises(UserError) as refused:
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "out"), label=label))
    assert str(refused.value) == message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "message"), [("num", "num=0, expected"), ("batch_size", "batch_size=0, expected")])
def test_numbers_below_one_are_refused(field, message):
    with pytest.raises(UserError, match=message):
        GenerateConfig(model="m", out="o", **{field: 0})


def test_two_processes_write_the_files_of_one_byte_for_byte(processes: Processes, model: Path, tmp_path: Path):
    words = ("generate", "--model", str(model), "--num", "22", "--batch_size", "4", "--out")
    processes.zellige(*words, tmp_path / "one").succeed()
    processes.together(run_zellige, *words, str(tmp_path / "two"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_progress_counts_the_images_that_are_made(model: Path, tmp_path: Path, monkeypatch):
    bars = []

    def noted(total: int, unit: str, **options):
        bars.append((tqdm(total=total, disable=False), unit))
        return bars[-1][0]

    monkeypatch.setattr(work, "progress_bar", noted)
    generate_files(GenerateConfig(model=str(model), out=str(tmp_path), num=7, batch_size=4))
    assert [(bar.total, bar.n, unit) for bar, unit in bars] == [(7, 7, "images")]


def test_of_two_on_one_folder_one_is_refused_and_nothing_is_lost(processes: Processes, model: Path, tmp_path: Path):
    words = ("generate", "--model", model, "--num", 400, "--batch_size", 2, "--out", tmp_path / "out")
    both = [processes.zellige(*words) for _ in range(2)]
    codes = sorted(process.wait() for process in both)
    errors = [process.stderr for process in both]
    assert codes in ([0, 2], [0, 0])  # one after the other if the machine is so slow
    assert not any("Traceback" in error for error in errors)
    if codes == [0, 2]:
        assert sum("another process is writing to" in error for error in errors) == 1
    line = generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "out"), num=400))
    assert line.startswith("400 images in")
    assert "0 of them new" in line
    hidden = [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert set(hidden) - {".passes"} == {".units"}  # no lock, nothing half-written


@pytest.mark.parametrize("form", ["png", "tar"])
def test_lookahead_changes_no_file_and_is_no_setting_of_the_folder(form, model: Path, tmp_path: Path):
    config = GenerateConfig(model=str(model), out=str(tmp_path / "off"), num=6, batch_size=2, format=form)
    generate_files(replace(config, lookahead="off"))
    assert not (tmp_path / "off" / ".passes").exists()
    ahead = replace(config, out=str(tmp_path / "ahead"), lookahead=4)
    generate_files(replace(ahead, num=3))
    generate_files(replace(ahead, num=4, lookahead="off"))
    generate_files(ahead)
    assert contents(tmp_path / "ahead") == contents(tmp_path / "off")
    passes = json.loads((tmp_path / "ahead" / ".passes" / "000000.json").read_text())
    steps = TwoStagePipeline.from_pretrained(model).prior.steps
    looked_ahead = [number for number in passes if number is not None]
    assert len(passes) == 6
    assert all(steps / 4 <= number < steps for number in looked_ahead)
    assert len(looked_ahead) == (6 if form == "tar" else 5)  # of a tar all images are made anew


def test_lookahead_of_a_certain_length_is_for_what_is_drawn_in_windows(model: Path, tmp_path: Path):
    for setting in ({"size": (32, 32)}, {"cuda_graph": True}):
        with pytest.raises(UserError, match=r"got lookahead=4 with .*, expected either"):
            GenerateConfig(model=str(model), out=str(tmp_path), lookahead=4, **setting)
