"""What a demo draws is what the commands draw, and its command lines say how."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from pipelines.cli import COMMANDS
from pipelines.demo import drawing, walking
from pipelines.demo.drawing import asked_of, keep_of
from pipelines.demo.recipes import (
    edit_command,
    generate_command,
    generate_python,
    latent_command,
    latent_python,
    walk_command,
)
from pipelines.latents.pipeline import LatentPipeline
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.priors import MaskGIT, MaskGITConfig, RandAR, RandARConfig
from tests.pipelines.conftest import make_autoencoder, make_pipeline
from tests.stage1_vae.exact.tiny import tiny_vae

VALUES: dict[str, Any] = {"seed": 7, "label": None, "temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.01}
GUIDED: dict[str, Any] = {"guidance": 2.5, "guidance_schedule": "cosine", "guidance_start": 0.1, "guidance_end": 0.9}


def run(line: str) -> None:
    """What a command line does, in the working folder."""
    zellige, command, *arguments = shlex.split(line)
    assert zellige == "zellige"
    COMMANDS[command].prepare([*arguments, "--device", "cpu"])()


def files(folder: str, names: Sequence[str]) -> list[bytes]:
    return [Image.open(Path(folder) / name).tobytes() for name in names]


def as_numbers(folder: str, name: str) -> np.ndarray:
    return np.asarray(Image.open(Path(folder) / name), dtype=int)


def pixels(pictures: Sequence[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


@pytest.fixture
def pipeline(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TwoStagePipeline:
    """The tiny model, and an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return TwoStagePipeline.from_pretrained(model)


@pytest.mark.parametrize("more", [{}, {"label": 2, **GUIDED}])
def test_the_command_line_makes_the_same_images(pipeline, model, more):
    asked = asked_of(pipeline, {**VALUES, **more})
    shown = drawing.generate(pipeline, asked, 3)
    run(generate_command(str(model), pipeline, asked, 3))
    assert pixels(shown.pictures) == files("new", [f"{i:06d}.png" for i in range(3)])
    assert len(set(pixels(shown.pictures))) == 3
    classes = ["class 2"] * 3 if more else ["class 0", "class 1", "class 2"]
    assert shown.captions == [f"seed 7, image {i}, {name}" for i, name in enumerate(classes)]


def test_the_lines_of_python_make_the_same_images(pipeline, model):
    asked = asked_of(pipeline, {**VALUES, "label": 1})
    shown = drawing.generate(pipeline, asked, 2)
    exec(generate_python(str(model), pipeline, asked, 2), {})
    written = [np.asarray(Image.open(path), dtype=int) for path in sorted(Path("new").glob("*.png"))]
    made = [np.asarray(picture, dtype=int) for picture in shown.pictures]
    assert np.abs(np.stack(written) - np.stack(made)).max() <= 1


def test_a_top_k_of_0_draws_from_all_codes_of_a_model_that_records_another(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = TwoStagePipeline.from_pretrained(model)
    pipeline.sampling = drawing.replace(pipeline.sampling, top_k=2)
    pipeline.save_pretrained("narrow")
    asked = asked_of(pipeline, {"seed": 1, "top_k": 0})
    line = generate_command("narrow", pipeline, asked, 2)
    assert "--top_k 16 " in line
    run(line)
    assert pixels(drawing.generate(pipeline, asked, 2).pictures) == files("new", ["000000.png", "000001.png"])
    assert "top_k" not in generate_command("narrow", pipeline, asked_of(pipeline, {"seed": 1, "top_k": 2}), 2)


def test_steps_and_chance_of_a_masked_prior_are_told_where_they_are_not_its_own():
    autoencoder = make_autoencoder()
    prior = MaskGIT(MaskGITConfig(layers=1, width=16, heads=2), autoencoder.code_spec(), 0).eval()
    pipeline = TwoStagePipeline(autoencoder, prior)
    usual = asked_of(pipeline, {"seed": 1, "steps": 12, "choice_temperature": 4.5})
    assert generate_command("m", pipeline, usual, 2) == "zellige generate --model m --num 2 --seed 1 --out new"
    other = asked_of(pipeline, {"seed": 1, "steps": 5, "choice_temperature": 0})
    assert "--steps 5 --choice_temperature 0 " in generate_command("m", pipeline, other, 2)
    assert pixels(drawing.generate(pipeline, usual, 2).pictures) != pixels(
        drawing.generate(pipeline, other, 2).pictures
    )


def test_a_step_for_each_code_is_a_randar_priors_own():
    autoencoder = make_autoencoder()
    prior = RandAR(RandARConfig(layers=1, width=16, heads=2, hidden_width=16), autoencoder.code_spec(), 0).eval()
    pipeline = TwoStagePipeline(autoencoder, prior)
    usual = asked_of(pipeline, {"seed": 1, "steps": prior.code_spec.codes_per_image})
    assert generate_command("m", pipeline, usual, 2) == "zellige generate --model m --num 2 --seed 1 --out new"
    assert "--steps 3 " in generate_command("m", pipeline, asked_of(pipeline, {"seed": 1, "steps": 3}), 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": None}, "seed=None, expected a whole number from 0 to 9007199254740991"),
        ({"seed": 2**53}, "seed=9007199254740992, expected"),
        ({"seed": 0, "temperature": -1}, "temperature=-1, expected 0"),
        ({"seed": 0, "steps": 3}, "steps=3 for a transformer prior"),
    ],
)
def test_settings_that_cannot_be_are_told(pipeline, values, said):
    with pytest.raises(UserError, match=said):
        asked_of(pipeline, values)


