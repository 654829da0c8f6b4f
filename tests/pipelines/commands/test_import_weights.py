"""From a published file, by the command, to a model folder whose codes and images are the original's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.model_io import load_pretrained
from common.tensor_files import save_tensors
from pipelines.cli import main
from pipelines.commands.import_weights import ImportConfig, import_weights
from pipelines.commands.reconstruct import ReconstructConfig, reconstruct_files
from pipelines.pictures import save_png, to_pil
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder
from stage2_prior.condition import Condition
from stage2_prior.imports import KINDS as PRIOR_KINDS
from stage2_prior.imports import FirstStage
from stage2_prior.priors import PRIORS
from stage2_prior.sampling import SamplingConfig, sample_codes
from tests.golden import Golden, golden, golden_frontier
from tests.stage1_vq.test_import_golden import FILES, close, recorded_codes

Weights = dict[str, Tensor]


def published(name: str, reference: Golden, folder: Path) -> tuple[Path, Path]:
    """The reference's weights and config as its project publishes such: the two files."""
    weights, config = folder / "weights.ckpt", folder / "config.yaml"
    config.write_text(yaml.safe_dump(reference.config))
    if name.startswith("taming"):
        of_the_loss = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
        content: dict[str, Any] = {"state_dict": {**reference.weights, **of_the_loss}, "epoch": 1, "global_step": 2}
        config.write_text(yaml.safe_dump({"model": {"target": "taming.models.vqgan", "params": reference.config}}))
    elif name == "llamagen_vq":
        statistics = {"quantize.codebook_used": torch.zeros(65536)}
        content = {"model": {**reference.weights, **statistics}, "steps": 3}
    elif name == "var_vqvae":
        content = {"trainer": {"vae_local": reference.weights, "var_wo_ddp": {}}, "epoch": 5}
    else:
        weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
        save_tensors(reference.weights, weights)
        config.write_text(json.dumps({"_class_name": "VQModel", **reference.config}))
        return weights, config
    torch.save(content, weights)
    return weights, config


@pytest.mark.parametrize("name", FILES)
def test_the_command_makes_a_folder_with_the_originals_codes_and_images(name, tmp_path, capsys):
    reference = golden(name)
    kind, tolerance, names = FILES[name]
    weights, config = published(name, reference, tmp_path)
    out = tmp_path / "model"
    arguments = ["--kind", kind, "--weights", str(weights), "--config", str(config), "--out", str(out)]
    assert main(["import", *arguments]) == 0, capsys.readouterr().err
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"the vqgan model is in {out}; next: zellige encode --model {out} --data.path DIR" in line

    model = load_pretrained(out, AUTOENCODERS)
    x = reference.inputs["x"]
    assert model.image_size == tuple(x.shape[2:])
    with torch.no_grad():
        codes = model.encode(x)
        for ours, theirs in zip(codes, recorded_codes(name, reference.outputs), strict=True):
            assert torch.equal(ours, theirs)
        images = reference.outputs[names[3]]
        close(model.decode(codes)[: len(images)], images.clamp(-1, 1), tolerance)


def vqvae2_model(tmp_path: Path, **options: Any) -> tuple[Autoencoder, Golden]:
    reference = golden("vqvae2")
    torch.save(reference.weights, tmp_path / "vqvae.pt")
    config = ImportConfig(kind="vqvae2", weights=str(tmp_path / "vqvae.pt"), out=str(tmp_path / "model"), **options)
    import_weights(config)
    return load_pretrained(tmp_path / "model", AUTOENCODERS), reference


def test_a_bare_state_dict_of_vqvae2_is_imported_with_the_image_size_given(tmp_path):
    model, reference = vqvae2_model(tmp_path, image_size=(16, 32))
    assert model.image_size == (16, 32)
    with torch.no_grad():
        top, bottom = model.encode(reference.inputs["x0"])
    assert torch.equal(top, reference.outputs["id_t"])
    assert torch.equal(bottom, reference.outputs["id_b"])


