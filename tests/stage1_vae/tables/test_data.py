"""What is read of CSV files, what is refused and how, and which rows are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from stage1_vae.tables.data import Rows, TableConfig, number_columns, read_table, split_table, write_table


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_cells_are_numbers_or_missing(tmp_path: Path):
    read = read_table(table(tmp_path, "﻿id,a, b\nx,1, nan\n\ny,,-2.5e1\nz,NA,3\n"))
    assert read.header == ("id", "a", "b")
    np.testing.assert_array_equal(read.numbers(["b", "a"]), [[np.nan, 1], [-25, np.nan], [3, np.nan]])
    assert read.texts("id") == ["x", "y", "z"]


def test_tabs_part_the_columns_of_a_tsv_file_and_come_back(tmp_path: Path):
    read = read_table(table(tmp_path, "a\tb,c\n1\t2\n", "t.tsv"))
    assert read.header == ("a", "b,c")
    write_table(tmp_path / "u.tsv", read.header, read.cells)
    assert (tmp_path / "u.tsv").read_text() == "a\tb,c\n1\t2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,x\n", "line 3, column 'b' holds 'x', expected a number, or an empty cell where it is missing"),
        ("a,b\n1,inf\n", "line 2, column 'b' holds 'inf', expected a number"),
        ("a,b\n1,2\n3\n", "line 3 has 1 cell, expected 2 as in the header"),
        ("a,b\n\n1,2\n\n3,x\n", "line 5, column 'b' holds 'x'"),
        ('a,b\n"1\n",2\n3,x\n', "line 4, column 'b' holds 'x'"),
        ("a,a\n1,2\n", "several columns called 'a'"),
        ("a,,\n1,2,3\n", "several columns without a name"),
        ("a;b\n1;2\n", "one column, 'a;b', expected columns parted by commas"),
        ("a,b\n", "holds 1 line, expected a header and rows below it"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, message: str):
    path = table(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_table(path).numbers(["a", "b"])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_named_columns_must_be_there_and_are_not_modelled(tmp_path: Path):
    read = read_table(table(tmp_path, "id,b,x,y\nr,1,2,3\n"))
    assert number_columns(read, TableConfig(id_column="id", batch_column="b")) == ("x", "y")
    with pytest.raises(UserError, match=r"has no column 'ident', expected it among id, b, x, y"):
        number_columns(read, TableConfig(id_column="ident"))
    with pytest.raises(UserError, match="name a column twice"):
        TableConfig(id_column="b", batch_column="b")


def test_a_column_without_a_name_is_not_modelled(tmp_path: Path):
    read = read_table(table(tmp_path, ",a\n0,1\n1,2\n"))  # as pandas' to_csv writes it
    with pytest.raises(UserError, match=r"column 1 has no name, .* give --table.id_column id, or leave it out"):
        number_columns(read, TableConfig())
    with pytest.raises(UserError, match="column 2 has no name"):
        number_columns(read_table(table(tmp_path, "id,,a\n0,1,2\n")), TableConfig(id_column="id"))


def test_rows_of_a_part_are_named_as_in_the_file(tmp_path: Path):
    lines = [*(str(i) for i in range(28)), "", "oops"]  # the last is in line 31, the header in line 1
    read = read_table(table(tmp_path, "a\n" + "\n".join(lines)))
    for part in split_table(read, TableConfig(validation_share=0.3)):
        if ["oops"] in part.cells:
            with pytest.raises(UserError, match=r"t.csv, line 31, column 'a' holds 'oops'"):
                part.numbers(["a"])
            break
    else:
        raise AssertionError("no part has the row")


def test_held_out_rows_go_by_their_seed_alone(tmp_path: Path):
    read = read_table(table(tmp_path, "a\n" + "\n".join(map(str, range(20)))))
    first, held = split_table(read, TableConfig(validation_share=0.2))
    assert sorted(int(cells[0]) for part in (first, held) for cells in part.cells) == list(range(20))
    assert len(held) == 4
    assert split_table(read, TableConfig(validation_share=0.2))[1].cells == held.cells
    assert split_table(read, TableConfig(validation_share=0.2, validation_seed=1))[1].cells != held.cells
    assert len(split_table(read, TableConfig(validation_share=0))[1]) == 0


def test_rows_come_with_their_numbers_and_draws():
    batch = Rows(torch.arange(8.0).view(4, 2)).fetch([3, 1], [7, 9])
    assert batch["rows"].tolist() == [[6, 7], [2, 3]]
    assert (batch["numbers"].tolist(), batch["draws"].tolist()) == ([3, 1], [7, 9])
