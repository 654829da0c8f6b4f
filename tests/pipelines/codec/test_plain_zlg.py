"""A decoder that was written from docs/format.md alone reads what the program writes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codes.spec import CodeSpec, Grid
from common import exact
from common.exact import CHECK, Attention, Product
from common.tensor_files import save_tensors
from pipelines.codec.archive import PAGE, Archive, Entry, Mode, Shape, crc_of, read_archive, write_archive
from pipelines.codec.codec import Codec
from pipelines.codec.dependencies import ENCODING_ONLY, NOT_READ, TRAINING_ONLY
from pipelines.codec.entropy_coding import (
    TOTAL,
    DamagedPayloadError,
    Decoder,
    Encoder,
    bit_length,
    frequencies,
    pack,
    weights_of,
)
from pipelines.codec.prior_coding import encode_with_prior, frequencies_of
from pipelines.codec.tables import TABLES_NAME, fit_tables, load_tables
from stage2_prior.priors import TransformerConfig
from tests import plain_exact, plain_zlg
from tests.pipelines.codec.test_archive import a_large_archive, an_archive
from tests.pipelines.codec.test_kept import KEPT, SMALL
from tests.stage2_prior.tiny import TINY, random_codes, tiny_prior

PAGE_OF_THE_FORMAT = Path(__file__).parents[3] / "docs" / "format.md"
SPECS = {
    "one grid": CodeSpec((Grid("codes", 3, 5, 11),), 12, 20),
    "one code": CodeSpec((Grid("codes", 1, 1, 2),), 4, 4),
    "levels": CodeSpec((Grid("level0", 2, 2, 7), Grid("level1", 4, 4, 600)), 16, 16),
}


def codes_of(spec: CodeSpec, count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Codes in which neighbours say something of each other."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randint(3, (count, g.height, g.width), generator=generator) for g in spec.grids]
    return tuple(step.cumsum(-1) % grid.vocabulary for step, grid in zip(steps, spec.grids, strict=True))


def shape_of(spec: CodeSpec) -> Shape:
    return Shape(spec.image_height, spec.image_width, tuple((g.height, g.width, g.vocabulary) for g in spec.grids))


def numbers(codes: tuple[torch.Tensor, ...]) -> list[int]:
    return [number for grid in codes for number in grid.flatten().tolist()]


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("count", [1, 5, PAGE + 2])
def test_packed_codes(kind, count):
    spec, codes = SPECS[kind], codes_of(SPECS[kind], count)
    rows = [tuple(grid[i : i + 1] for grid in codes) for i in range(count)]
    entries = [
        Entry(
            Mode.packed,
            shape_of(spec),
            crc_of(shape_of(spec), row),
            pack([(own.numpy(), grid.vocabulary) for own, grid in zip(row, spec.grids, strict=True)]),
        )
        for row in rows
    ]
    _, images = plain_zlg.read_file(write_archive(Archive(tuple(entries), b"stage-1!")))
    for image, row in zip(images, rows, strict=True):
        assert plain_zlg.unpack(image) == numbers(row)
        plain_zlg.check_codes(image, numbers(row))


@pytest.mark.parametrize("kind", SPECS)
def test_codes_by_tables(kind, tmp_path: Path):
    spec = SPECS[kind]
    fit_tables(spec, [codes_of(spec, 100)]).save(tmp_path)
    tables, plain = load_tables(tmp_path), plain_zlg.read_tables((tmp_path / TABLES_NAME).read_bytes())
    assert tables is not None
    codes = codes_of(spec, 20, seed=1)
    rows = [tuple(grid[i : i + 1] for grid in codes) for i in range(20)]
    shape = shape_of(spec)
    entries = [Entry(Mode.table, shape, crc_of(shape, row), tables.encode(row, spec)) for row in rows]
    needs, images = plain_zlg.read_file(write_archive(Archive(tuple(entries), b"stage-1!", None, b"a table!")))
    assert needs == {"autoencoder": b"stage-1!", "tables": b"a table!"}
    for image, row in zip(images, rows, strict=True):
        read = list(plain_zlg.decode_with_tables(image, plain, [grid.name for grid in spec.grids]))
        assert read == numbers(row)
        plain_zlg.check_codes(image, read)


def test_contexts_are_tried():
    """Of the grids above some have tables by neighbours."""
    assert {"codes.left"} <= set(fit_tables(SPECS["one grid"], [codes_of(SPECS["one grid"], 100)]).arrays())


@pytest.mark.parametrize("archive", [an_archive(), a_large_archive()])
def test_the_index(archive):
    data = write_archive(archive)
    needs, images = plain_zlg.read_file(data)
    assert needs == {"autoencoder": archive.stage1, "prior": archive.prior, "tables": archive.tables}
    for image, entry in zip(images, read_archive(data).entries, strict=True):
        assert (image.mode, image.crc, image.label, image.name) == (entry.mode, entry.crc, entry.label, entry.name)
        assert (image.height, image.width, tuple(image.grids)) == entry.shape
        assert image.payload == entry.payload


def test_fingerprints_are_those_of_the_page():
    """Of a model that a build of version 1 wrote, its example."""
    page, folder = PAGE_OF_THE_FORMAT.read_text(), Path(__file__).parents[2] / "earlier_builds" / "model"
    weights = [(folder / stage / "model.safetensors").read_bytes() for stage in ("stage1", "stage2")]
    (autoencoder, first), (prior, second) = re.findall(r"^    ({.*})\n    \w+ (\w{16})$", page, re.M)
    assert plain_zlg.model_fingerprint(autoencoder, weights[0], plain_zlg.LEFT_OUT | plain_zlg.OF_ENCODING) == first
    assert plain_zlg.model_fingerprint(prior, weights[1]) == second
    tables = plain_zlg.tables_fingerprint((folder / TABLES_NAME).read_bytes())
    assert f"    tables {tables}\n" in page
    codec = Codec.from_pretrained(folder)
    found = (codec.stage1, codec.prior_fingerprint, codec.tables_fingerprint)
    assert [None if one is None else one.hex() for one in found] == [first, second, tables]


def test_what_fingerprints_leave_out_is_on_the_page():
    page = PAGE_OF_THE_FORMAT.read_text().split("### Fingerprints")[1].split("## Payloads")[0]
    assert (plain_zlg.LEFT_OUT, plain_zlg.OF_ENCODING) == (TRAINING_ONLY, ENCODING_ONLY)
    named = set(re.findall(r"`(\w+)`", page))
    left_out = NOT_READ | TRAINING_ONLY | ENCODING_ONLY
    others = {"f4", "f8", "repr", "kind", "config", "grids", "given", "classes", "text", "embeddings"}
    assert named - others == left_out


# ---- the range coder ------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), n=st.integers(0, 60), k=st.sampled_from([2, 3, 11, 300]), sharp=st.floats(0.003, 3))
@settings(max_examples=1000, deadline=None)
def test_codes_of_any_models_are_decoded_by_the_plain_range_decoder(seed, n, k, sharp):
    generator = np.random.default_rng(seed)
    counts = frequencies(generator.dirichlet(np.full(k, sharp), n)) if n else np.zeros((0, k), np.int64)
    codes = np.array([generator.choice(k, p=row / TOTAL) for row in counts], dtype=np.int64)
    encoder = Encoder()
    encoder.encode(codes, weights_of(counts))
    decoder = plain_zlg.RangeDecoder(encoder.finish())
    assert [decoder.decode(row.tolist()) for row in counts] == codes.tolist()


def whole_interval(codes: list[int], rows: list[list[int]]) -> tuple[int, int, int, int]:
    """L, W and the number of bits of docs/format.md, in whole numbers of any size; and after how many codes a coder of
    64 bits has to hold words back, as it is open yet whether they take a carry."""
    lower, width, bits, held = 0, (1 << 64) - 1, 64, 0
    for code, row in zip(codes, rows, strict=True):
        scale = width >> 24
        lower, width = lower + scale * sum(row[:code]), scale * row[code]
        if width < 1 << 32:
            lower, width, bits = lower << 32, width << 32, bits + 32
        held += lower >> 64 != lower + width - 1 >> 64
    return lower, width, bits, held


@pytest.mark.parametrize("seed", range(60))
def test_payloads_are_the_shortest_number_in_the_interval_carries_included(seed):
    """The codes are those around a number that ends with words of zeros: below it words are all ones, above it they
    take a carry. The last codes turn to one side or the other."""
    generator = np.random.default_rng(seed)
    held = 0
    for _ in range(60):
        n, k = int(generator.integers(1, 40)), int(generator.choice([2, 3, 11]))
        rows = frequencies(generator.dirichlet(np.full(k, generator.choice([0.05, 0.5, 5])), n)).tolist()
        around = plain_zlg.RangeDecoder(generator.bytes(4 * int(generator.integers(1, 3))))
        try:
            codes = [around.decode(row) for row in rows]
        except AssertionError:  # a number between the intervals of the codes
            continue
        last = int(generator.integers(0, min(n, 4)))
        codes[n - last :] = generator.integers(0, k, last).tolist()
        encoder = Encoder()
        encoder.encode(np.array(codes), weights_of(np.array(rows)))
        payload = encoder.finish()
        lower, width, bits, own = whole_interval(codes, rows)
        held += own
        number = int.from_bytes(payload, "big") << bits >> 8 * len(payload)
        assert lower <= number < lower + width
        unit = 2 << bits - bit_length(payload)  # no number in the interval ends with one zero more
        assert number == 0 or -(-lower // unit) * unit >= lower + width
        decoder = plain_zlg.RangeDecoder(payload)
        assert [decoder.decode(row) for row in rows] == codes
    assert held >= 5


@pytest.mark.parametrize("seed", range(200))
def test_any_bytes_are_read_as_by_the_program(seed):
    generator = np.random.default_rng(seed)
    payload = generator.bytes(int(generator.integers(0, 30)))
    counts = frequencies(generator.dirichlet(np.full(5, 0.3), 60))
    ours, plain = Decoder(payload), plain_zlg.RangeDecoder(payload)
    for row in counts:
        try:
            code = int(ours.decode(weights_of(row[None]))[0])
        except DamagedPayloadError:
            with pytest.raises(AssertionError):
                plain.decode(row.tolist())
            return
        assert plain.decode(row.tolist()) == code


# ---- mode prior -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), k=st.integers(2, 300), sharp=st.floats(0.1, 30))
@settings(max_examples=200, deadline=None)
def test_frequencies_of_a_prior_in_whole_numbers(seed, k, sharp):
    logits = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharp
    numerators = plain_exact.numerators(logits.tolist())
    assert plain_zlg.frequencies_of(numerators) == frequencies_of(logits[None, None])[0, 0].tolist()


@pytest.mark.parametrize("name", ["exp", "sigmoid", "silu", "tanh", "elu", "gelu", "gelu_by_tanh"])
def test_functions_of_exact_arithmetic_are_those_of_the_page(name):
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (4 * torch.rand(3000, generator=generator) - 3)
    x = torch.randn(3000, generator=generator, dtype=torch.float64) * sizes
    x = torch.cat([x, torch.tensor([0.0, 1.0, -1.0, 44.0, -44.0, 45.0, -45.0, 1e5, -1e5], dtype=torch.float64)])
    assert getattr(exact, name)(x).tolist() == [getattr(plain_exact, name)(number) for number in x.tolist()]


def rows_of_all_sizes(rows: int, d: int) -> torch.Tensor:
    """From far below the smallest grid to far above 1, powers of two, on which a grid turns, and zeros among them."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64) * 7 + 3
    x *= 10 ** (torch.rand(rows, 1, generator=generator) * 30 - 20)
    x[0], x[1] = 0, 2.0**-41
    x[2] /= x[2].abs().max()
    x[3], x[4], x[4, -1] = x[3].clamp(-4, 4), 0, -0.25
    return x