def test_inpainting_keeps_what_is_not_painted_and_is_that_of_the_command(pipeline, model, pictures):
    picture = Image.open(pictures / "0.png")
    asked = asked_of(pipeline, VALUES)
    keep = keep_of("left", [], 16, 16)
    shown = drawing.inpaint(pipeline, asked, picture, keep, 2)
    Path("0.png").write_bytes((pictures / "0.png").read_bytes())
    run(edit_command("inpaint", str(model), pipeline, asked, "/somewhere/0.png", {"keep": "left", "variants": 2}))
    assert pixels(shown.pictures[1:]) == files("new", ["0_0.png", "0_1.png"])
    for completion in shown.pictures[1:]:
        assert np.array_equal(np.asarray(completion)[:, :8], np.asarray(picture)[:, :8])
    assert np.asarray(shown.pictures[0])[:, 8:].std() == 0  # what stays comes first, the rest grey


def test_variations_and_walks_are_those_of_the_commands(pipeline, model, pictures):
    first, second = (Image.open(pictures / name) for name in ("0.png", "1.png"))
    for name in ("0.png", "1.png"):
        Path(name).write_bytes((pictures / name).read_bytes())
    asked = asked_of(pipeline, {**VALUES, "label": 1, **GUIDED})
    varied = drawing.vary(pipeline, asked, first, 0.5, 2)
    run(edit_command("vary", str(model), pipeline, asked, "0.png", {"share": 0.5, "variants": 2}))
    assert pixels(varied.pictures[1:]) == files("new", ["0_0.png", "0_1.png"])
    walk = drawing.interpolate(pipeline, asked, first, second, 3, 0.2)
    run(walk_command(str(model), pipeline, asked, ("0.png", "1.png"), 3, 0.2).replace("--out new", "--out walk"))
    assert pixels(walk.pictures) == files("walk", [f"step_{i:02d}.png" for i in range(3)])
    assert walk.captions == ["0%", "50%", "100%"]


def test_guidance_without_a_class_is_refused_as_by_the_commands(pipeline, pictures):
    asked = asked_of(pipeline, {**VALUES, "guidance": 3.0})
    with pytest.raises(UserError, match="guidance=3 for any class, expected a class to follow"):
        drawing.vary(pipeline, asked, Image.open(pictures / "0.png"), 0.5, 1)


def layer(boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int] = (448, 448)) -> Image.Image:
    """What a brush leaves: transparent, with opaque boxes (left, top, right, bottom)."""
    made = Image.new("RGBA", size)
    for box in boxes:
        made.paste((255, 0, 0, 255), box)
    return made


def test_a_pixel_is_drawn_anew_where_any_of_it_is_painted():
    canvas = drawing.canvas_of(Image.new("L", (16, 16)), 16, 16)
    assert canvas.size == (448, 448)
    keep = keep_of(drawing.PAINTED, [layer([(28, 56, 57, 60)])], 16, 16)
    assert (~keep).nonzero().tolist() == [[2, 1], [2, 2]]  # one pixel of the canvas reaches into the third column
    assert keep_of(drawing.PAINTED, [layer([]), layer([(0, 0, 28, 28)])], 16, 16).sum() == 255
    assert keep_of("top", [layer([(0, 0, 448, 448)])], 16, 16).sum() == 128


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([], "nothing is painted; paint over what should be drawn anew"),
        ([layer([])], "nothing is painted"),
        ([layer([(0, 0, 448, 448)])], "all of the image is painted; leave some of it"),
    ],
)
def test_a_mask_of_nothing_or_everything_is_told(layers, said):
    with pytest.raises(UserError, match=said):
        keep_of(drawing.PAINTED, layers, 16, 16)


def test_a_vae_generates_the_files_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vae("dense_skip").save_pretrained("vae")
    pipeline = LatentPipeline.from_pretrained("vae")
    shown = walking.generate(pipeline, 5, 3, "sample")
    run(latent_command("vae", 5, 3, "sample"))
    names = [f"{i:06d}.png" for i in range(3)]
    assert pixels(shown.pictures) == files("new", names)
    exec(latent_python("vae", 5, 3, "sample").replace('"new"', '"again"'), {})
    assert np.abs(np.stack([as_numbers("new", name) - as_numbers("again", name) for name in names])).max() <= 1


def test_a_walk_moves_one_number_and_passes_what_is_decoded_at_it():
    pipeline = LatentPipeline(tiny_vae("map_colour"))
    height, width = pipeline.vae.image_size
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    shown = walking.walk(pipeline, picture, 1, 2.0, 5)
    assert shown.captions == ["z1 = -2.00", "z1 = -1.00", "z1 = +0.00", "z1 = +1.00", "z1 = +2.00"]
    latents = pipeline.encode(picture)
    latents.flatten(1)[:, 1] = 1.0
    expected = walking.to_pil(pipeline.decode(latents)[0])
    assert expected.tobytes() == shown.pictures[3].tobytes()
    assert walking.activity(pipeline).shape == (latents.numel(),)
    with pytest.raises(UserError, match="there is no number z99"):
        walking.walk(pipeline, picture, 99, 2.0, 5)


def test_models_without_a_null_label_are_told_a_class():
    pipeline = make_pipeline()
    pipeline.prior.knows_null_label = False
    with pytest.raises(UserError, match="must be told a class"):
        drawing.vary(pipeline, asked_of(pipeline, VALUES), Image.new("L", (16, 16)), 0.5, 1)