@torch.no_grad()
def test_the_command_gives_the_images_of_vqvae2(tmp_path, capsys):
    reference = golden("vqvae2")
    torch.save(reference.weights, tmp_path / "vqvae.pt")
    arguments = ["--kind", "vqvae2", "--weights", str(tmp_path / "vqvae.pt"), "--image_size", "[16,32]"]
    assert main(["import", *arguments, "--out", str(tmp_path / "model")]) == 0, capsys.readouterr().err
    model = load_pretrained(tmp_path / "model", AUTOENCODERS)
    codes = model.encode(reference.inputs["x0"])
    close(model.decode(codes), reference.outputs["recon_from_codes"].clamp(-1, 1), 5e-5)
    close(model(reference.inputs["x0"]).reconstruction, reference.outputs["recon"], 5e-5)


def dalle_files(folder: Path) -> tuple[Weights, Weights]:
    folder.mkdir()
    parts = golden("dalle_encoder").weights, golden("dalle_decoder").weights
    for part, name in zip(parts, ("encoder.pkl", "decoder.pkl"), strict=True):
        torch.save(part, folder / name)
    return parts


@pytest.mark.parametrize("given", ["folder", "encoder alone", "both"])
def test_dalle_is_imported_from_its_two_files(given, tmp_path):
    folder = tmp_path / "files"
    dalle_files(folder)
    if given == "both":
        (folder / "decoder.pkl").rename(tmp_path / "other.pkl")
    config = ImportConfig(
        kind="dalle",
        weights=str(folder if given == "folder" else folder / "encoder.pkl"),
        decoder=str(tmp_path / "other.pkl") if given == "both" else None,
        out=str(tmp_path / "model"),
    )
    assert import_weights(config).startswith("32x32 codes of 64 (256x256x3 images): the dvae model is in ")
    model = load_pretrained(tmp_path / "model", AUTOENCODERS)
    reference = golden("dalle_encoder")
    with torch.no_grad():
        (codes,) = model.encode(reference.inputs["x"] * 2 - 1)  # theirs are in [0, 1]
    assert torch.equal(codes, reference.outputs["codes"])


@torch.no_grad()
def test_the_command_gives_the_codes_and_images_of_dalle(tmp_path, capsys):
    folder = tmp_path / "files"
    dalle_files(folder)
    arguments = ["--kind", "dalle", "--weights", str(folder), "--out", str(tmp_path / "model")]
    assert main(["import", *arguments]) == 0, capsys.readouterr().err
    model = load_pretrained(tmp_path / "model", AUTOENCODERS)
    encoder, decoder = golden("dalle_encoder"), golden("dalle_decoder")
    (codes,) = model.encode(encoder.inputs["x"] * 2 - 1)  # theirs are in [0, 1]
    assert torch.equal(codes, encoder.outputs["codes"])
    images = (model.decode((decoder.inputs["codes"],)) + 1) / 2
    close(images, decoder.outputs["x_rec"], 1e-5)


def test_an_imported_model_reconstructs_images(tmp_path):
    _, reference = vqvae2_model(tmp_path, image_size=(16, 32))
    image = reference.inputs["x0"][0].clamp(-1, 1)
    save_png(to_pil(image), tmp_path / "photo.png")
    config = ReconstructConfig(
        model=str(tmp_path / "model"), images=str(tmp_path / "photo.png"), out=str(tmp_path / "out")
    )
    assert reconstruct_files(config).startswith("1 image in ")


# ---- priors ----------------------------------------------------------------------------------------------------------


