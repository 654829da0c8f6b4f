"""`zellige train-table`, `impute` and `encode-table`, as a person calls them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from common.errors import UserError
from pipelines.cli import main
from pipelines.opening import from_pretrained

TABLE = "who,a,b,note\nx,1.50,2,n1\ny,,4,n2\nz,3,,n3\nu,4,8.0,n4\nv,,,n5\n"
QUICK = "--train.steps 3 --train.batch_size 4 --train.log_every 3 --train.tracker none --model.hidden [4]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    (folder / "t.csv").write_text("".join(line.rpartition(",")[0] + "\n" for line in TABLE.splitlines()))
    line = f"train-table --config miwae --table.path {folder / 't.csv'} --table.id_column who --run {folder / 'run'}"
    assert main([*line.split(), *QUICK.split()]) == 0
    return folder / "run"


def read(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


def test_only_what_is_missing_changes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "t.csv").write_text(TABLE)
    assert main(f"impute --model {run} --table {tmp_path / 't.csv'} --out {tmp_path / 'f.csv'}".split()) == 0
    assert "4 missing numbers of 10 filled in" in capsys.readouterr().out
    before, after = read(tmp_path / "t.csv"), read(tmp_path / "f.csv")
    for one, other in zip(before, after, strict=True):
        assert all(a == b for a, b in zip(one, other, strict=True) if a)
        assert all(float(b) < 1e3 for a, b in zip(one, other, strict=True) if not a)


def test_several_tables_differ_in_what_was_missing(run: Path, tmp_path: Path):
    (tmp_path / "t.csv").write_text(TABLE)
    line = f"impute --model {run} --table {tmp_path / 't.csv'} --out {tmp_path / 'f.csv'} --multiple 2 --draws 50"
    assert main(line.split()) == 0
    one, other = read(tmp_path / "f_1.csv"), read(tmp_path / "f_2.csv")
    assert not (tmp_path / "f.csv").exists()
    assert one[1] == other[1]
    assert one[2][1] != other[2][1]
    assert one[2][2:] == other[2][2:]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--table T --out T", "is the table itself, expected another file"),
        ("--table T --out folder", "out=folder, expected a file to write such as filled.csv"),
        ("--table T --out f.csv --draws 0", "draws=0, expected at least 1"),
        ("--table other.csv --out f.csv", "other.csv has no column 'b', expected all 2 columns"),
        ("--table nowhere.csv --out f.csv", "there is no file nowhere.csv, expected a table"),
    ],
)
def test_mistakes_are_told(
    run: Path,
    tmp_path: Path,
    line: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(TABLE)
    Path("other.csv").write_text("a,c\n1,2\n")
    assert main(["impute", "--model", str(run), *line.replace("T", "t.csv").split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "generate --num 1 --model",
        "assemble --stage1",
        "reconstruct --images images --model",
        "encode --data.path images --model",
        "vary --images images --model",
        "evaluate --data.path images --model",
    ],
)
def test_commands_of_images_name_the_command_of_tables(
    line: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*line.split(), str(run), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "is a model of kind miwae, expected one of images; try: zellige impute --model" in told
    with pytest.raises(UserError, match="is a model of kind miwae, expected one of images; try: zellige impute"):
        from_pretrained(run)
    assert main(["info", "--file", str(run)]) == 2
    assert "a run of stage one (table), expected a .zlg file or a folder of them; try: zellige impute" in (
        capsys.readouterr().err
    )


def test_a_training_without_a_table_says_what_is_needed(capsys: pytest.CaptureFixture[str]):
    assert main(["train-table", "--config", "miwae"]) == 2
    assert "table.path is empty: expected a CSV file with a header; give --table.path" in capsys.readouterr().err


COUNTS = "cell,run,g1,g2\nc1,x,3,0\nc2,y,0,5\nc3,x,10,1\nc4,y,2,2\nc5,x,1,1\nc6,y,4,4\n"


def test_counts_become_latents_and_denoised_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table, run = tmp_path / "c.csv", tmp_path / "run"
    table.write_text(COUNTS)
    named = "--table.id_column cell --table.batch_column run"
    line = f"train-table --config counts --table.path {table} {named} --run {run}"
    quick = "--train.steps 3 --train.batch_size 4 --train.log_every 3 --train.tracker none --model.hidden 4"
    assert main([*line.split(), *quick.split(), "--model.latents", "2"]) == 0
    assert f"next: zellige encode-table --model {run} --table {table}" in capsys.readouterr().out
    line = f"encode-table --model {run} --table {table} --id_column cell --out {tmp_path / 'z.csv'}"
    assert main([*line.split(), "--denoised", str(tmp_path / "d.csv"), "--total", "100", "--batch", "x"]) == 0
    latents, denoised = read(tmp_path / "z.csv"), read(tmp_path / "d.csv")
    assert latents[0] == ["cell", "z1", "z2"]
    assert denoised[0] == ["cell", "g1", "g2"]
    names = [line.split(",")[0] for line in COUNTS.split()]
    assert [row[0] for row in latents] == [row[0] for row in denoised] == names
    assert all(sum(map(float, row[1:])) == pytest.approx(100, abs=0.01) for row in denoised[1:])
    capsys.readouterr()
    line = f"encode-table --model {run} --table {table} --out {tmp_path / 'y.csv'} --denoised {tmp_path / 'e.csv'}"
    assert main([*line.split(), "--batch", "w"]) == 2
    assert "batch=w, expected one of those of this model: x, y" in capsys.readouterr().err
    assert not (tmp_path / "y.csv").exists()
    assert main(f"impute --model {run} --table {table} --out {tmp_path / 'f.csv'}".split()) == 2
    assert "is a model of kind counts, expected miwae" in capsys.readouterr().err


def test_denoising_is_of_counts_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "t.csv").write_text(TABLE)
    line = f"encode-table --model {run} --table {tmp_path / 't.csv'} --out {tmp_path / 'z.csv'}"
    assert main([*line.split(), "--denoised", str(tmp_path / "d.csv")]) == 2
    assert "of a model of kind miwae, expected one of counts" in capsys.readouterr().err
    assert main([*line.split(), "--total", "5"]) == 2
    assert "total and batch are of the denoised counts" in capsys.readouterr().err
    assert main(line.split()) == 0
    assert len(read(tmp_path / "z.csv")[1]) == 10
