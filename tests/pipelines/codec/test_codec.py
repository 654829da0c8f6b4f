"""`decompress(compress(x))` is `decode(encode(x))`, bit for bit, or a sentence says why not."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.codec_fuzz import hostile, outcome, tiny_codec, valid_files
from common.errors import UserError
from pipelines import TwoStagePipeline
from pipelines.any_size import decoded, encode_any_size
from pipelines.codec.archive import Environment, Mode, Shape, read_archive, write_archive
from pipelines.codec.codec import Codec
from pipelines.codec.dependencies import decoding_fingerprint
from pipelines.codec.tables import fit_tables
from stage1_vq.autoencoders import Autoencoder, VQVAEConfig
from stage2_prior.priors import AutoregressivePrior, MaskGIT, MaskGITConfig
from tests.pipelines.conftest import make_autoencoder, make_pipeline, make_prior
from tests.stage1_vq.tiny import OF_ANY_SIZE, images_for
from tests.stage1_vq.tiny import make_autoencoder as autoencoder_of
from tests.stage2_prior.tiny import TINY, tiny_prior

MODES = ("prior", "table", "packed")
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def photos(count: int, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def with_tables(pipeline: TwoStagePipeline) -> TwoStagePipeline:
    pipeline.tables = fit_tables(pipeline.prior.code_spec, [pipeline.encode(photos(40, seed=9))])
    return pipeline


@pytest.fixture(scope="module")
def codec() -> Codec:
    return with_tables(make_pipeline()).codec()


@EVERY_MODE
@pytest.mark.parametrize("count", [1, 5, 70])
def test_what_comes_back_is_decode_of_encode(codec, mode, count):
    images = photos(count)
    compressed = codec.compress(images, mode)
    assert compressed.notes == ()
    assert {entry.mode.name for entry in read_archive(compressed.data).entries} == {mode}
    batches = [encode_any_size(codec.autoencoder, part) for part in images.split(64)]
    expected = torch.cat([codec.pixels(codes) for codes in batches])
    assert torch.equal(torch.stack(codec.decompress(compressed.data)), expected)


@EVERY_MODE
def test_images_of_any_sizes_in_one_archive(codec, mode):
    images = [*photos(2, 17, 30), *photos(1), *photos(1, 3, 1), *photos(1, 17, 30, seed=2)]
    data, notes = codec.compress(images, mode)
    of_other_sizes = ("4 images are in mode table: the prior knows only codes of 16x16 images",)
    assert notes == (of_other_sizes if mode == "prior" else ())
    decoded = codec.decompress(data)
    for alike in ([0, 1, 4], [2], [3]):  # images of one size are a batch, here and there
        batch = torch.stack([images[i] for i in alike])
        codes = encode_any_size(codec.autoencoder, batch)
        expected = codec.pixels(codes)[..., : batch.shape[2], : batch.shape[3]]
        assert torch.equal(torch.stack([decoded[i] for i in alike]), expected)


@pytest.mark.parametrize("row", OF_ANY_SIZE)
def test_every_autoencoder_packs_and_tables_its_codes(row):
    autoencoder = autoencoder_of(row).eval()
    images = images_for(autoencoder, 2, size=(19, 50))
    codes = encode_any_size(autoencoder, images)
    expected = decoded(autoencoder, codes)[..., :19, :50]
    codec = Codec(autoencoder, None, fit_tables(autoencoder.code_spec(), [codes]))
    for mode in ("table", "packed"):
        assert torch.equal(torch.stack(codec.decompress(codec.compress(images, mode).data)), expected)


class AnyDecoder(Autoencoder):
    """Codes of any prior as they are, so that each kind of prior can be tried without an autoencoder of its own."""

    kind = "any"

    def __init__(self, prior):
        torch.nn.Module.__init__(self)
        self.prior, self.stride, self.spec, self.config = prior, 1, prior.code_spec, VQVAEConfig()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def arguments(self):
        return {}

    def code_spec(self, height=None, width=None):
        return self.spec


@pytest.mark.parametrize("kind", [kind for kind in TINY if isinstance(tiny_prior(kind), AutoregressivePrior)])
def test_every_ordered_prior_codes_its_codes(kind):
    prior = tiny_prior(kind)
    codec = Codec(AnyDecoder(prior), prior)
    spec = prior.code_spec
    codes = tuple(torch.randint(g.vocabulary, (3, g.height, g.width)) for g in spec.grids)
    entries, fallbacks = codec.code(codes, (spec.image_height, spec.image_width), Mode.prior, [1, None, 2])
    assert not fallbacks
    archive = read_archive(codec.archive(entries))
    assert [entry.label for entry in archive.entries] == [1, None, 2]
    read = codec.codes_of(dict(enumerate(archive.entries)), archive, {entries[0].shape: spec}, ["x"] * 3)
    for i in range(3):
        assert all(torch.equal(ours[0], theirs[i]) for ours, theirs in zip(read[i], codes, strict=True))
        assert len(codec.archive(entries[i : i + 1])) - len(entries[i].payload) <= 64


@EVERY_MODE
def test_each_image_of_an_archive_can_be_read_by_itself(codec, mode):
    data = codec.compress(photos(11), mode).data
    together = codec.decompress(data)
    for numbers in ([3], [10, 0], []):
        some = codec.decompress(data, numbers)
        assert len(some) == len(numbers)
        for image, number in zip(some, numbers, strict=True):
            assert (image - together[number]).abs().max() < 1e-5  # a batch of another size may round otherwise


@EVERY_MODE
def test_a_payload_does_not_depend_on_the_other_images(codec, mode):
    images = photos(10)
    payloads = [entry.payload for entry in read_archive(codec.compress(images, mode).data).entries]
    for i in (0, 7, 9):
        others = photos(10, seed=5)
        others[i] = images[i]
        assert read_archive(codec.compress(others, mode).data).entries[i].payload == payloads[i]


def test_the_best_mode_that_there_is_is_chosen():
    pipeline = make_pipeline()
    tables = with_tables(make_pipeline()).tables
    masked = MaskGIT(MaskGITConfig(layers=1, width=16, heads=2), pipeline.prior.code_spec, 0).eval()
    rows = [
        (Codec(pipeline.autoencoder, pipeline.prior, tables), Mode.prior),
        (Codec(pipeline.autoencoder, masked, tables), Mode.table),
        (Codec(pipeline.autoencoder, masked), Mode.packed),
        (Codec(pipeline.autoencoder, None, tables), Mode.table),
        (Codec(pipeline.autoencoder), Mode.packed),
    ]
    for codec, mode in rows:
        data = codec.compress(photos(1)).data
        assert read_archive(data).entries[0].mode == mode
        assert len(codec.decompress(data)) == 1


def test_labels_are_recorded_and_make_the_file(codec):
    data = codec.compress(photos(3), labels=[0, 2, 1]).data
    assert [entry.label for entry in read_archive(data).entries] == [0, 2, 1]
    assert [entry.label for entry in read_archive(codec.compress(photos(2), labels=1).data).entries] == [1, 1]
    entries = read_archive(codec.compress(photos(2), labels=[2, None]).data).entries
    assert [entry.label for entry in entries] == [2, None]
    assert len(codec.decompress(data)) == 3


def test_without_tables_other_sizes_are_packed_and_the_pipeline_warns():
    pipeline = make_pipeline()
    with pytest.warns(UserWarning, match="2 images are in mode packed: the prior knows only codes of 16x16"):
        data = pipeline.compress(photos(2, 20, 16))
    assert torch.equal(torch.stack(pipeline.decompress(data)), pipeline.reconstruct(photos(2, 20, 16)))


def test_a_file_of_version_1_says_on_what_its_probabilities_depend(codec):
    """Codes that have not its checksum are those of a machine that rounds otherwise, or it was edited."""
    archive = read_archive(codec.compress(photos(1), "prior").data)
    elsewhere = Environment("cuda", (2, 9))
    old = archive._replace(version=1, environment=elsewhere, lanes=2)
    with pytest.raises(UserError) as refused:
        codec.decode([archive.entries[0]._replace(crc=5)], old, 256, ["a.zlg"])
    assert str(refused.value) == (
        "a.zlg cannot be decoded here: the codes do not have its checksum; it has version 1 of the format, whose "
        f"probabilities depend on where they are computed: it was written on {elsewhere}, this is {codec.environment}, "
        "and the processor and the number of threads count too, which the file does not tell: decode it where it was "
        "written, with as many threads, and compress the image anew; if that fails, it was edited"
    )


def test_images_do_not_keep_what_was_cut_off_nor_each_other(codec):
    """A 3x1 image that is kept must not keep the batch, nor the 4x4 pixels that it was decoded as."""
    data = codec.compress([*photos(2, 3, 1), *photos(1)], "packed").data
    for image in codec.decompress(data):
        assert image.untyped_storage().nbytes() == image.numel() * image.element_size()


def edited(codec: Codec, mode: str, **changes) -> bytes:
    archive = read_archive(codec.compress(photos(1), mode).data)
    return write_archive(archive._replace(entries=(archive.entries[0]._replace(**changes),)))


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("table", {"crc": 5}, "the file was edited: its codes do not have the checksum that it names; compress"),
        ("packed", {"crc": 5}, "the file was edited: its codes do not have the checksum that it names"),
        ("prior", {"crc": 5}, "the file was edited: its codes do not have the checksum that it names"),
        ("prior", {"label": 3}, "label 3 is out of range: this model knows the 3 classes 0 to 2"),
        ("table", {"payload": b"\xff" * 99}, "the file was edited: "),
        ("prior", {"payload": b"\xff" * 99}, "the file was edited: "),
        ("table", {"shape": Shape(15, 16, ((4, 4, 16),))}, "its codes do not have the checksum that it names"),
        ("table", {"shape": Shape(12, 16, ((4, 4, 16),))}, "a 12x16 image of this model has other grids of codes"),
        ("table", {"shape": Shape(16, 16, ((4, 4, 17),))}, "a 16x16 image of this model has other grids of codes"),
        ("prior", {"shape": Shape(12, 16, ((3, 4, 16),))}, "the file was edited: its prior makes no such codes"),
        ("table", {"shape": Shape(40000, 25000, ((4, 4, 16),))},
         "claims 1000000000 pixels, padded to the stride, expected at most 67108864 at once; raise max_pixels if"),
    ],
)  # fmt: skip
def test_edited_files_are_refused(codec, mode, changes, message):
    with pytest.raises(UserError) as refused:
        codec.decompress(edited(codec, mode, **changes))
    assert message in str(refused.value)


def test_the_limit_on_pixels_is_of_what_is_asked_for(codec):
    data = codec.compress(photos(4), "packed").data
    assert len(codec.decompress(data, max_pixels=4 * 256)) == 4
    assert len(codec.decompress(data, [1, 2], max_pixels=2 * 256)) == 2
    with pytest.raises(UserError, match=r"claims 1024 pixels, .* at most 1023 at once; ask for fewer of its images"):
        codec.decompress(data, max_pixels=1023)
    # Of what is decoded: 64x1 pixels are padded to 64x4.
    narrow = codec.compress(photos(1, 64, 1), "packed").data
    assert len(codec.decompress(narrow, max_pixels=256)) == 1
    with pytest.raises(UserError, match="claims 256 pixels, padded to the stride, expected at most 255 at once; raise"):
        codec.decompress(narrow, max_pixels=255)


def test_files_of_another_model_are_refused(codec):
    other = make_autoencoder(codebook_size=12)
    data = codec.compress(photos(1), "packed").data
    with pytest.raises(UserError) as refused:
        Codec(other).decompress(data)
    ours, theirs = codec.stage1.hex(), decoding_fingerprint(other)[:16]
    assert str(refused.value) == (
        f"the file needs the autoencoder {ours}, this model has {theirs}; name the model that it was compressed with"
    )
    alone = Codec(codec.autoencoder)
    assert len(alone.decompress(data)) == 1
    for mode, what in (("prior", "prior"), ("table", "tables")):
        with pytest.raises(
            UserError, match=rf"the file needs the {what} [0-9a-f]{{16}}, this model has none; name the"
        ):
            alone.decompress(codec.compress(photos(1), mode).data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "zip"}, "mode='zip', expected one of prior, table and packed"),
        ({"labels": [0]}, "got 1 label for 2 images, expected one for each"),
        ({"labels": [0, 3]}, "label 3 is out of range: this model knows the 3 classes 0 to 2; choose one of them"),
    ],
)
def test_impossible_requests_are_refused(codec, arguments, message):
    with pytest.raises(UserError) as refused:
        codec.compress(photos(2), **arguments)
    assert str(refused.value) == message


def test_modes_that_a_model_does_not_have_are_refused(codec):
    alone = Codec(codec.autoencoder)
    with pytest.raises(
        UserError, match="mode=table, but this model has no tables; make them by `zellige tables --model"
    ):
        alone.compress(photos(1), "table")
    with pytest.raises(UserError, match="mode=prior, but this model has no prior; choose table or packed"):
        alone.compress(photos(1), "prior")
    masked = MaskGIT(MaskGITConfig(layers=1, width=16, heads=2), codec.autoencoder.code_spec(), 0)
    with pytest.raises(
        UserError, match=r"mode=prior, but a maskgit prior fills in codes in no fixed order.*; choose table"
    ):
        Codec(codec.autoencoder, masked).compress(photos(1), "prior")


def test_an_image_that_is_not_there_is_told(codec):
    data = codec.compress(photos(2), "packed").data
    with pytest.raises(UserError, match="the file has no image 2, expected 0 to 1"):
        codec.decompress(data, [2])


def test_of_a_file_only_what_is_asked_for_is_read(codec, tmp_path: Path):
    data = codec.compress(photos(6), "packed").data
    damaged = bytearray(data)
    damaged[-5] ^= 1  # in the payload of the last image
    (tmp_path / "a.zlg").write_bytes(damaged)
    sound = codec.decompress(data)
    assert torch.allclose(codec.decompress(tmp_path / "a.zlg", [2])[0], sound[2], atol=1e-5)
    for images in (None, [5]):
        with pytest.raises(UserError, match=r"a\.zlg (is damaged or cut short|was edited)"):
            codec.decompress(tmp_path / "a.zlg", images)


def test_a_saved_pipeline_keeps_its_tables(tmp_path: Path):
    pipeline = with_tables(make_pipeline())
    folder = pipeline.save_pretrained(tmp_path / "model")
    loaded = TwoStagePipeline.from_pretrained(folder)
    for mode in MODES:
        data = pipeline.compress(photos(2), mode=mode)
        assert loaded.compress(photos(2), mode=mode) == data
        ours = [
            pipeline.decompress(data, [1]),
            loaded.decompress(data, [1]),
            Codec.from_pretrained(folder).decompress(data, [1]),
        ]
        assert all(torch.equal(one[0], ours[0][0]) for one in ours)


def test_tables_of_other_codes_are_refused():
    other = make_autoencoder(codebook_size=12)
    pipeline = with_tables(make_pipeline())
    with pytest.raises(UserError, match="the tables are of grids codes of 16 codes, expected codes of 12 codes"):
        TwoStagePipeline(other, make_prior(other), tables=pipeline.tables)
    with pytest.raises(UserError, match="the tables are of grids codes of 16 codes, expected codes of 12 codes"):
        Codec(other, None, pipeline.tables)


# ---- hostile files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files():
    codec = tiny_codec()
    return codec, valid_files(codec)


def test_damaged_files_end_in_an_error_or_in_the_right_images(files):
    codec, valid = files
    generator = np.random.default_rng(0)
    outcomes = set()
    for number in range(2000):
        data, expected = valid[number % len(valid)]
        outcomes.add(outcome(codec, hostile(data, generator), expected))
    assert len(outcomes) > 8  # it reaches many different checks
    assert "right images" in outcomes


@given(data=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_behind_the_magic_end_in_an_error(files, data):
    codec, _ = files
    sealed = b"\x89ZLG\x01" + data
    sealed += zlib.crc32(sealed).to_bytes(4, "little")
    with pytest.raises(UserError):
        codec.decompress(sealed)


def test_a_wrong_image_would_be_noticed(files):
    codec, valid = files
    data, expected = valid[0]
    with pytest.raises(AssertionError, match="wrong images"):
        outcome(codec, data, [image + 0.1 for image in expected])
