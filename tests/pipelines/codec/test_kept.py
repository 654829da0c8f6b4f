"""Files that were written once decode for ever: each mode, and each kind of prior, with the model that made them.

`kept/` was written by `python -m tests.pipelines.codec.test_kept`, which writes only what is missing. What changes the
frequencies of an exact walk, or the bytes of the format, makes every file of its users unreadable: it needs another
number of the arithmetic, or another version of the format, beside the old one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines.codec.prior_coding as prior_coding
from codes.spec import Codes
from common.model_io import load_pretrained
from common.tensor_files import load_tensors, save_tensors
from pipelines import TwoStagePipeline
from pipelines.codec.archive import Archive, Entry, Mode, Shape, crc_of, open_archive, write_archive
from pipelines.codec.bits_back import encode_chain
from pipelines.codec.codec import Codec
from pipelines.codec.dependencies import coding_fingerprint
from pipelines.codec.lossless import LosslessCodec
from pipelines.codec.lossless_archive import open_lossless
from pipelines.codec.tables import fit_tables
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage2_prior.exact import WALKS
from stage2_prior.priors import (
    PRIORS,
    AutoregressivePrior,
    HierarchicalConfig,
    IBQGPTConfig,
    InfinityConfig,
    LlamaGenConfig,
    MinGPTConfig,
    OpenMAGVIT2GPTConfig,
    PixelCNNConfig,
    PixelSNAILConfig,
    RandARConfig,
    RARConfig,
    RQTransformerConfig,
    Transformer,
    TransformerConfig,
    VARConfig,
)
from tests.stage1_vae.exact.tiny import NAMES, random_values, tiny_vae
from tests.stage2_prior.tiny import CLASSES, spec_of

KEPT = Path(__file__).with_name("kept")
LABELS = [1, None, 3]
MODES = ("packed", "table", "prior")
LOSSLESS = NAMES
SMALL = {
    "transformer": TransformerConfig(layers=1, width=16, heads=2),
    "pixelcnn": PixelCNNConfig(layers=2, width=8, first_kernel_size=3, kernel_size=3, output_width=12),
    "pixelsnail": PixelSNAILConfig(
        blocks=1, residual_blocks=1, width=8, residual_width=6, kernel_size=3, heads=2, output_blocks=1
    ),
    "mingpt": MinGPTConfig(layers=1, width=16, heads=2),
    "llamagen": LlamaGenConfig(layers=1, width=16, heads=2, hidden_width=24),
    "rar": RARConfig(layers=1, width=16, heads=2),
    "randar": RandARConfig(layers=1, width=16, heads=2, hidden_width=24),
    "ibq_gpt": IBQGPTConfig(layers=1, width=16, heads=2, hidden_width=24),
    "open_magvit2_gpt": OpenMAGVIT2GPTConfig(layers=1, factor_layers=1, width=16, heads=2, hidden_width=24),
    "rq_transformer": RQTransformerConfig(layers=1, depth_layers=1, width=16, heads=2),
    "var": VARConfig(layers=1, width=16, heads=2),
    "infinity": InfinityConfig(layers=1, width=16, heads=2),
    "hierarchical": HierarchicalConfig(
        top=PixelCNNConfig(layers=2, width=8, first_kernel_size=3, kernel_size=3, output_width=12, given_width=4),
        middle=TransformerConfig(layers=1, width=8, heads=1),
        bottom=TransformerConfig(layers=1, width=8, heads=1),
    ),
}


def frequencies(prior: AutoregressivePrior, codes: Codes) -> str:
    """SHA-256 over all frequencies, as little-endian 64-bit integers, step after step."""
    digest, plain = hashlib.sha256(), prior_coding.frequencies_of

    def recorded(logits):
        counts = plain(logits)
        digest.update(counts.astype("<i8").tobytes())
        return counts

    prior_coding.frequencies_of = recorded
    try:
        prior_coding.encode_with_prior(prior, codes, LABELS)
    finally:
        prior_coding.frequencies_of = plain
    return digest.hexdigest()


def codes_in(path: Path) -> Codes:
    tensors = load_tensors(path)
    return tuple(tensors[name].long() for name in sorted(tensors))


@pytest.mark.parametrize("kind", list(WALKS))
def test_a_file_of_each_kind_of_prior_decodes(kind):
    prior = load_pretrained(KEPT / kind, PRIORS)
    expected = codes_in(KEPT / kind / "codes.safetensors")
    with open_archive(KEPT / kind / "three.zlg") as file:
        assert file.head.prior.hex() == coding_fingerprint(prior)[:16]
        entries = list(file.entries())
    assert [entry.label for entry in entries] == LABELS
    found = prior_coding.decode_with_prior(prior, [entry.payload for entry in entries], LABELS)
    assert all(map(torch.equal, found, expected))
    assert [entry.crc for entry in entries] == [
        crc_of(entries[0].shape, tuple(grid[i : i + 1] for grid in expected)) for i in range(3)
    ]
    payloads = prior_coding.encode_with_prior(prior, expected, LABELS)
    assert payloads == [entry.payload for entry in entries]
    assert frequencies(prior, expected) == json.loads((KEPT / "frequencies.json").read_text())[kind]


@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_each_mode_decodes(mode):
    codec = Codec.from_pretrained(KEPT / "model")
    decoded = codec.decompress(KEPT / f"{mode}.zlg")
    assert [tuple(image.shape) for image in decoded] == [(1, 16, 16), (1, 9, 21)]
    images = load_tensors(KEPT / "images.safetensors")
    for number, image in enumerate(decoded):
        torch.testing.assert_close(image, images[str(number)], rtol=0, atol=1e-4)  # networks round as they do
    assert codec.tables_fingerprint is not None


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_file_of_each_kind_decodes(name):
    codec = LosslessCodec.from_pretrained(KEPT / "lossless" / name)
    pixels = load_tensors(KEPT / "lossless" / name / "images.safetensors")["pixels"]
    with open_lossless(KEPT / "lossless" / name / "images.zlg") as file:
        assert file.model == codec.model
        assert list(file.names()) == [f"{number:02}.png" for number in range(len(pixels))]
        found = dict(codec.images(file, range(file.count)))
        (segment,) = file.segments()
    assert all(np.array_equal(found[number], pixels[number].numpy()) for number in range(len(pixels)))
    assert encode_chain(codec.exact, codec.values_of(pixels.numpy())) == segment.chain


# ---- how they were written -----------------------------------------------------------------------------------------


def write_kind(kind: str) -> None:
    torch.manual_seed(0)
    spec = spec_of(kind)
    prior = PRIORS[kind](SMALL[kind], spec, CLASSES).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    assert isinstance(prior, AutoregressivePrior)
    prior.save_pretrained(KEPT / kind)
    codes = tuple(torch.randint(grid.vocabulary, (3, grid.height, grid.width)) for grid in spec.grids)
    tensors = {f"{number:02}": grid.to(torch.uint8) for number, grid in enumerate(codes)}
    save_tensors(tensors, KEPT / kind / "codes.safetensors")
    shape = Shape(spec.image_height, spec.image_width, tuple((g.height, g.width, g.vocabulary) for g in spec.grids))
    entries = [
        Entry(Mode.prior, shape, crc_of(shape, tuple(grid[i : i + 1] for grid in codes)), payload, label)
        for i, (payload, label) in enumerate(
            zip(prior_coding.encode_with_prior(prior, codes, LABELS), LABELS, strict=True)
        )
    ]
    archive = Archive(tuple(entries), bytes(8), bytes.fromhex(coding_fingerprint(prior))[:8])
    (KEPT / kind / "three.zlg").write_bytes(write_archive(archive))
    path = KEPT / "frequencies.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, kind: frequencies(prior, codes)}, indent=1) + "\n")


def write_modes() -> None:
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4)
    config = VQVAEConfig(channels=1, width=8, residual_width=4, residual_blocks=1, quantizer=quantizer)
    autoencoder = VQVAE(config, (16, 16)).eval()
    prior = Transformer(TransformerConfig(layers=1, width=16, heads=2), autoencoder.code_spec(), 0).eval()
    with torch.no_grad():
        for parameter in [*prior.parameters(), *autoencoder.parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
    pipeline = TwoStagePipeline(autoencoder, prior)
    pipeline.tables = fit_tables(autoencoder.code_spec(), [pipeline.encode(torch.rand(40, 1, 16, 16) * 2 - 1)])
    pipeline.save_pretrained(KEPT / "model")
    images = [torch.rand(1, 16, 16) * 2 - 1, torch.rand(1, 9, 21) * 2 - 1]
    codec = pipeline.codec()
    for mode in MODES:
        (KEPT / f"{mode}.zlg").write_bytes(codec.compress(images, mode).data)
    decoded = codec.decompress(KEPT / "packed.zlg")
    save_tensors({str(number): image for number, image in enumerate(decoded)}, KEPT / "images.safetensors")


def write_lossless_kind(name: str) -> None:
    folder, vae = KEPT / "lossless" / name, tiny_vae(name)
    vae.save_pretrained(folder)
    pixels = random_values(vae, 12) * (255 if vae.config.likelihood.kind == "bernoulli" else 1)
    pixels = pixels.to(torch.uint8)
    save_tensors({"pixels": pixels}, folder / "images.safetensors")
    names = [f"{number:02}.png" for number in range(len(pixels))]
    (folder / "images.zlg").write_bytes(LosslessCodec(vae).compress(pixels.movedim(-1, 1), names))


if __name__ == "__main__":
    KEPT.mkdir(exist_ok=True)
    for missing in [kind for kind in WALKS if not (KEPT / kind).exists()]:
        write_kind(missing)
    if not (KEPT / "model").exists():
        write_modes()
    for missing in [name for name in LOSSLESS if not (KEPT / "lossless" / name).exists()]:
        write_lossless_kind(missing)