@pytest.mark.parametrize("d", [1, 2, 7, 24, 1000])
@pytest.mark.parametrize(("name", "epsilon"), [("layer_norm", 1e-5), ("rms_norm", 1e-6), ("unit", None)])
def test_norms_of_exact_arithmetic_are_those_of_the_page(name, epsilon, d):
    x, more = rows_of_all_sizes(30, d), () if epsilon is None else (epsilon,)
    assert getattr(exact, name)(x, *more).tolist() == [getattr(plain_exact, name)(row, *more) for row in x.tolist()]


@pytest.mark.parametrize("d", [1, 2, 7, 24, 1000])
def test_a_softmax_is_that_of_the_page(d):
    x = torch.randn(20, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64) * 7 + 3
    assert exact.softmax(x).tolist() == [plain_exact.softmax(row) for row in x.tolist()]


@pytest.mark.parametrize("d", [1, 2, 7, 24, 1000])
def test_grids_are_those_of_the_page(d):
    x = rows_of_all_sizes(30, d)
    for bits in (8, 20):
        assert exact.on_grid(x, bits).tolist() == [plain_exact.on_grid(row, bits) for row in x.tolist()]
    units, scales = exact.in_units(x)
    assert [*zip(units.tolist(), scales.tolist(), strict=True)] == [plain_exact.in_units(row) for row in x.tolist()]
    parts = exact.in_two(x).double().chunk(2)
    assert [*zip(*(part.tolist() for part in parts), strict=True)] == [plain_exact.in_two(row) for row in x.tolist()]


