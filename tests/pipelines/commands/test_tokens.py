"""compress and reconstruct with the first tokens of a model whose tokens are nested; what such files say, and what
other models say to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from pipelines.codec.archive import Mode, read_archive
from pipelines.codec.codec import Codec
from pipelines.codec.tables import fit_tables
from pipelines.commands.compress import CompressConfig, compress_files
from pipelines.commands.decompress import DecompressConfig, decompress_files
from pipelines.commands.info import InfoConfig, describe_file
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from pipelines.pictures import to_pil
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import TiTok, TiTokConfig
from stage1_vq.quantizers import FSQConfig, QuantizerConfig, ResidualQuantizerConfig
from stage2_prior.priors import MinGPT, MinGPTConfig, PixelCNN, PixelCNNConfig, Transformer, TransformerConfig
from tests.pipelines.conftest import make_pipeline
from tests.stage1_vq.tiny import TINY_NEAREST

TOKENS = 6


def make_titok(quantizer: QuantizerConfig | None = None) -> TiTok:
    """Untrained, of 16x16 grey images."""
    torch.manual_seed(0)
    sizes = {f"{half}_{size}": 1 for half in ("encoder", "decoder") for size in ("blocks", "heads")}
    config = TiTokConfig(
        channels=1,
        patch=4,
        tokens=TOKENS,
        nested="uniform",
        encoder_width=16,
        decoder_width=16,
        quantizer=quantizer or FSQConfig(levels=(5, 4), dim=2),
        **sizes,
    )
    return TiTok(config, (16, 16)).eval()


def pictures(count: int, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def make_model(prior: str = "transformer") -> TwoStagePipeline:
    titok = make_titok()
    torch.manual_seed(1)
    if prior == "pixelcnn":
        made = PixelCNN(PixelCNNConfig(layers=2, width=8), titok.code_spec(), 2)
    else:
        made = Transformer(TransformerConfig(layers=1, width=16, heads=2), titok.code_spec(), 2)
    pipeline = TwoStagePipeline(titok, made.eval())
    pipeline.tables = fit_tables(titok.code_spec(), [titok.encode(pictures(40))])
    return pipeline


def decoded(titok: TiTok, images: torch.Tensor, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return titok.decode(tuple(grid[..., :tokens] for grid in titok.encode(images)))


@pytest.mark.parametrize("mode", ["prior", "table", "packed"])
@pytest.mark.parametrize("prior", ["transformer", "pixelcnn"])
def test_a_file_holds_the_first_tokens_and_decodes_to_what_they_tell(prior, mode):
    pipeline, images = make_model(prior), pictures(5)
    codec, lengths = pipeline.codec(), []
    for tokens in (1, 3, TOKENS):
        data, notes = codec.compress(images, mode, tokens=tokens)
        assert notes == ()
        archive = read_archive(data)
        assert {entry.mode for entry in archive.entries} == {Mode[mode]}
        assert {entry.shape.grids for entry in archive.entries} == {((1, tokens, 20),)}
        assert torch.equal(torch.stack(codec.decompress(data)), decoded(pipeline.autoencoder, images, tokens))
        lengths.append(len(data))
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 3
    assert data == codec.compress(images, mode).data  # all of them are the file that there has always been


def test_the_first_codes_cost_what_the_prior_finds_them_worth():
    """The payload of a beginning is that of a coder which is told those codes alone."""
    codec, images = make_model().codec(), pictures(40)
    bits = [sum(e.bits for e in read_archive(codec.compress(images, "prior", tokens=n).data).entries) for n in (2, 5)]
    codes = codec.autoencoder.encode(images)
    prior = codec.prior
    with torch.no_grad():
        nll = prior.nll(codes, prior.condition_of(torch.full((40,), -1))).flatten(1)  # nats, b n
    for found, count in zip(bits, (2, 5), strict=True):
        expected = float(nll[:, :count].sum()) / np.log(2)
        assert abs(found - expected) < 40 * 2  # where a coder ends: zeros at the end are not counted


def test_images_of_other_numbers_of_tokens_are_decoded_together():
    pipeline, images = make_model(), pictures(6)
    codec = pipeline.codec()
    entries = [
        entry
        for number, tokens in enumerate((2, 6, 1, 2, 5, None))
        for entry in codec.entries([images[number]], "prior", [None], tokens)[0]
    ]
    restored = codec.decompress(codec.archive(entries))
    for number, tokens in enumerate((2, 6, 1, 2, 5, 6)):
        expected = decoded(pipeline.autoencoder, images[number : number + 1], tokens)[0]
        torch.testing.assert_close(restored[number], expected, rtol=0, atol=1e-6)


def test_rows_of_a_residual_quantizer_are_all_cut_and_a_prior_is_not_asked():
    titok = make_titok(ResidualQuantizerConfig(depth=2, layer=TINY_NEAREST))
    torch.manual_seed(1)
    prior = Transformer(TransformerConfig(layers=1, width=16, heads=2), titok.code_spec(), 0).eval()
    codec, images = Codec(titok, prior), pictures(3)
    data, notes = codec.compress(images, "prior", tokens=2)
    assert notes == (
        "3 images are in mode packed: the prior walks one row of tokens after the other, and cannot stop in each",
    )
    assert torch.equal(torch.stack(codec.decompress(data)), decoded(titok, images, 2))


def test_a_prior_with_another_order_is_not_asked_for_the_first_tokens():
    """Its first codes are not the first tokens: a file of them would not decode."""
    titok = make_titok()
    torch.manual_seed(1)
    config = MinGPTConfig(layers=1, width=16, heads=2, order=tuple(reversed(range(TOKENS))))
    codec, images = Codec(titok, MinGPT(config, titok.code_spec(), 0).eval()), pictures(3)
    data, notes = codec.compress(images, "prior", tokens=2)
    assert notes == (
        "3 images are in mode packed: the prior walks the tokens in an order of its own, and not the first ones first",
    )
    assert torch.equal(torch.stack(codec.decompress(data)), decoded(titok, images, 2))
    data, notes = codec.compress(images, "prior", tokens=TOKENS)
    assert notes == ()
    assert torch.equal(torch.stack(codec.decompress(data)), decoded(titok, images, TOKENS))


def test_files_of_more_tokens_than_a_model_has_and_of_a_model_without_are_refused():
    codec = make_model().codec()
    data = codec.compress(pictures(1), "packed", tokens=3).data
    plain = Codec(TiTok(replace(codec.autoencoder.config, nested=None), (16, 16)))
    archive = read_archive(data)
    with pytest.raises(UserError, match="was edited: a 16x16 image of this model has other grids of codes"):
        plain.decode(archive.entries, archive, 10**6, ["file"])
    longer = archive.entries[0].shape._replace(grids=((1, 7, 20),))
    with pytest.raises(UserError, match="was edited: a 16x16 image of this model has other grids of codes"):
        codec.decode([archive.entries[0]._replace(shape=longer)], archive, 10**6, ["file"])


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of the model's size and one of another."""
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pictures(3)):
        to_pil(image).save(tmp_path / "images" / f"{number}.png")
    to_pil(pictures(1, 20)[0]).save(tmp_path / "images" / "wide.png")
    return tmp_path / "images"


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    return make_model().save_pretrained(tmp_path / "model")


