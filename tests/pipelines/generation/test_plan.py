"""What sample i is: a function of the plan and i."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.generation.plan import Amount, read_plan
from pipelines.pictures import to_pil
from tests.pipelines.conftest import make_pipeline

NAMES = ("dark", "light", "2")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_rows_of_both_kinds_of_file_say_the_same(tmp_path: Path):
    table = write(tmp_path / "a.csv", "\ufefflabel,count,seed\nlight,2,\n0,3,7\n2,,7\n")
    lines = write(
        tmp_path / "a.jsonl",
        '{"label": "light", "count": 2}\n\n{"label": 0, "count": 3, "seed": 7}\n{"label": "2", "seed": 7}\n',
    )
    for path in (table, lines):
        plan = read_plan(path, NAMES)
        assert plan.num == 6
        assert plan.labels_of(range(6)) == [1, 1, 0, 0, 0, 2]
        assert plan.prompts_of(range(6)) is None
        # A row with a seed shows the first samples of it; the others go on as without a plan.
        assert plan.draws(range(6), range(6), 5) == ([0, 1, 0, 1, 2, 0], [5, 5, 7, 7, 7, 7])
        assert plan.draws([5, 0], [5, 0], 5) == ([0, 0], [7, 5])


def test_texts_may_hold_what_csv_quotes(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'prompt\n"a fox, red\nand quick"\nein Fuchs\n')
    assert read_plan(path, None).prompts_of([1, 0]) == ["ein Fuchs", "a fox, red\nand quick"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "label,colour\n0,red\n", r"line 2: 'colour' is no column of a plan; expected label, prompt, seed or"),
        ("a.csv", "label\n0\ncat\n", r"line 3: this model has no class named 'cat': its classes are dark, light, 2"),
        ("a.csv", "label,prompt\n0,\n1,x\n", r"line 3: some rows have a prompt and others have none"),
        ("a.csv", "label,count\n0,0\n", r"line 2: count='0', expected a whole number from 1"),
        ("a.csv", "label,label\n0,1\n", r"two columns 'label', expected each once"),
        ("a.csv", f"label\n{10**19}\n", r"line 2: this model has no class named '10000000000000000000'"),
        ("a.jsonl", f'{{"label": {10**19}}}\n', r"line 1: this model has no class named '10000000000000000000'"),
        ("a.jsonl", '{"label": ' + "9" * 5000 + "}\n", r"cannot be read \(Exceeds the limit"),
        ("a.csv", "label\n0,1\n", r"'more than the head' is no column"),
        ("a.jsonl", '{"label": 0.5}\n', r"line 1: label=0.5, expected a class by number or name"),
        ("a.jsonl", '{"seed": -1}\n', r"line 1: seed=-1, expected a whole number from 0"),
        ("a.jsonl", "[0]\n", r'line 1: expected an object such as \{"label": 3\}'),
        ("a.jsonl", "label\n", r"cannot be read"),
        ("a.csv", "label\n", r"has no row"),
        ("a.txt", "0\n", r"expected a .csv or a .jsonl file"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, name: str, text: str, message: str):
    with pytest.raises(UserError, match=message):
        read_plan(write(tmp_path / name, text), NAMES)


def test_a_number_is_asked_for_in_one_way(tmp_path: Path):
    assert Amount().number(None, 3) == 64
    assert Amount(per_class=5).number(None, 3) == 15
    with pytest.raises(UserError, match="per_class=5, but this model has no classes"):
        Amount(per_class=5).number(None, 0)
    with pytest.raises(UserError, match="expected it alone"):
        Amount(per_class=5, num=3)
    path = write(tmp_path / "a.csv", "label\n0\n1\n")
    with pytest.raises(UserError, match=r"num=3, but plan=.* says 2 images"):
        Amount(num=3, plan=path).number(read_plan(path, None), 3)


def test_images_are_those_of_the_rows(model: Path, tmp_path: Path):
    plan = write(tmp_path / "plan.csv", "label,seed,count\nclass 2,,1\n1,9,2\n0,,1\n")
    out = tmp_path / "out"
    generate_files(GenerateConfig(model=str(model), out=str(out), plan=plan, seed=4, batch_size=3))
    pipeline = make_pipeline()
    expected = [
        pipeline.generate(1, labels=2, seed=4),
        pipeline.generate(1, labels=1, seed=9),
        pipeline.generate(1, labels=1, seed=9, first_index=1),
        pipeline.generate(1, labels=0, seed=4, first_index=3),
    ]
    for i, made in enumerate(expected):
        with Image.open(out / f"{i:06d}.png") as image:
            assert image.tobytes() == to_pil(made.images[0]).tobytes()
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(line["label"], line["seed"], line["index_of_seed"]) for line in lines] == [
        (2, 4, 0),
        (1, 9, 0),
        (1, 9, 1),
        (0, 4, 3),
    ]
    write(tmp_path / "plan.csv", "label\n0\n")
    with pytest.raises(UserError, match="begun with other settings: plan was"):
        generate_files(GenerateConfig(model=str(model), out=str(out), plan=plan, seed=4))
    write(tmp_path / "plan.csv", "label\n7\n")
    with pytest.raises(UserError, match="label 7 is out of range"):
        generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "other"), plan=plan))


def test_so_many_of_each_class_are_the_first_ones_of_all(model: Path, tmp_path: Path):
    generate_files(GenerateConfig(model=str(model), out=str(tmp_path), per_class=2, batch_size=4))
    assert "0 of them new" in generate_files(GenerateConfig(model=str(model), out=str(tmp_path), num=6))