def of_both_stages(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of taming-transformers with a prior and its first stage, and its config."""
    prior, vqgan = golden("taming_net2net"), golden("taming_vqgan")
    stored = {f"first_stage_model.{name}": tensor for name, tensor in vqgan.weights.items()}
    torch.save({"state_dict": {**prior.weights, **stored}, "epoch": 1}, folder / "last.ckpt")
    sizes = ("vocab_size", "n_layer", "n_head", "n_embd")
    params = {
        "first_stage_config": {"target": "taming.models.vqgan.VQModel", "params": vqgan.config},
        "cond_stage_config": {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}},
        "transformer_config": {"params": {name: prior.config[name] for name in sizes}},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    return folder / "last.ckpt", folder / "model.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line that the command prints."""
    code = main(list(arguments))
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out.strip().splitlines()[-1]


def test_both_stages_of_one_file_make_the_originals_pictures(tmp_path, capsys):
    weights, config = of_both_stages(tmp_path)
    of_file = ("--weights", str(weights), "--config", str(config))
    vqgan, gpt, model = (str(tmp_path / name) for name in ("vqgan", "gpt", "model"))
    line = run(capsys, "import", "--kind", "taming-net2net", *of_file, "--out", gpt)
    assert line == (
        f"8x8 codes of 64 (16x16x3 images): the mingpt prior is in {gpt}; its first stage lies in the same file: "
        f"zellige import --kind taming-vqgan --weights {weights} --config {config} --out MODEL1; "
        f"next: zellige assemble --stage1 MODEL1 --stage2 {gpt} --out MODEL"
    )
    assert load_pretrained(gpt, PRIORS).stage1_fingerprint is None

    run(capsys, "import", "--kind", "taming-vqgan", *of_file, "--out", vqgan)
    line = run(capsys, "import", "--kind", "taming-net2net", *of_file, "--stage1", vqgan, "--out", gpt)
    assert line.endswith(f"is in {gpt}; next: zellige assemble --stage1 {vqgan} --stage2 {gpt} --out MODEL")
    run(capsys, "assemble", "--stage1", vqgan, "--stage2", gpt, "--out", model, "--temperature", "0")

    reference = golden("taming_net2net")
    pipeline = TwoStagePipeline.from_pretrained(model)
    assert pipeline.prior.stage1_fingerprint == pipeline.autoencoder.fingerprint()
    generated = pipeline.generate(labels=reference.inputs["class"].tolist())
    assert torch.equal(generated.codes[0].flatten(1), reference.outputs["greedy_indices"])
    close(generated.images, reference.outputs["greedy_img"].clamp(-1, 1), 2e-4)


@pytest.mark.parametrize("place", ["model", "module", "state_dict", "bare"])
def test_the_command_makes_a_prior_with_llamagens_codes(place, tmp_path, capsys):
    reference = golden("llamagen_gpt_c2i")
    weights = {**reference.weights, "freqs_cis": torch.zeros(17, 4, 2)}
    torch.save(weights if place == "bare" else {place: weights, "steps": 3}, tmp_path / "c2i.pt")
    (tmp_path / "config.json").write_text(json.dumps({**reference.config, "downsample_size": 8}))
    files = ("--weights", str(tmp_path / "c2i.pt"), "--config", str(tmp_path / "config.json"))
    line = run(capsys, "import", "--kind", "llamagen-gpt", *files, "--out", str(tmp_path / "gpt"))
    assert line.startswith("4x4 codes of 64 (32x32x3 images): the llamagen prior is in ")
    prior = load_pretrained(tmp_path / "gpt", PRIORS)
    condition = Condition(reference.inputs["cond"])
    settings = SamplingConfig(temperature=0, guidance=reference.config["cfg_scale"])
    codes = sample_codes(prior, range(2), condition, 0, settings)[0].flatten(1)
    assert torch.equal(codes, reference.outputs["gen_cfg/tokens"])


def test_the_command_makes_a_prior_with_llamagens_codes_of_texts(tmp_path, capsys):
    reference = golden("llamagen_gpt_t2i")
    torch.save({"model": reference.weights}, tmp_path / "t2i.pt")
    (tmp_path / "config.json").write_text(json.dumps(reference.config))
    files = ("--weights", str(tmp_path / "t2i.pt"), "--config", str(tmp_path / "config.json"))
    run(capsys, "import", "--kind", "llamagen-gpt", *files, "--out", str(tmp_path / "gpt"))
    prior = load_pretrained(tmp_path / "gpt", PRIORS)
    counts = reference.inputs["emb_masks"].bool()
    condition = Condition(embeddings=reference.inputs["cond"], embedding_mask=counts)
    settings = SamplingConfig(temperature=0, guidance=reference.config["cfg_scale"])
    codes = sample_codes(prior, range(2), condition, 0, settings)[0].flatten(1)
    assert torch.equal(codes, reference.outputs["gen_cfg/tokens"])


def test_the_command_makes_a_masked_prior_of_halton_maskgit(tmp_path, capsys):
    reference = golden_frontier("halton_transformer")
    torch.save({"model_state_dict": reference.weights, "iter": 3, "global_epoch": 1}, tmp_path / "small.pth")
    (tmp_path / "config.json").write_text(json.dumps(reference.config["model"]))
    files = ("--weights", str(tmp_path / "small.pth"), "--config", str(tmp_path / "config.json"))
    line = run(capsys, "import", "--kind", "halton-maskgit", *files, "--out", str(tmp_path / "prior"))
    assert line.startswith("4x4 codes of 30 (64x64x3 images): the halton_maskgit prior is in ")
    prior = load_pretrained(tmp_path / "prior", PRIORS)
    with torch.no_grad():
        sequence = reference.inputs["code"].flatten(1)
        logits = prior.masked_logits(sequence.masked_fill(sequence == 30, -1), Condition(reference.inputs["label"]))
    seen = reference.inputs["drop"] == 0
    torch.testing.assert_close(logits[seen], reference.outputs["logits"][seen][..., :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["maskgit_imagebert", "maskgit_uvit"])
def test_the_command_makes_a_masked_prior_of_titok(name, tmp_path, capsys):
    reference = golden_frontier(name)
    save_tensors(reference.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model": reference.config["model"]}))
    files = ("--weights", str(tmp_path / "model.safetensors"), "--config", str(tmp_path / "config.json"))
    line = run(capsys, "import", "--kind", "titok-maskgit", *files, "--out", str(tmp_path / "prior"))
    assert line.startswith("1x12 codes of 24 (256x256x3 images): the titok_maskgit prior is in ")
    prior = load_pretrained(tmp_path / "prior", PRIORS)
    ids = reference.inputs["ids"]
    with torch.no_grad():
        logits = prior.masked_logits(ids.masked_fill(ids == 24, -1), Condition(reference.inputs["condition"]))
    torch.testing.assert_close(logits, reference.outputs["logits_cond"], rtol=1e-5, atol=2e-4)


def test_the_command_makes_a_prior_of_a_gpt_alone(tmp_path, capsys):
    reference = golden("taming_gpt")
    save_tensors(reference.weights, tmp_path / "gpt.safetensors")
    config = {**reference.config, "hw": [1, 19], "cond_hw": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    files = ("--weights", str(tmp_path / "gpt.safetensors"), "--config", str(tmp_path / "config.yaml"))
    run(capsys, "import", "--kind", "taming-gpt", *files, "--out", str(tmp_path / "gpt"))
    prior = load_pretrained(tmp_path / "gpt", PRIORS)
    tokens = reference.inputs["idx"]
    codes = torch.cat([tokens[:, 4:], tokens[:, :1]], dim=1)[:, None]
    with torch.no_grad():
        logits = prior.logits((codes,), Condition(codes=(tokens[:, :4].view(2, 2, 2),)))
    close(logits, reference.outputs["logits"][:, 3:], 5e-5)


def test_the_command_makes_vars_prior_of_its_tokenizer(tmp_path, capsys):
    tokenizer, reference = golden("var_vqvae"), golden("var_transformer")
    torch.save({"trainer": {"vae_local": tokenizer.weights, "var_wo_ddp": reference.weights}}, tmp_path / "ar.pth")
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump(tokenizer.config))
    weights, vae, prior = ("--weights", str(tmp_path / "ar.pth")), str(tmp_path / "vae"), str(tmp_path / "var")
    run(capsys, "import", "--kind", "var-vqvae", *weights, "--config", str(tmp_path / "vae.yaml"), "--out", vae)
    line = run(capsys, "import", "--kind", "var", *weights, "--stage1", vae, "--out", prior)
    assert line.endswith(
        f"the var prior is in {prior}; next: zellige assemble --stage1 {vae} --stage2 {prior} --out MODEL"
    )
    run(capsys, "assemble", "--stage1", vae, "--stage2", prior, "--out", str(tmp_path / "model"))
    pipeline = TwoStagePipeline.from_pretrained(tmp_path / "model")
    settings = SamplingConfig(temperature=0, guidance=1 + reference.config["cfg"], guidance_schedule="linear")
    codes = pipeline.sample([0, 1], reference.inputs["label"].tolist(), 0, settings)
    assert torch.equal(torch.cat([grid.flatten(1) for grid in codes], dim=1), reference.outputs["ar/idx"])


def test_the_command_makes_a_pixelsnail_of_each_level(tmp_path, capsys):
    top, bottom = golden("pixelsnail_top"), golden("pixelsnail_bottom")
    for name, reference in (("top", top), ("bottom", bottom)):
        torch.save({"model": reference.weights, "args": argparse.Namespace(hier=name)}, tmp_path / f"{name}.pt")
        weights = ("--weights", str(tmp_path / f"{name}.pt"))
        line = run(capsys, "import", "--kind", "pixelsnail", *weights, "--out", str(tmp_path / name))
        assert line.endswith('next: zellige assemble --stage1 MODEL1 --stage2 "[TOP, BOTTOM]" --out MODEL')
    priors = [load_pretrained(tmp_path / name, PRIORS) for name in ("top", "bottom")]
    with torch.no_grad():
        logits = priors[0].logits((top.inputs["codes"],), Condition())
        close(logits, top.outputs["logits"].flatten(2).transpose(1, 2), 1e-5)
        logits = priors[1].logits((bottom.inputs["codes"],), Condition(codes=(bottom.inputs["cond"],)))
        close(logits, bottom.outputs["logits_cond"].flatten(2).transpose(1, 2), 1e-5)


def test_a_level_takes_codes_and_images_from_the_first_stage_or_refuses_it():
    reference = golden("pixelsnail_bottom")
    grids = (Grid("level0", 4, 4, 24), Grid("level1", 8, 8, 24))
    stage1 = FirstStage(CodeSpec(grids, 16, 16), "f00d")
    prior = PRIOR_KINDS["pixelsnail"].build(reference.weights, None, stage1)
    assert (prior.given, prior.code_spec, prior.stage1_fingerprint) == (grids[:1], CodeSpec(grids[1:], 16, 16), "f00d")
    other = FirstStage(CodeSpec((Grid("level0", 2, 2, 24), grids[1]), 16, 16))
    with pytest.raises(UserError, match=r"a prior of 8x8 codes of 24 given 4x4 codes of 24, and the first stage makes"):
        PRIOR_KINDS["pixelsnail"].build(reference.weights, None, other)


# ---- mistakes -------------------------------------------------------------------------------------------------------


def attempt(tmp_path: Path, weights: Weights, file: str = "weights.ckpt", **options: Any) -> str:
    """What the command says of these weights, which it refuses, or of those of another file."""
    torch.save({"state_dict": weights}, tmp_path / "weights.ckpt")
    settings = {"kind": "taming-vqgan", "weights": str(tmp_path / file), "out": str(tmp_path / "model"), **options}
    with pytest.raises(UserError) as caught:
        import_weights(ImportConfig(**settings))
    assert not (tmp_path / "model").exists()
    return str(caught.value)


def original(tmp_path: Path) -> tuple[Weights, str]:
    reference = golden("taming_vqgan")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(reference.config))
    return reference.weights, str(tmp_path / "config.yaml")


def test_missing_left_over_and_misshapen_weights_are_named(tmp_path):
    weights, config = original(tmp_path)
    weights["decoder.extra"] = torch.zeros(1)
    weights["decoder.conv_in.bias"] = torch.zeros(5)
    del weights["encoder.mid.attn_1.q.weight"]
    message = attempt(tmp_path, weights, config=config)
    assert "missing: encoder.mid.attn_1.q.weight;" in message
    assert "wrong shapes: decoder.conv_in.bias is 5, not 32;" in message
    assert "not expected: decoder.extra)" in message


def test_a_config_of_another_size_is_told(tmp_path):
    weights, config = original(tmp_path)
    values = yaml.safe_load(Path(config).read_text())
    values["ddconfig"]["ch"] = 64
    Path(config).write_text(yaml.safe_dump(values))
    message = attempt(tmp_path, weights, config=config)
    assert "wrong shapes: encoder.conv_in.weight is 32x3x3x3, not 64x3x3x3, " in message
    assert " more)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remap": "used.npy"}, "the original's remap='used.npy' is not supported: expected None"),
        ({"ddconfig": {"double_z": True}}, "the original's double_z=True is not supported: expected False"),
        ({"ddconfig": {"in_channels": 3, "out_ch": 6}}, "the original's out_ch=6 is not supported"),
        (
            {"norm_num_groups": 5},
            "5 norm groups do not divide the 32 channels of this model: give its own number as norm_num",
        ),
    ],
)
def test_arguments_that_make_another_network_are_refused(change, message, tmp_path):
    weights, config = original(tmp_path)
    Path(config).write_text(yaml.safe_dump(change))
    assert message in attempt(tmp_path, weights, config=config)