@pytest.mark.parametrize("d", [1, 24, 4096, 4097, 10_000])
def test_linear_layers_are_those_of_the_page(d):
    """Of more than 4096 numbers too, which are added up in blocks."""
    x, weight = rows_of_all_sizes(6, d), rows_of_all_sizes(5, d + 1)[:, 1:]
    assert Product(weight)(x).tolist() == [plain_exact.product(weight.tolist(), row) for row in x.tolist()]


@pytest.mark.parametrize(("width", "places"), [(1, 1), (3, 40), (300, 5), (4, 600)])
def test_attention_is_that_of_the_page(width, places):
    """Over more than 256 places, and of heads of more than 256 numbers, in blocks too."""
    generator = torch.Generator().manual_seed(width)
    keys, values, queries = torch.randn(3, places, width, generator=generator, dtype=torch.float64) * 3
    values[places // 2] *= 1e-15
    queries = queries[-4:] / width**0.5
    hidden = torch.rand(len(queries), places, generator=generator) < 0.3
    hidden[:, 0] = False
    attention, cache = Attention(1, places, width, torch.device("cpu")), plain_exact.Cache()
    attention.add(keys[None], values[None])
    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        cache.add(key, value)
    assert attention(queries[None])[0].tolist() == [cache.answer(query) for query in queries.tolist()]
    seen = [cache.answer(query, unseen) for query, unseen in zip(queries.tolist(), hidden.tolist(), strict=True)]
    assert attention(queries[None], hidden)[0].tolist() == seen


def test_the_check_numbers_of_the_page():
    numbers = [[(64 * i + j) * 0.7071067811865476 for j in range(64)] for i in range(64)]
    weights = [[plain_exact.exp(n * 0.01 - 10) / math.sqrt(n + 1.1) - 0.3 for n in row] for row in numbers]
    found = [plain_exact.product(weights, [n - 1e3 for n in numbers[i]])[j] for i, j in ((0, 63), (31, 17), (63, 5))]
    assert found == CHECK
    assert all(f" {number}" in PAGE_OF_THE_FORMAT.read_text() for number in CHECK)


SHARED_KEYS = TransformerConfig(layers=1, width=48, heads=4, key_value_heads=2)


@pytest.mark.parametrize("config", [TINY["transformer"], SHARED_KEYS])
@pytest.mark.parametrize("label", [2, None])
def test_codes_by_a_transformer_are_decoded_in_plain_python(config, label, tmp_path: Path):
    prior = tiny_prior("transformer", config=config)
    save_tensors(prior.state_dict(), tmp_path / "model.safetensors")
    codes, shape = random_codes(1, prior), shape_of(prior.code_spec)
    (payload,) = encode_with_prior(prior, codes, [label])
    entry = Entry(Mode.prior, shape, crc_of(shape, codes), payload, label)
    _, (image,) = plain_zlg.read_file(write_archive(Archive((entry,), b"stage-1!", b"a prior!")))
    assert decoded_in_plain_python(image, tmp_path / "model.safetensors", config) == numbers(codes)


def test_a_file_that_must_decode_for_ever_is_decoded_in_plain_python():
    codec, tables = Codec.from_pretrained(KEPT / "model"), (KEPT / "model" / TABLES_NAME).read_bytes()
    needs, (one, other) = plain_zlg.read_file((KEPT / "prior.zlg").read_bytes())  # the other is of a size for tables
    assert needs == {"autoencoder": codec.stage1, "prior": codec.prior_fingerprint, "tables": codec.tables_fingerprint}
    decoded_in_plain_python(one, KEPT / "model" / "stage2" / "model.safetensors", SMALL["transformer"])
    codes = plain_zlg.decode_with_tables(
        other, plain_zlg.read_tables(tables), [codec.autoencoder.code_spec().grids[0].name]
    )
    plain_zlg.check_codes(other, list(codes))


def decoded_in_plain_python(image: plain_zlg.Image, path: Path, config: TransformerConfig) -> list[int]:
    """The codes, which are held against their CRC-32. path: of the prior's weights."""
    weights, ((h, w, _),) = plain_exact.read_weights(path.read_bytes()), image.grids
    told = -1 if image.label is None else image.label
    transformer = plain_exact.PlainTransformer(weights, config.layers, config.heads, config.shared_heads, (h, w), told)

    def frequencies_after(known: list[int], _: int | None) -> list[int]:
        logits = transformer.next(known[-1] if known else None)
        return plain_zlg.frequencies_of(plain_exact.numerators(logits))

    codes = plain_zlg.decode_with_prior(image, frequencies_after)
    plain_zlg.check_codes(image, codes)
    return codes
