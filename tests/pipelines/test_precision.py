"""Half precision and TF32 for what is drawn and decoded: what it changes, what it never touches, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common import computing
from common.computing import as_before, check_device, computing_in, tf32_backends, with_precisions
from common.errors import UserError
from common.float32 import full_precision
from pipelines.any_size import decoded
from pipelines.cli import main
from pipelines.latents.pipeline import LatentPipeline
from pipelines.two_stage import TwoStagePipeline
from stage1_vae.decoders import PixelCNNDecoderConfig
from stage1_vae.hierarchies.markov import MarkovConfig, MarkovHierarchy
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.vae import VAE, VAEConfig
from stage2_prior import sampling as sampling_module
from stage2_prior.drawing import draw
from stage2_prior.sampling import sample_codes
from stage2_prior.sampling_config import SamplingConfig
from tests.pipelines.conftest import make_pipeline, some_images
from tests.pipelines.latents.test_judging import small_vae
from tests.stage1_vq.tiny import AUTOENCODER_ROWS
from tests.stage1_vq.tiny import make_autoencoder as autoencoder_of
from tests.stage2_prior.tiny import TINY, condition_for, tiny_prior

CPU = torch.device("cpu")
HALVES = ("bf16", "fp16")


@pytest.mark.parametrize("kind", sorted(TINY))
def test_every_prior_draws_in_half_precision_from_logits_in_float32(kind: str, monkeypatch):
    prior, seen = tiny_prior(kind), []
    before = {name: weight.clone() for name, weight in prior.state_dict().items()}

    def look(logits, uniforms, sampling):
        seen.append((logits.dtype, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))
        return draw(logits, uniforms, sampling)

    monkeypatch.setattr(sampling_module, "draw", look)
    for precision, half in zip(HALVES, (torch.bfloat16, torch.float16), strict=True):
        seen.clear()
        codes = sample_codes(prior, range(2), condition_for(2, prior), 0, SamplingConfig(precision=precision))
        prior.code_spec.check(codes)
        assert {dtype for dtype, _, _ in seen} == {torch.float32}
        assert {used for _, used, enabled in seen if enabled} == {half}
    assert all(torch.equal(weight, before[name]) for name, weight in prior.state_dict().items())


ONE_OF_EACH_KIND = list({config.kind: row for row, config in AUTOENCODER_ROWS.items()}.values())


@pytest.mark.parametrize("row", ONE_OF_EACH_KIND)
def test_every_decoder_decodes_in_half_precision_and_encoders_do_not(row):
    autoencoder = autoencoder_of(row).eval()
    spec = autoencoder.code_spec()
    codes = tuple(torch.randint(grid.vocabulary, (2, grid.height, grid.width)) for grid in spec.grids)
    whole = decoded(autoencoder, codes)
    half = decoded(autoencoder, codes, "bf16")  # float16 convolves slowly on a CPU
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().max() < 0.1
    assert not torch.is_autocast_enabled("cpu")


def test_one_setting_is_of_prior_and_decoder_unless_the_decoder_has_its_own():
    pipeline = make_pipeline()
    fingerprint, codes_of_images = pipeline.fingerprint(), pipeline.encode(some_images())
    both = pipeline.generate(5, precision="bf16")
    assert torch.equal(both.images, pipeline.decode(both.codes, precision="bf16"))
    alone = pipeline.generate(5, precision="bf16", decoder_precision="no")
    assert torch.equal(alone.codes[0], both.codes[0])
    assert torch.equal(alone.images, pipeline.decode(both.codes))
    assert not torch.equal(alone.images, both.images)
    decoder = pipeline.generate(5, decoder_precision="fp16")
    assert torch.equal(decoder.codes[0], pipeline.generate(5).codes[0])
    assert torch.equal(decoder.images, pipeline.decode(decoder.codes, precision="fp16"))
    drawn = pipeline.redraw((torch.full((2, 4, 4), -1),), labels=1, precision="bf16")
    assert torch.equal(drawn.images, pipeline.decode(drawn.codes, precision="bf16"))
    # Weights, fingerprint and the codes of images are those of float32.
    assert pipeline.dtype == torch.float32
    assert pipeline.fingerprint() == fingerprint
    kept = pipeline.reconstruct(some_images(), precision="bf16")
    assert torch.equal(kept, pipeline.decode(codes_of_images, precision="bf16"))
    assert torch.equal(pipeline.encode(some_images())[0], codes_of_images[0])


def test_a_cast_model_is_another_one_and_computes_in_half_precision_too():
    pipeline = make_pipeline()
    fingerprint = pipeline.fingerprint()
    cast = make_pipeline().to(torch.bfloat16)
    assert cast.fingerprint() != fingerprint
    assert cast.generate(2, precision="bf16").images.dtype == torch.float32


def test_what_no_device_or_pytorch_has_is_refused(monkeypatch):
    for precision, said in (("tf32", "expected an NVIDIA GPU of the Ampere"), ("fp8", "expected bf16, fp16 or tf32")):
        with pytest.raises(UserError, match=said):
            make_pipeline().stream(2, precision=precision)
    with pytest.raises(UserError, match="decoder_precision=fp8, expected no, bf16, fp16 or tf32"):
        SamplingConfig(decoder_precision="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="tf32 on cuda, expected"):
        check_device(torch.device("cuda"), "tf32")
    with pytest.raises(UserError, match="bf16 does not work on meta with this PyTorch; use fp16, or leave it out"):
        check_device(torch.device("meta"), "bf16")  # as MPS of an older macOS, of which PyTorch only warns
    with (
        pytest.raises(UserError, match=r"lacks an operation there that this model needs .*; use bf16"),
        computing_in("fp16", CPU),
    ):
        raise RuntimeError("\"some_kernel\" not implemented for 'Half'")
    with pytest.raises(RuntimeError, match="something else"), computing_in("fp16", CPU):
        raise RuntimeError("something else")


def test_half_of_weights_in_the_other_half_is_refused():
    prior = tiny_prior("maskgit").half()
    with pytest.raises(UserError, match=r"precision=bf16 of a model whose weights are torch\.float16: .*; use fp16"):
        sample_codes(prior, [0, 1], condition_for(2, prior), 0, SamplingConfig(precision="bf16"))


def test_images_beyond_the_range_of_float16_are_refused():
    autoencoder = make_pipeline().autoencoder
    codes = (torch.randint(16, (2, 4, 4)),)
    with torch.no_grad():
        for weight in autoencoder.decoder.parameters():
            weight.mul_(300)
    assert decoded(autoencoder, codes, "bf16").isfinite().all()
    with pytest.raises(UserError, match="not finite in float16, whose range its activations exceed; take bf16"):
        decoded(autoencoder, codes, "fp16")


def test_tf32_is_for_what_is_made_and_gone_afterwards(monkeypatch):
    monkeypatch.setattr(computing, "check_there", lambda device, precision: None)
    before = [backend.fp32_precision for backend in tf32_backends()]
    found = []
    encode = as_before(lambda: found.append([backend.fp32_precision for backend in tf32_backends()]), CPU)
    with computing_in("tf32", CPU):
        assert [backend.fp32_precision for backend in tf32_backends()] == ["tf32", "tf32"]
        with full_precision():  # a quantizer
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        encode()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert found == [before]
    assert [backend.fp32_precision for backend in tf32_backends()] == before
    with pytest.raises(ZeroDivisionError), with_precisions(["tf32", "ieee"]):
        _ = 1 / 0
    assert [backend.fp32_precision for backend in tf32_backends()] == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_encodes_an_image_within_a_draw_is_as_outside():
    seen = []
    known = (torch.full((1, 1, 2), 3), torch.full((1, 2, 3), -1))
    prior = tiny_prior("maskgit")
    known[1][0, 0, 0] = 2

    def complete(beginning):
        seen.append(torch.is_autocast_enabled("cpu"))
        return (*beginning, *(torch.zeros_like(grid) for grid in known[len(beginning) :]))

    sampling = SamplingConfig(precision="bf16")
    sample_codes(prior, range(1), condition_for(1, prior), 0, sampling, known, complete=complete)
    assert seen == [False]


def test_networks_of_a_vae_compute_in_half_precision_and_latents_stay():
    flat = LatentPipeline(small_vae())
    torch.manual_seed(0)
    config = MarkovConfig(latents=(3, 2), hidden=(8, 8), hidden_layers=1)
    for pipeline in (flat, LatentPipeline(MarkovHierarchy(config, (6, 4)).eval())):
        whole = pipeline.generate(4)
        for precision in HALVES:
            half = pipeline.generate(4, precision=precision)
            assert (half.images.dtype, half.latents.dtype) == (torch.float32, torch.float32)
            assert 0 < (half.images - whole.images).abs().max() < 0.05
            if pipeline is flat:
                assert torch.equal(half.latents, whole.latents)
                shown = flat.generate(4, precision=precision, pixels="sample").images
                assert set(shown.unique().tolist()) <= {-1.0, 1.0}
    kept = flat.reconstruct(torch.zeros(2, 1, 6, 4), precision="bf16")
    assert torch.equal(kept, flat.decode(flat.encode(torch.zeros(2, 1, 6, 4)), precision="bf16"))


def generate(model: Path, out: Path, *options: str) -> int:
    return main(["generate", "--model", str(model), "--out", str(out), "--num", "3", "--device", "cpu", *options])


def test_a_folder_is_of_one_precision_and_earlier_ones_go_on(model: Path, tmp_path: Path, capsys):
    plain, half = tmp_path / "plain", tmp_path / "half"
    assert generate(model, plain) == 0
    assert generate(model, plain, "--precision", "no") == 0
    assert generate(model, plain, "--precision", "bf16") == 2
    assert "precision was None and is now 'bf16'" in capsys.readouterr().err
    assert generate(model, half, "--precision", "bf16") == 0
    assert generate(model, half, "--precision", "bf16", "--decoder_precision", "no") == 2
    # An earlier build drew in bf16 what it decoded in float32, and recorded the one word.
    record = json.loads((half / "settings.json").read_text())
    assert record.pop("decoder_precision", 0) is None
    (half / "settings.json").write_text(json.dumps(record))
    (half / "000002.png").unlink()
    assert generate(model, half, "--precision", "bf16") == 0
    assert json.loads((half / "settings.json").read_text())["decoder_precision"] == "no"
    pipeline = TwoStagePipeline.from_pretrained(model)
    assert pipeline.sampling.decoding is None
    assert generate(model, half, "--precision", "bf16", "--decoder_precision", "bf16") == 2
    assert generate(model, tmp_path / "gpu", "--precision", "tf32") == 2
    assert "precision=tf32 on cpu, expected an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


def test_a_model_that_records_one_word_of_an_earlier_build_decodes_in_float32(tmp_path: Path):
    pipeline = make_pipeline()
    pipeline.sampling = SamplingConfig(precision="bf16")
    folder = pipeline.save_pretrained(tmp_path / "model")
    assert TwoStagePipeline.from_pretrained(folder).sampling.decoding == "bf16"
    index = json.loads((folder / "model_index.json").read_text())
    del index["sampling"]["decoder_precision"], index["sha256"]
    (folder / "model_index.json").write_text(json.dumps(index))
    again = TwoStagePipeline.from_pretrained(folder).sampling
    assert (again.precision, again.decoding) == ("bf16", None)


def test_reconstructions_and_images_of_a_vae_record_it_too(model: Path, pictures: Path, tmp_path: Path, capsys):
    vae = small_vae().save_pretrained(tmp_path / "vae")
    asked = ["--images", str(pictures), "--device", "cpu"]
    for name, source in (("codes", model), ("latents", vae)):
        out = tmp_path / name
        command = ["reconstruct", "--model", str(source), "--out", str(out), *asked]
        assert main(command) == 0
        record = json.loads((out / "settings.json").read_text())
        assert record.pop("precision", 0) is None
        (out / "settings.json").write_text(json.dumps(record))  # of an earlier build
        assert main(command) == 0
        assert main([*command, "--precision", "bf16"]) == 2
        assert "precision was None and is now 'bf16'" in capsys.readouterr().err
    out = tmp_path / "made"
    assert generate(vae, out, "--precision", "bf16") == 0
    assert generate(vae, out, "--precision", "bf16") == 0
    assert generate(vae, out) == 2
    assert "precision was 'bf16' and is now None" in capsys.readouterr().err


def test_a_vae_that_tells_pixels_in_turn_is_not_rounded():
    config = VAEConfig(
        latents=2, encoder=DenseConfig(hidden=(8,)), decoder=PixelCNNDecoderConfig(network=DenseConfig(hidden=()))
    )
    with pytest.raises(UserError, match="precision=bf16 for a VAE with a decoder pixelcnn, expected none"):
        LatentPipeline(VAE(config, (6, 4))).generate(2, precision="bf16")