def test_weights_of_another_kind_are_refused(tmp_path):
    assert "no codebook quantize.embed.weight of two axes" in attempt(
        tmp_path, original(tmp_path)[0], kind="taming-gumbelvq"
    )
    assert "'state_dict' (dict) where only tensors are expected" in attempt(
        tmp_path, original(tmp_path)[0], kind="diffusers-vqmodel"
    )
    assert "they are not those of VAR's tokenizer" in attempt_bare(tmp_path, original(tmp_path)[0], kind="var-vqvae")
    assert "the weights have no encoder.down_blocks" in attempt_bare(
        tmp_path, original(tmp_path)[0], kind="diffusers-vqmodel"
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("maskgit-vqgan", "encoder.conv_in.weight"),
        ("rar", "pos_embed lm_head.weight timesteps_embeddings embeddings.weight blocks.0.attn.q_norm.weight"),
    ],
)
def test_weights_whose_shapes_tell_no_size_are_refused(kind, names, tmp_path):
    weights = {"quantize.embedding.weight": torch.zeros(9, 3), **{name: torch.zeros(9) for name in names.split()}}
    message = attempt_bare(tmp_path, weights, kind)
    assert message.startswith(f"the weights, or what --config says of them, are not those of --kind {kind}, or they")
    assert message.endswith("; check --kind and --config, or download them again")


