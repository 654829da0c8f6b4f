"""The program: help, exit codes, one sentence for each mistake, and the whole way from images to images."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

import pipelines.cli
from common.errors import UserError
from pipelines.cli import COMMANDS, main

EARLIER_BUILDS = Path(__file__).parents[1] / "earlier_builds"
STAGE1_RECIPES = Path(__file__).parents[2] / "configs" / "stage1"
STAGE1 = """
model: {kind: vqvae, channels: 1, width: 16, residual_width: 8, quantizer: {codebook_size: 16, dim: 4}}
data: {image_size: 16, channels: 1, validation_count: 6}
train: {steps: 6, batch_size: 8, log_every: 2, validate_every: 3, preview_every: 6, save_every: 3, workers: 0}
"""
STAGE2 = """
model: {kind: transformer, layers: 1, width: 16, heads: 2}
label_dropout: 0.1
train: {steps: 6, batch_size: 8, log_every: 2, validate_every: 3, preview_every: 0, save_every: 3, workers: 0}
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with stage1.yaml and stage2.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("stage1.yaml").write_text(STAGE1)
    Path("stage2.yaml").write_text(STAGE2)
    return tmp_path


def zellige(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, last line of stdout, and stderr of one command."""
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out.strip().rpartition("\n")[2], captured.err


def test_help_lists_every_command_and_imports_nothing_heavy():
    check = "import sys; from pipelines.cli import main; main(['--help']); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout
    lines = shown.splitlines()
    helps = [command.help for command in COMMANDS.values()]
    starts = {line.index(text) for line in lines for text in helps if line.endswith(text)}
    assert len(starts) == 1  # one column, whatever the longest name is
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.help.split()] for line in lines)
    modules = shown.splitlines()[-1].split()
    assert "pipelines.cli" in modules
    assert not {"torch", "numpy", "jsonargparse", "PIL"} & set(modules)


HEAVY = {
    "accelerate", "constriction", "huggingface_hub", "matplotlib", "scipy", "sklearn", "tensorboard", "timm",
    "tokenizers", "torch", "torch._dynamo", "torch._inductor", "torchmetrics", "torchvision", "transformers", "wandb",
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        ("train-stage1 --config folder --help", {"torch", "accelerate"}),
        ("train-stage2 --config folder --help", {"torch", "accelerate"}),
        ("encode --help", {"torch", "accelerate"}),
        ("generate --help", {"torch", "accelerate", "constriction"}),
        ("generate --model MODEL --num 1 --out new --device cpu", {"torch", "accelerate", "constriction"}),
        ("info --help", {"constriction"}),
        ("info --file ZLG", {"constriction"}),
        ("codes info --help", {"torch", "accelerate", "constriction"}),
    ],
)
def test_a_command_imports_what_it_needs(model, tmp_path, line, needed):
    """Each of these takes from half a second to several, the compiler of torch and timm the longest."""
    zlg = EARLIER_BUILDS / "zlg" / "prior.zlg"
    arguments = line.replace("MODEL", str(model)).replace("ZLG", str(zlg)).split()
    check = "import sys, pipelines.cli\ntry: pipelines.cli.main(sys.argv[1:])\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", check, *arguments], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "pipelines.options" in (loaded := done.stdout.splitlines()[-1].split())
    assert HEAVY & set(loaded) == needed


def test_the_package_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "pipelines", "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout == f"zellige {version('zellige')}\n"


def test_a_bare_dashes_argument_in_front_as_torchrun_needs_it_changes_nothing(capsys):
    assert main(["--", "--version"]) == 0
    assert capsys.readouterr().out == f"zellige {version('zellige')}\n"


def test_no_command_shows_the_usage(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: zellige COMMAND")


@pytest.mark.parametrize("words", [["help"], ["help", "codes"], ["codes", "help"], ["help", "codes", "info"]])
def test_help_is_a_command_too(words, capsys):
    named = [word for word in words if word != "help"]
    shown = []
    for arguments in (words, [*named, "--help"]):
        with suppress(SystemExit):
            main(arguments)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].startswith(f"usage: zellige {' '.join(named) or 'COMMAND'}")


@pytest.mark.parametrize(
    "line", [["decompress", "--help"], ["info", "--file", str(EARLIER_BUILDS / "zlg" / "packed.zlg")]]
)
def test_a_reader_who_has_seen_enough_gets_no_traceback(line):
    """`zellige generate --help | head -3`."""
    command = [sys.executable, "-m", "pipelines", *line]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None  # noqa: PT018
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: zellige {command}" in capsys.readouterr().out


COMMENTED = [name for name in COMMANDS if name != "codes" and not name.startswith("train-")]


@pytest.mark.parametrize("command", COMMENTED)
def test_help_says_of_every_option_what_it_is(command, capsys):
    """A comment that is broken over lines, or stands elsewhere, is not found, and its option has its type alone."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = re.sub(r"\n {10,}", " ", capsys.readouterr().out)
    options = re.findall(r"^  (--[\w.]+) [A-Z_]+ +(.*)$", text, re.MULTILINE)
    assert options
    assert [name for name, said in options if not said or said.startswith("(")] == []


def test_help_of_the_demo_shows_that_its_model_may_stand_first(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert capsys.readouterr().out.startswith("usage: zellige demo MODEL [--OPTION VALUE ...]\n")


def test_help_of_a_training_command_shows_the_fields_of_its_recipe(recipes, capsys):
    with pytest.raises(SystemExit):
        main(["train-stage2", "--config", "cifar10_pixelcnn", "--help"])
    shown = capsys.readouterr().out
    for field in ("--model.layers", "--train.learning_rate", "--label_dropout", "--codes"):
        assert field in shown
    assert "--model.heads" not in shown  # a transformer's


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generat", "there is no command 'generat'; did you mean generate?"),
        ("train", "there is no command 'train'; did you mean train-stage1, train-vae, train-table, train-stage2 or "
         "train-sequence?"),
        ("xyz", f"there is no command 'xyz'; the commands are {', '.join(COMMANDS)}"),
        ("train-stage1 --data.path x", "train-stage1 needs a recipe, got none; give a YAML file or one of "
         + ", ".join(sorted(path.stem for path in STAGE1_RECIPES.glob("*.yaml")))),
        ("train-stage1 --config stage1.yaml", "data.path is empty: expected a folder of images, an .npz file or a "
         "name such as cifar10; give --data.path"),
        ("train-stage1 --config stage1.yaml --model.codebook_size 9",
         "there is no field model.codebook_size; did you mean model.quantizer.codebook_size?"),
        ("train-stage1 --config stage1.yaml --train.steps ten", "train.steps: expected a whole number, got 'ten'"),
        ("train-stage1 --config stage1.yaml --data.path nowhere --data.image_size 30",
         "data.image_size=30x30 does not fit a model whose codes stand for 4x4 pixels: give multiples of 4"),
        ("train-stage2 --config stage2.yaml", "codes is empty: expected a folder that `zellige encode` wrote; "
         "give --codes"),
        ("generate --out o", "missing: --model; see --help"),
        ("generate --model nowhere --out o", "there is no folder nowhere; put both stages together by "
         "`zellige assemble --stage1 RUN --stage2 RUN --out MODEL` and name that, or a hub id such as owner/name"),
        ("generate --model MODEL/stage1 --out o", "ASSEMBLED/stage1 is a model of kind vqvae, expected an assembled "
         "model; put both stages together by `zellige assemble --stage1 RUN --stage2 RUN --out MODEL` and name that"),
        ("generate --model stage1.yaml --out o", "stage1.yaml is a file, expected an assembled model; put both stages "
         "together by `zellige assemble --stage1 RUN --stage2 RUN --out MODEL` and name that"),
        ("encode --model SHARDS --out o", "SHARDS is a folder of code shards, expected a model; name its folder, or a "
         "run"),
        ("train-stage2 --config stage2.yaml --codes MODEL", "ASSEMBLED is an assembled model, expected code shards, "
         "as a transformer prior models; name the folder that `zellige encode` wrote; latents of a VAE take a recipe "
         "such as mnist_latents_mixture"),
        ("generate --model MODEL --out o --label 3", "label 3 is out of range: this model knows the 3 classes "
         "0 to 2; choose one of them"),
        ("generate --model MODEL --out o --temperature nan", "temperature: expected a finite number, got nan"),
        ("generate --model MODEL --out=",
         "out is empty, expected: folder for the images, sheet.png and samples.jsonl, or an address such as "
         "s3://bucket/place"),
        ("generate --model MODEL o",
         "unexpected argument 'o'; options are given as --NAME VALUE, did you mean --out o?"),
        ("generate --model MODEL --out a b", "unexpected argument 'b'; options are given as --NAME VALUE, see --help"),
        ("info x.zlg", "unexpected argument 'x.zlg'; options are given as --NAME VALUE, did you mean --file x.zlg?"),
        ("train-stage1 folder --data.path x",
         "train-stage1 needs a recipe, got none; did you mean --config folder?"),
        ("train-stage1 --config foldr", "there is no recipe foldr; did you mean folder or folder_flow?"),
        ("train-stage1 --config stage2.yaml", "stage2.yaml is a recipe of stage two; use train-stage2, or name another "
         "--config"),
        ("train-stage2 --config stage1.yaml", "stage1.yaml is a recipe of stage one; use train-stage1, or name another "
         "--config"),
        ("train-stage1 --config cifar10_pixelcnn", "cifar10_pixelcnn is a recipe of stage two; use train-stage2, or "
         "name another --config"),
        ("train-stage1 --config stage1.yaml --data my_photos", "data is a group of fields, expected one of data.path, "
         "data.split, data.download_folder, data.image_size ...; did you mean --data.path my_photos?"),
        ("train-stage1 --config stage1.yaml --model=vqgan", "model is a group of fields, expected one of model.kind, "
         "model.channels, model.width, model.residual_width ...; did you mean --model.kind vqgan?"),
        ("train-stage1 --config stage1.yaml --train", "train is a group of fields, expected one of train.steps, "
         "train.batch_size, train.accumulate, train.learning_rate ...; see --help"),
        ("encode --model MODEL --out o --data my_photos", "data is a group of fields, expected one of data.path, "
         "data.validation_path, data.validation_share, data.image_size ...; did you mean --data.path my_photos?"),
        ("generate --model MODEL --out o --size 128",
         "size: expected two whole numbers such as [128,128], got '128'"),
        ("generate --model MODEL --out o --guidance_schedule linea",
         "guidance_schedule: expected constant, linear or cosine, got 'linea'"),
        ("train-stage1 --config stage1.yaml --train.precision fp8",
         "train.precision: expected no, bf16, fp16 or tf32, got 'fp8'"),
        ("train-stage1 --config stage1.yaml --train.lr 1e-4",
         "there is no field train.lr; did you mean train.learning_rate?"),
        ("encode --model MODEL --out o", "ASSEMBLED/stage1 is a model without its run, which would tell its images: "
         "give --data.path"),
        ("generate --model MODEL --out o --temperature -1",
         "temperature=-1.0, expected 0 (greedy) or more; 1 samples as trained"),
        ("reconstruct --model MODEL --images nowhere --out o",
         "there is no folder or file nowhere; name a folder of images or an image file"),
        ("encode --model nowhere --out o", "there is no folder nowhere; name the folder that `zellige train-stage1` "
         "or `zellige train-stage2` wrote, or a hub id such as owner/name"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_leave_nothing(recipes, model, capsys, line, message):
    before, shards = sorted(recipes.rglob("*")), str(EARLIER_BUILDS / "shards")
    line, message = line.replace("SHARDS", shards), message.replace("SHARDS", shards)
    code, out, err = zellige(capsys, *line.replace("MODEL", str(model)).split())
    assert (code, out, err) == (2, "", f"zellige: {message.replace('ASSEMBLED', str(model))}\n")
    assert sorted(recipes.rglob("*")) == before


def test_debug_shows_the_traceback(recipes):
    with pytest.raises(UserError, match="there is no command"):
        main(["nonsense", "--debug"])


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def job() -> str:
        raise error

    command = COMMANDS["generate"]._replace(prepare=lambda arguments: job)
    monkeypatch.setitem(pipelines.cli.COMMANDS, "generate", command)


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert zellige(capsys, "generate") == (
        130, "", "zellige: interrupted; the same command continues where it stopped\n"
    )  # fmt: skip


def test_a_full_disk_is_told(monkeypatch, capsys):
    fail_with(OSError(28, "No space left on device", "runs/x"), monkeypatch)
    message = "zellige: the disk is full (runs/x); free some space and repeat the command\n"
    assert zellige(capsys, "generate") == (2, "", message)


def test_a_missing_permission_is_told(monkeypatch, capsys):
    fail_with(PermissionError(13, "Permission denied", "photos/x.png"), monkeypatch)
    message = "zellige: no permission for photos/x.png; choose another file or folder, or change its owner\n"
    assert zellige(capsys, "generate") == (2, "", message)


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    fail_with(OSError(5, "Input/output error"), monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        main(["generate"])


def test_of_several_processes_only_the_first_tells_a_mistake_in_the_arguments(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert zellige(capsys, "generat") == (2, "", "")


def test_any_process_tells_what_failed_while_it_worked(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    fail_with(UserError("something is wrong"), monkeypatch)
    assert zellige(capsys, "generate") == (2, "", "zellige, process 1: something is wrong\n")


def test_from_images_to_new_images(recipes, digits, capsys):
    """The README's commands, at the smallest size."""
    train_stage1 = ["train-stage1", "--config", "stage1.yaml", "--data.path", str(digits)]
    code, line, _ = zellige(capsys, *train_stage1)
    assert code == 0
    assert line.startswith("6 steps in ")
    assert "the model is in runs/stage1/model; next: zellige encode --model runs/stage1" in line
    assert Path("runs/stage1/model/config.json").exists()

    code, line, _ = zellige(capsys, "encode", "--model", "runs/stage1", "--out", "codes", "--workers", "0")
    assert code == 0
    assert line.startswith("54 training and 6 held-out images as 4x4 codes of 16")

    train_stage2 = ["train-stage2", "--config", "stage2.yaml", "--codes", "codes", "--run", "prior"]
    code, line, _ = zellige(capsys, *train_stage2)
    assert code == 0
    assert "the model is in prior/model; next: zellige assemble --stage1 RUN --stage2 prior" in line
    assert not list(Path("prior/previews").glob("*"))
    code, line, _ = zellige(
        capsys, *train_stage2, "--train.steps", "7", "--train.preview_every", "7", "--decoder", "runs/stage1"
    )
    assert code == 0
    assert "next: zellige assemble --stage1 runs/stage1 --stage2 prior" in line
    with Image.open("prior/previews/step_00000007.png") as sheet:  # real codes above samples
        assert sheet.height > 2 * 112

    code, line, _ = zellige(
        capsys,
        "assemble",
        "--stage1",
        "runs/stage1",
        "--stage2",
        "prior",
        "--out",
        "model",
        "--guidance",
        "1.5",
    )
    assert (code, line) == (
        0,
        "the model is in model; next: zellige generate --model model --num 64 --out DIR",
    )

    code, line, _ = zellige(capsys, "generate", "--model", "model", "--out", "new", "--num", "5")
    assert code == 0
    assert line.startswith("5 images in new, 5 of them new")
    sample = json.loads(Path("new/samples.jsonl").read_text().splitlines()[4])
    assert (sample["label"], sample["class_name"]) == (1, "1")
    assert json.loads(Path("new/settings.json").read_text())["guidance"] == 1.5
    with Image.open("new/000004.png") as image:
        assert image.size == (16, 16)

    code, line, _ = zellige(capsys, "reconstruct", "--model", "model", "--images", "new", "--out", "again")
    assert code == 0
    assert line.startswith("5 images in again, mean PSNR ")  # their sheet is none of them

    for command in (train_stage1, [*train_stage2, "--train.steps", "7"]):  # what is finished is not done again
        metrics = {path: path.read_bytes() for path in Path().glob("*/**/metrics.jsonl")}
        assert zellige(capsys, *command)[0] == 0
        assert {path: path.read_bytes() for path in metrics} == metrics


@pytest.mark.parametrize("command", ["train-stage1 --config stage1.yaml --data.path DIGITS --run a", "encode --model "
                         "MODEL --data.path DIGITS --out a"])  # fmt: skip
def test_a_device_is_no_part_of_what_decides_a_result(recipes, model, digits, capsys, command):
    words = command.replace("DIGITS", str(digits)).replace("MODEL", str(model)).split()
    code, _, err = zellige(capsys, *words, "--device", "gpu")
    assert code == 2
    assert err.startswith("zellige: device 'gpu' cannot be used (")
    assert not Path("a").exists()
    assert zellige(capsys, *words, "--device", "cpu")[0] == 0
    assert not [path for path in Path("a").glob("*.[yj][as]*") if "device" in path.read_text()]
    assert zellige(capsys, *words)[0] == 0  # on whatever device there is, and nothing is done anew


def test_a_recipe_names_no_device(recipes, capsys):
    Path("stage1.yaml").write_text(STAGE1 + "device: cpu\n")
    code, _, err = zellige(capsys, "train-stage1", "--config", "stage1.yaml", "--data.path", "x")
    assert (code, err) == (2, "zellige: stage1.yaml: there is no field device; see --help for all fields\n")


def test_the_parts_of_an_assembled_model_serve_again(recipes, model, digits, capsys):
    code, line, _ = zellige(capsys, "encode", "--model", str(model), "--data.path", str(digits), "--out", "codes")
    assert code == 0
    assert line.startswith("59 training and 1 held-out images as 4x4 codes of 16")
    again = ["assemble", "--stage1", str(model), "--stage2", str(model), "--out", "cooler", "--temperature", "0.5"]
    assert zellige(capsys, *again)[0] == 0
    old, new = (json.loads((folder / "model_index.json").read_text()) for folder in (model, Path("cooler")))
    assert new["fingerprint"] == old["fingerprint"]
    assert (old["sampling"]["temperature"], new["sampling"]["temperature"]) == (1.0, 0.5)


def test_stages_of_different_runs_are_not_assembled(recipes, digits, capsys):
    code = main(["train-stage1", "--config", "stage1.yaml", "--data.path", str(digits), "--run", "a"])
    code += main(["encode", "--model", "a", "--out", "codes", "--workers", "0"])
    code += main(["train-stage2", "--config", "stage2.yaml", "--codes", "codes", "--run", "prior"])
    other = ["--data.path", str(digits), "--run", "b", "--train.seed", "1"]
    code += main(["train-stage1", "--config", "stage1.yaml", *other])
    assert code == 0
    capsys.readouterr()
    code, _, err = zellige(capsys, "assemble", "--stage1", "b", "--stage2", "prior", "--out", "model")
    assert code == 2
    assert err.startswith("zellige: the two stages do not fit: the prior was trained on codes of autoencoder ")
    assert not Path("model").exists()
    previews = ["train-stage2", "--config", "stage2.yaml", "--codes", "codes", "--run", "other", "--decoder", "b"]
    code, _, err = zellige(capsys, *previews)
    assert code == 2
    assert err.startswith("zellige: codes holds codes of autoencoder ")
    assert not Path("other").exists()


@pytest.mark.slow
def test_training_runs_under_torchrun_and_one_process_speaks(recipes, digits):
    command = [
        "-m",
        "pipelines",
        "--",
        "train-stage1",
        "--config",
        "stage1.yaml",
        "--data.path",
        str(digits),
        "--run",
        "pair",
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *command], check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("6 steps in ") == 1
