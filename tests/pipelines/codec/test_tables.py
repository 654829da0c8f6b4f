"""Tables cost what the entropy says, take neighbours for contexts only where they pay, and survive a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines.codec.tables as tables_module
from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.tensor_files import load_tensors, save_tensors
from pipelines.codec.tables import CodeTables, GridTables, fit_tables, load_tables

VOCABULARY = 7
SPEC = CodeSpec((Grid("codes", 6, 9, VOCABULARY),), 24, 36)


def independent(images: int) -> torch.Tensor:
    shares = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.04, 0.01])
    return torch.from_numpy(np.random.default_rng(0).choice(VOCABULARY, (images, 6, 9), p=shares))


def one_more_along(images: int, axis: int) -> torch.Tensor:
    """Mostly one more than the neighbour: the upper one along axis 1, the left one along axis 2."""
    steps = np.random.default_rng(0).choice(VOCABULARY, (images, 6, 9), p=[0.02, 0.88, *[0.02] * 5])
    return torch.from_numpy(steps.cumsum(axis=axis) % VOCABULARY)


def after_both(images: int) -> torch.Tensor:
    """The left neighbour or the upper one, by chance."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, VOCABULARY, (images, 6, 9))
    for row in range(1, 6):
        for column in range(1, 9):
            left, upper = codes[:, row, column - 1], codes[:, row - 1, column]
            codes[:, row, column] = np.where(generator.random(images) < 0.5, left, upper)
    return torch.from_numpy(codes)


CODES = {
    "alone": independent,
    "left": partial(one_more_along, axis=2),
    "upper": partial(one_more_along, axis=1),
    "left and upper": after_both,
}


@pytest.mark.parametrize("kind", CODES)
def test_neighbours_are_contexts_where_they_pay_and_codes_come_back(kind):
    codes = CODES[kind](300)
    tables = fit_tables(SPEC, [(part,) for part in codes.split(50)])
    assert " and ".join(tables.grids["codes"].tables) == kind
    for image in codes[:20]:
        payload = tables.encode((image[None],), SPEC)
        assert torch.equal(tables.decode(payload, SPEC)[0], image[None])


@pytest.mark.parametrize("kind", CODES)
def test_a_payload_is_within_half_a_percent_of_the_entropy(kind):
    codes = CODES[kind](2000)
    tables = fit_tables(SPEC, [(codes,)])
    tall = codes.reshape(1, -1, 9)
    spec = CodeSpec((Grid("codes", tall.shape[1], 9, VOCABULARY),), 4, 4)
    bits = 8 * len(tables.encode((tall,), spec))
    assert bits < 1.005 * tables.grids["codes"].bits(tall.numpy()).sum()
    if kind == "alone":
        shares = np.bincount(codes.flatten(), minlength=VOCABULARY) / codes.numel()
        assert bits < 1.005 * -(shares * np.log2(shares)).sum() * codes.numel()


def test_bits_are_those_of_the_frequencies():
    left = np.full((3, 2), 2**22, np.int32)
    left[0] = [2**23 - 8, 8]
    upper = np.full((3, 2), 2**22, np.int32)
    own = GridTables({"left": left, "upper": upper})
    bits = own.bits(np.array([[[0, 1], [0, 0]]]))
    p = (8 + 2**22) / 2**24
    assert bits[0] == pytest.approx(-np.log2(np.array([[0.5, p], [0.5, (2**23 - 8 + 2**22) / 2**24]])))


def test_few_images_give_tables_without_contexts_that_code_what_they_never_saw():
    tables = fit_tables(SPEC, [(torch.zeros(3, 6, 9, dtype=torch.int64),)])
    assert list(tables.grids["codes"].tables) == ["alone"]
    unseen = torch.full((1, 6, 9), 5)
    assert torch.equal(tables.decode(tables.encode((unseen,), SPEC), SPEC)[0], unseen)


def test_no_more_images_judge_than_are_kept_for_it(monkeypatch):
    judged = []
    bits = GridTables.bits

    def counted(self, codes):
        judged.append(len(codes))
        return bits(self, codes)

    monkeypatch.setattr(GridTables, "bits", counted)
    monkeypatch.setattr(tables_module, "JUDGES", 7)
    fit_tables(SPEC, [(part,) for part in independent(200).split(30)])
    assert set(judged) == {7}


def test_a_large_vocabulary_has_no_contexts():
    spec = CodeSpec((Grid("codes", 2, 2, 5000),), 8, 8)
    codes = torch.arange(400).reshape(100, 2, 2)
    assert list(fit_tables(spec, [(codes,)]).grids["codes"].tables) == ["alone"]


def test_a_vocabulary_too_large_for_tables_is_refused():
    spec = CodeSpec((Grid("codes", 2, 2, 2**20 + 1),), 8, 8)
    with pytest.raises(
        UserError, match="vocabulary of 1048577, expected at most 1048576 for tables; compress in mode packed"
    ):
        fit_tables(spec, [])


def test_grids_keep_their_own_tables():
    spec = CodeSpec((Grid("top", 1, 2, 5), Grid("bottom", 2, 4, 3)), 8, 8)
    codes = (torch.randint(5, (40, 1, 2)), torch.randint(3, (40, 2, 4)))
    tables = fit_tables(spec, [codes])
    one = tuple(grid[:1] for grid in codes)
    assert all(map(torch.equal, tables.decode(tables.encode(one, spec), spec), one))


def saved(tmp_path: Path) -> CodeTables:
    tables = fit_tables(SPEC, [(after_both(100),)])
    tables.save(tmp_path)
    return tables


def test_saved_and_loaded_they_are_the_same(tmp_path: Path):
    tables = saved(tmp_path)
    loaded = load_tables(tmp_path)
    assert loaded is not None
    assert loaded.fingerprint() == tables.fingerprint()
    image = (after_both(1),)
    assert loaded.encode(image, SPEC) == tables.encode(image, SPEC)
    assert load_tables(tmp_path / "elsewhere") is None
    assert fit_tables(SPEC, [(after_both(99),)]).fingerprint() != tables.fingerprint()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {**t, "codes.left": t["codes.left"] + 1}, "table left has a row of a wrong sum"),
        (lambda t: {**t, "codes.left": t["codes.left"] * 0}, "table left has a row of a wrong sum"),
        (lambda t: {**t, "codes.left": t["codes.left"][:3].clone()}, r"table left of int32 \(3, 7\)"),
        (lambda t: {**t, "codes.left": t["codes.left"].long()}, r"table left of int64 \(8, 7\)"),
        (lambda t: {**t, "codes.alone": t["codes.left"]}, "tables .* of one grid"),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, damage, message):
    saved(tmp_path)
    path = tmp_path / "tables.safetensors"
    save_tensors(damage(load_tensors(path)), path)
    with pytest.raises(
        UserError, match=rf"tables.safetensors is damaged \({message}\); make it anew by `zellige tables`"
    ):
        load_tables(tmp_path)


def test_a_cut_file_of_tables_is_named(tmp_path: Path):
    saved(tmp_path)
    path = tmp_path / "tables.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"tables.safetensors is damaged"):
        load_tables(tmp_path)


def test_tables_of_other_grids_are_refused():
    tables = fit_tables(SPEC, [(independent(10),)])
    with pytest.raises(
        UserError, match="the tables are of grids codes of 7 codes, expected codes of 8 codes, those of the"
    ):
        tables.check_fit(CodeSpec((Grid("codes", 6, 9, 8),), 24, 36))