def attempt_bare(tmp_path: Path, weights: Weights, kind: str) -> str:
    save_tensors(weights, tmp_path / "bare.safetensors")
    return attempt(tmp_path, {}, kind=kind, file="bare.safetensors")


def test_options_that_do_not_go_together_are_refused(tmp_path):
    weights, config = original(tmp_path)
    assert "--decoder is for --kind dalle" in attempt(tmp_path, weights, decoder="decoder.pkl")
    assert "--decoder is for --kind dalle" in attempt(tmp_path, weights, kind="taming-gpt", decoder="decoder.pkl")
    assert "--stage1 is for priors, and taming-vqgan is an autoencoder" in attempt(tmp_path, weights, stage1="vqgan")
    message = attempt(tmp_path, weights, kind="taming-gpt", image_size=256)
    assert "--image_size is for autoencoders, and taming-gpt is a prior: its images are those of the model" in message
    assert "there is no folder vqgan" in attempt(tmp_path, weights, kind="taming-gpt", stage1="vqgan")
    assert "--config is not for --kind dalle" in attempt(tmp_path, weights, kind="dalle", config=config)
    assert "decoder.pkl; give --weights FOLDER with" in attempt(tmp_path, weights, kind="dalle")
    message = attempt(tmp_path, weights, config=config, image_size=15)
    assert "cannot encode 15x15 images: both sides must be multiples of 2" in message


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is something else than a model folder"):
        import_weights(ImportConfig(kind="vqvae2", weights="nothing.pt", out=str(tmp_path / "out")))
