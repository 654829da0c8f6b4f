"""Previews show all classes, from all over the held-out samples, and no sample twice."""

from __future__ import annotations

import numpy as np
import pytest

from training.previews import preview_rows


def test_without_classes_two_rows_from_all_over():
    assert preview_rows([-1] * 160) == [[0, 10, 20, 30, 40, 50, 60, 70], [80, 90, 100, 110, 120, 130, 140, 150]]
    assert preview_rows([0] * 160) == preview_rows([-1] * 160)  # one class tells nothing


@pytest.mark.parametrize(("held_out", "rows"), [(0, []), (1, [1]), (3, [3]), (11, [8, 3]), (16, [8, 8])])
def test_of_few_samples_each_is_shown_once(held_out: int, rows: list[int]):
    found = preview_rows([-1] * held_out)
    assert [len(row) for row in found] == rows
    assert [i for row in found for i in row] == list(range(held_out))


def test_of_few_classes_every_row_shows_all():
    labels = np.arange(90) % 3
    first, second = preview_rows(labels)
    assert labels[first].tolist() == labels[second].tolist() == [0, 0, 1, 1, 2, 2]
    assert len({*first, *second}) == 12
    ten = np.arange(200) % 10
    assert [ten[row].tolist() for row in preview_rows(ten)] == [list(range(10))] * 2


def test_of_many_classes_there_is_one_sample_each():
    labels = np.arange(300) % 25
    rows = preview_rows(labels)
    assert [len(row) for row in rows] == [10, 10, 5]
    assert [labels[i] for row in rows for i in row] == list(range(25))
    hundred = np.arange(300) % 100
    shown = [hundred[i] for row in preview_rows(hundred) for i in row]
    assert (len(set(shown)), shown[0], shown[-1]) == (40, 0, 97)


def test_a_class_with_too_few_samples_leaves_its_place_to_the_others():
    labels = [0, 0, 0, 1, -1]
    assert preview_rows(labels) == [[0, 1, 2, 3]]