def test_compress_writes_so_many_tokens_and_decompress_finds_them(nested: Path, folder: Path, tmp_path: Path):
    sizes = {}
    for tokens in (1, 4, None):
        out = tmp_path / f"zlg{tokens}"
        config = CompressConfig(model=str(nested), images=str(folder), out=str(out), tokens=tokens, crop=True)
        line = compress_files(config)
        assert line.startswith("4 images compressed to")
        assert compress_files(config).endswith("4 were there already")
        sizes[tokens] = sum(path.stat().st_size for path in out.glob("*.zlg"))
        back = tmp_path / f"png{tokens}"
        decompress_files(DecompressConfig(model=str(nested), files=str(out), out=str(back)))
        original = torch.from_numpy(np.asarray(Image.open(folder / "1.png")).copy())[None, None] / 127.5 - 1
        with Image.open(back / "1.png") as written:
            expected = to_pil(decoded(make_titok(), original, tokens or TOKENS)[0])
            assert abs(np.asarray(written).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert sizes[1] < sizes[4] < sizes[None]
    said = describe_file(InfoConfig(file=str(tmp_path / "zlg4" / "1.zlg")))
    assert "1x4" in said


def test_a_folder_that_was_begun_with_other_tokens_is_left_alone(nested: Path, folder: Path, tmp_path: Path):
    config = CompressConfig(model=str(nested), images=str(folder), out=str(tmp_path / "zlg"), tokens=2, crop=True)
    compress_files(config)
    with pytest.raises(UserError, match="tokens"):
        compress_files(replace(config, tokens=3))


def test_images_of_other_sizes_want_crop(nested: Path, folder: Path, tmp_path: Path):
    config = CompressConfig(model=str(nested), images=str(folder), out=str(tmp_path / "zlg"))
    with pytest.raises(UserError, match=r"20x20 images, expected 16x16: .* by compress with --crop"):
        compress_files(config)


@pytest.mark.parametrize("tokens", [0, 7])
def test_a_number_of_tokens_that_there_is_not_is_refused_before_anything_is_written(nested, folder, tmp_path, tokens):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=f"{tokens} tokens, expected 1 to 6"):
        compress_files(CompressConfig(model=str(nested), images=str(folder), out=str(out), tokens=tokens))
    with pytest.raises(UserError, match=f"{tokens} tokens, expected 1 to 6"):
        reconstruct_files(ReconstructConfig(model=str(nested), images=str(folder), out=str(out), tokens=tokens))
    assert not out.exists()


def test_a_model_without_nested_tokens_says_so(folder: Path, tmp_path: Path):
    model = make_pipeline().save_pretrained(tmp_path / "other")
    for run, config in ((compress_files, CompressConfig), (reconstruct_files, ReconstructConfig)):
        with pytest.raises(UserError, match="3 tokens, but the codes of a vqvae model are all of use"):
            run(config(model=str(model), images=str(folder), out=str(tmp_path / "out"), tokens=3))


def test_reconstruct_shows_what_the_first_tokens_tell(nested: Path, folder: Path, tmp_path: Path):
    psnr = {}
    for tokens in (2, None):
        out = tmp_path / f"out{tokens}"
        reconstruct_files(ReconstructConfig(model=str(nested), images=str(folder), out=str(out), tokens=tokens))
        psnr[tokens] = json.loads((out / "psnr.json").read_text())["psnr"]
        assert Image.open(out / "wide.png").size == (32, 16)  # the original, cut to what the model sees, beside it
    assert psnr[2] != psnr[None]
    again = ReconstructConfig(model=str(nested), images=str(folder), out=str(tmp_path / "out2"), tokens=3)
    with pytest.raises(UserError, match="tokens"):
        reconstruct_files(again)


def test_holes_are_not_filled_where_codes_have_no_places():
    pipeline = make_model()
    with pytest.raises(UserError, match="a titok model has no codes of places, so none to keep outside a hole"):
        pipeline.inpaint(pictures(1), torch.ones(16, 16, dtype=torch.bool))
