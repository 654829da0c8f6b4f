"""Every packaged recipe can be read, and its model can be built: none rots."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from codes.latents import LatentSpec
from codes.spec import CodeSpec
from pipelines.options import read_recipe
from stage1_vae.binarise import Binarised
from stage1_vae.labels.m1m2 import M1M2, M1M2Config
from stage1_vae.modalities.multimodal import Multimodal
from stage1_vae.model import LikelihoodVAE
from stage1_vae.models import build_model
from stage1_vae.objectives.terms import elbo
from stage1_vae.tables.data import read_table
from stage1_vae.tables.models import build_model as build_table_model
from stage1_vae.tables.train import Stage1TableConfig
from stage1_vae.train import Stage1VAEConfig
from stage1_vae.vae import VAE
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.train import Stage1Config
from stage2_prior.condition import TextSpec
from stage2_prior.latents import LATENT_PRIORS
from stage2_prior.priors import PRIORS
from stage2_prior.train import Stage2Config
from stage2_prior.train_latents import Stage2LatentConfig

CONFIGS = Path(str(files("configs")))
VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

# The autoencoder that makes the codes of each prior, and the number of classes of its images.
STAGE1_OF = {
    "mnist_quickstart": ("mnist_quickstart", 10),
    "mnist_pixelcnn": ("mnist_vqvae", 10),
    "cifar10_pixelcnn": ("cifar10_vqvae", 10),
    "cifar10_pixelcnn_short": ("cifar10_vqvae_short", 10),
    "cifar10_transformer": ("cifar10_vqvae", 10),
    "folder": ("folder", 0),
    "folder_short": ("folder_short", 0),
    "imagenet_samples_text_short": ("imagenet_samples_vqvae_short", 0),
    "mnist_pixelsnail": ("mnist_vqvae", 10),
    "cifar10_pixelsnail_short": ("cifar10_vqvae_short", 10),
    "mnist_var_short": ("mnist_multiscale", 10),
    "mnist_xqgan_var_short": ("mnist_xqgan", 10),
    "mnist_infinity_short": ("mnist_infinity", 10),
    "cifar10_var_short": ("cifar10_multiscale", 10),
    "imagenet256_var_d16": ("imagenet256_multiscale", 1000),
    "cifar10_rq_short": ("cifar10_residual", 10),
    "mnist_vqvae2_short": ("mnist_vqvae2", 10),
    "cifar10_vqvae2_short": ("cifar10_vqvae2", 10),
    "imagenet256_vqvae2": ("imagenet256_vqvae2", 1000),
    "faces1024_vqvae2": ("faces1024_vqvae2", 0),
    "mnist_ibq_gpt_short": ("mnist_quickstart", 10),
    "mnist_open_magvit2_gpt_short": ("mnist_lfq", 10),
    "mnist_rar_short": ("mnist_quickstart", 10),
    "mnist_randar_short": ("mnist_quickstart", 10),
    "mnist_maskgit": ("mnist_vqvae", 10),
    "cifar10_maskgit_short": ("cifar10_vqvae_short", 10),
    "cifar10_diffusion_short": ("cifar10_vqvae_short", 10),
    "mnist_diffusion_short": ("mnist_quickstart", 10),
    "mnist_mdm_prime_short": ("mnist_quickstart", 10),
    "cifar10_halton_short": ("cifar10_vqvae_short", 10),
    "imagenet256_maskgit": ("imagenet256_vqgan", 1000),
    "imagenet256_vqgan_gpt": ("imagenet256_vqgan", 1000),
}

LATENTS_OF = dict.fromkeys(
    ("mnist_latents_mixture", "mnist_latents_maf", "mnist_latents_vae"), "mnist_binary"
)  # the VAE


def recipes(stage: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / stage).glob("*.yaml"))


def stage1(name: str) -> Stage1Config:
    return read_recipe("train-stage1", Stage1Config, "stage1", ["--config", name])[0]


def stage2(name: str) -> Stage2Config:
    return read_recipe("train-stage2", Stage2Config, "stage2", ["--config", name])[0]


def code_spec(name: str) -> CodeSpec:
    """The codes that an autoencoder of this recipe makes, without the memory for its weights."""
    config = stage1(name)
    with torch.device("meta"):
        autoencoder = AUTOENCODERS[config.model.kind](config.model, (config.data.height, config.data.width))
    return autoencoder.code_spec()


@pytest.mark.parametrize(
    ("name", "codes"),
    {
        "mnist_quickstart": "7x7 codes of 128 (28x28x1 images)",
        "mnist_vqvae": "7x7 codes of 256 (28x28x1 images)",
        "mnist_multiscale": " + ".join(f"{n}x{n} codes of 128" for n in (1, 2, 3, 4, 5, 7)) + " (28x28x1 images)",
        "mnist_xqgan": " + ".join(f"{n}x{n} codes of 128" for n in (1, 2, 3, 4, 5, 7) for _ in range(2))
        + " (28x28x1 images)",
        "mnist_infinity": " + ".join(f"{n}x{n} codes of 256" for n in (1, 2, 3, 4, 5, 7)) + " (28x28x1 images)",
        "imagenet256_multiscale": " + ".join(f"{n}x{n} codes of 4096" for n in VAR_SCALES) + " (256x256x3 images)",
        "mnist_binary": "7x7 codes of 256 (28x28x1 images)",
        "cifar10_vqvae": "8x8 codes of 512 (32x32x3 images)",
        "cifar10_vqvae_short": "8x8 codes of 512 (32x32x3 images)",
        "imagenet128_vqvae": "32x32 codes of 512 (128x128x3 images)",
        "folder": "16x16 codes of 1024 (128x128x3 images)",
        "folder_short": "16x16 codes of 256 (64x64x3 images)",
        "imagenet_samples_vqvae_short": "16x16 codes of 512 (64x64x3 images)",
        "cifar10_residual": " + ".join(4 * ["4x4 codes of 512"]) + " (32x32x3 images)",
        "cifar10_multiscale": " + ".join(f"{n}x{n} codes of 512" for n in (1, 2, 3, 4, 6, 8)) + " (32x32x3 images)",
        "mnist_vqvae2": "7x7 codes of 64 + 14x14 codes of 64 (28x28x1 images)",
        "cifar10_vqvae2": "4x4 codes of 512 + 8x8 codes of 512 (32x32x3 images)",
        "imagenet256_vqvae2": "32x32 codes of 512 + 64x64 codes of 512 (256x256x3 images)",
        "faces1024_vqvae2": ("32x32 codes of 512 + 64x64 codes of 512 + 128x128 codes of 512 (1024x1024x3 images)"),
        "imagenet256_vqgan": "16x16 codes of 1024 (256x256x3 images)",
        "folder_vqgan": "16x16 codes of 1024 (256x256x3 images)",
        "cifar10_vqgan": "8x8 codes of 512 (32x32x3 images)",
        "imagenet256_dvae": "32x32 codes of 8192 (256x256x3 images)",
        "cifar10_dvae": "8x8 codes of 512 (32x32x3 images)",
        "imagenet256_vit_vqgan": "32x32 codes of 8192 (256x256x3 images)",
        "cifar10_vit_vqgan": "8x8 codes of 512 (32x32x3 images)",
        "cifar10_maskgit_vqgan": "8x8 codes of 512 (32x32x3 images)",
        "cifar10_open_magvit2": "8x8 codes of 1024 (32x32x3 images)",
        "mnist_lfq": "7x7 codes of 16 + 7x7 codes of 64 (28x28x1 images)",
        "mnist_titok": "1x16 codes of 1000 (28x28x1 images)",
        "folder_titok_short": "1x32 codes of 1000 (64x64x3 images)",
        "mnist_flextok": "1x16 codes of 1000 (28x28x1 images)",
        "imagenet256_flextok": "1x256 codes of 64000 (256x256x3 images)",
        "mnist_flow": "7x7 codes of 128 (28x28x1 images)",
        "mnist_flow_one_step": "7x7 codes of 128 (28x28x1 images)",
        "folder_flow": "16x16 codes of 1024 (256x256x3 images)",
        "folder_flow_one_step": "16x16 codes of 1024 (256x256x3 images)",
    }.items(),
)
def test_stage_one_recipes_make_the_codes_they_announce(name, codes):
    assert code_spec(name).describe() == codes
    assert stage1(name).data.channels == stage1(name).model.channels


@pytest.mark.parametrize("name", STAGE1_OF)
def test_stage_two_recipes_build_a_prior_for_their_codes(name):
    config, run = read_recipe("train-stage2", Stage2Config, "stage2", ["--config", name])
    stage1_name, classes = STAGE1_OF[name]
    facts = {} if config.captions is None else {"text": TextSpec(config.text_length, config.text_vocabulary)}
    with torch.device("meta"):
        prior = PRIORS[config.model.kind](config.model, code_spec(stage1_name), classes, **facts)
    assert sum(weight.numel() for weight in prior.parameters()) > 10_000
    assert run == Path("runs") / (f"{name}_prior" if name in recipes("stage1") else name)


@pytest.mark.parametrize("name", LATENTS_OF)
def test_latent_recipes_build_a_prior_for_the_latents_of_their_vae(name):
    config, run = read_recipe("train-stage2", Stage2LatentConfig, "stage2", ["--config", name])
    vae, _ = read_recipe("train-vae", Stage1VAEConfig, "vae", ["--config", LATENTS_OF[name]])
    with torch.device("meta"):
        spec = LatentSpec(VAE(vae.model, (vae.data.height, vae.data.width)).shape, True, 28, 28, 1)
        prior = LATENT_PRIORS[config.model.kind](config.model, spec)
    assert sum(weight.numel() for weight in prior.parameters()) > 10_000
    assert run == Path("runs") / name


def test_no_recipe_is_left_out_of_these_tests():
    assert set(recipes("stage1")) == {
        "mnist_quickstart", "mnist_vqvae", "mnist_binary", "cifar10_vqvae", "cifar10_vqvae_short", "imagenet128_vqvae",
        "folder", "folder_short", "imagenet_samples_vqvae_short", "imagenet256_vqgan", "folder_vqgan", "cifar10_vqgan",
        "imagenet256_dvae", "cifar10_dvae", "imagenet256_vit_vqgan", "cifar10_vit_vqgan",
        "imagenet256_vqvae2", "faces1024_vqvae2", "cifar10_vqvae2", "cifar10_residual", "cifar10_multiscale",
        "mnist_multiscale", "imagenet256_multiscale", "mnist_xqgan",
        "mnist_vqvae2", "mnist_lfq", "mnist_titok", "folder_titok_short", "cifar10_maskgit_vqgan",
        "cifar10_open_magvit2", "cifar10_infinity", "mnist_infinity", "mnist_flextok", "imagenet256_flextok",
        "mnist_flow", "mnist_flow_one_step", "folder_flow", "folder_flow_one_step",
    }  # fmt: skip
    assert set(recipes("stage2")) == STAGE1_OF.keys() | LATENTS_OF.keys()


@pytest.mark.parametrize("name", ["cifar10_vqvae", "imagenet128_vqvae"])
def test_published_recipes_have_the_published_figures(name):
    config = stage1(name)
    model, quantizer, train = config.model, config.model.quantizer, config.train
    assert (model.width, model.residual_blocks, model.downsamplings) == (256, 2, 2)
    assert (quantizer.codebook_size, quantizer.dim) == (512, 64)
    assert (quantizer.commitment_weight, quantizer.codebook_update, quantizer.decay) == (0.25, "ema", 0.99)
    assert (train.learning_rate, train.batch_size, train.steps, train.schedule) == (
        2e-4,
        128,
        250_000,
        "constant",
    )


@pytest.mark.parametrize(("name", "levels"), [("imagenet256_vqvae2", 2), ("faces1024_vqvae2", 3)])
def test_vqvae2_recipes_have_the_published_figures(name, levels):
    config = stage1(name)
    model, quantizer = config.model, config.model.quantizer
    assert (model.levels, model.width, model.residual_width, model.residual_blocks) == (levels, 128, 64, 2)
    assert (quantizer.codebook_size, quantizer.dim, quantizer.commitment_weight) == (512, 64, 0.25)
    assert (quantizer.codebook_update, quantizer.decay) == ("ema", 0.99)
    assert (quantizer.kmeans_iterations, quantizer.revive_after, config.train.batch_size) == (0, 0, 128)


def test_the_hierarchical_priors_have_the_published_figures():
    """Levels: layers, hidden and residual width, layers with attention, dropout, output stack, given through."""
    expected = {
        "imagenet256_vqvae2": [(20, 512, 2048, 4, 0.1, 20, None), (20, 512, 1024, 0, 0.1, 20, 20)],
        "faces1024_vqvae2": [
            (20, 512, 2048, 4, 0.5, 0, None), (20, 512, 1024, 1, 0.3, 0, 8), (10, 512, 1024, 0, 0.25, 0, 8)
        ],
    }  # fmt: skip
    for name, levels in expected.items():
        config, _ = read_recipe("train-stage2", Stage2Config, "stage2", ["--config", name])
        assert stage1(name).model.levels == len(levels)
        for number, figures in enumerate(levels):
            level = config.model.level(number, len(levels))
            layers = level.blocks * level.residual_blocks
            attention = level.blocks if level.attention else 0
            sizes = (layers, level.width, level.residual_width, attention, level.dropout, level.output_blocks)
            assert (*sizes, level.given_blocks if number else None) == figures
            assert (level.kind, level.kernel_size, level.heads) == ("pixelsnail", 5, 8)


@pytest.mark.parametrize(("name", "tokenizer"), [("mnist_flow", "mnist_quickstart"), ("folder_flow", "folder_vqgan")])
def test_flow_decoders_are_on_the_codes_of_another_recipe_and_one_step_is_of_the_same_network(name, tokenizer):
    teacher, student = stage1(name), stage1(f"{name}_one_step")
    assert teacher.model.tokenizer == stage1(tokenizer).model
    assert student.model == replace(teacher.model, steps=1)
    assert (teacher.distillation.teacher_steps, student.distillation.teacher_steps) == (0, 8)
    assert teacher.frozen == student.frozen == ("tokenizer",)


def test_the_dvae_recipe_has_the_published_figures():
    config = stage1("imagenet256_dvae")
    model, quantizer, train = config.model, config.model.quantizer, config.train
    assert (model.width, model.groups, model.blocks) == (256, 4, 2)
    assert (quantizer.codebook_size, quantizer.dim, quantizer.embedding_dim) == (8192, model.encoder_width, 128)
    assert (quantizer.temperature_start, quantizer.temperature_end) == (1, 1 / 16)
    assert (quantizer.temperature_steps, quantizer.kl_warmup_steps) == (150_000, 5_000)
    assert quantizer.kl_weight == pytest.approx(6.6 / 192)
    assert (train.learning_rate, train.learning_rate * train.final_learning_rate) == (1e-4, 1.25e-6)
    assert (train.batch_size, train.steps, train.schedule) == (512, 1_200_000, "cosine")
    assert (train.weight_decay, train.betas, train.ema_decay) == (1e-4, (0.9, 0.999), 0.999)


def test_the_vit_vqgan_recipe_has_the_published_figures():
    config = stage1("imagenet256_vit_vqgan")
    model, quantizer, train = config.model, config.model.quantizer, config.train
    assert (model.patch, model.width, model.blocks, model.heads) == (8, 768, 12, 12)
    assert (model.logit_laplace_weight, model.l2_weight) == (0.1, 1.0)
    assert (quantizer.codebook_size, quantizer.lookup_dim, quantizer.l2_normalise) == (8192, 32, True)
    assert (train.learning_rate, train.learning_rate * train.final_learning_rate) == (1e-4, 5e-5)
    assert (train.batch_size, train.steps, train.warmup_steps) == (256, 500_000, 50_000)
    assert (train.weight_decay, train.betas) == (1e-4, (0.9, 0.99))
    assert (config.perceptual.weight, config.adversarial.weight, config.adversarial.adaptive) == (0.1, 0.1, False)
    assert config.adversarial.discriminator.kind == "stylegan"


def test_the_vqgan_recipe_has_the_published_figures():
    config = stage1("imagenet256_vqgan")
    model, quantizer, train, adversarial = config.model, config.model.quantizer, config.train, config.adversarial
    assert (model.width, model.multipliers, model.residual_blocks) == (128, (1, 1, 2, 2, 4), 2)
    assert (model.attention_levels, model.z_channels, model.norm_groups) == ((4,), 256, 32)
    assert (model.l1_weight, model.l2_weight, config.perceptual.weight) == (1, 0, 1)
    assert (quantizer.codebook_size, quantizer.dim, quantizer.commitment_weight) == (1024, 256, 0.25)
    assert (quantizer.codebook_update, quantizer.kmeans_iterations, quantizer.revive_after) == ("gradient", 0, 0)
    assert train.learning_rate == adversarial.learning_rate == pytest.approx(4.5e-6 * train.batch_size)
    assert train.betas == adversarial.betas == (0.5, 0.9)
    assert (adversarial.weight, adversarial.adaptive, adversarial.loss) == (0.8, True, "hinge")
    assert adversarial.start * train.steps == 250_000
    assert (adversarial.warmup, adversarial.ramp) == (0, 0)
    assert (adversarial.discriminator.width, adversarial.discriminator.layers) == (64, 3)


def test_the_var_recipes_have_the_published_figures():
    tokenizer = stage1("imagenet256_multiscale")
    config, _ = read_recipe("train-stage2", Stage2Config, "stage2", ["--config", "imagenet256_var_d16"])
    model, quantizer = tokenizer.model, tokenizer.model.quantizer
    assert (model.width, model.multipliers, model.residual_blocks) == (160, (1, 1, 2, 2, 4), 2)
    assert (model.z_channels, model.quant_conv_kernel, model.norm_groups) == (32, 3, 32)
    assert (quantizer.scales, quantizer.codebook_size, quantizer.dim) == (VAR_SCALES, 4096, 32)
    assert (quantizer.codebook_update, quantizer.commitment_weight) == ("gradient", 0.25)
    assert (quantizer.phis, quantizer.phi_share) == (4, 0.5)
    prior, train = config.model, config.train
    assert (prior.layers, prior.width, prior.heads, prior.shared_adaln) == (16, 1024, 16, False)
    assert (prior.drop_path, prior.initial_gain) == (pytest.approx(16 / 240, abs=1e-4), 1e-3)
    assert (train.batch_size, train.weight_decay, train.betas) == (768, 0.05, (0.9, 0.95))
    assert train.learning_rate == pytest.approx(1e-4 * train.batch_size / 256)
    epochs = train.steps * train.batch_size / 1_281_167
    assert epochs == pytest.approx(200, abs=0.1)
    assert (train.warmup_steps, train.max_grad_norm, config.label_dropout) == (train.steps / 50, 2.0, 0.1)


def test_the_maskgit_recipe_has_the_published_figures():
    config = stage2("imagenet256_maskgit")
    model, train = config.model, config.train
    assert (model.layers, model.width, model.heads) == (24, 768, 8)
    assert model.network.hidden_width * 3 == 3072 * 2  # three matrices where the published feed-forward has two
    assert (model.dropout, model.residual_dropout, model.label_smoothing) == (0.1, 0.1, 0.1)
    assert (train.batch_size, train.betas) == (256, (0.9, 0.96))
    assert train.steps * train.batch_size / 1_281_167 == pytest.approx(300, abs=0.5)


def test_the_short_masked_recipes_differ_in_kind_only():
    maskgit, diffusion = stage2("cifar10_maskgit_short"), stage2("cifar10_diffusion_short")
    fields = {**asdict(maskgit.model), "kind": "diffusion"}
    del fields["label_smoothing"]
    assert (asdict(diffusion.model), diffusion.train) == (fields, maskgit.train)
    prime, diffusion = stage2("mnist_mdm_prime_short"), stage2("mnist_diffusion_short")
    fields = {"sub_tokens": 2, "bases": None, **asdict(diffusion.model), "kind": "mdm_prime"}
    assert (asdict(prime.model), prime.train) == (fields, diffusion.train)


def test_the_gpt_recipe_has_the_published_figures():
    config = stage2("imagenet256_vqgan_gpt")
    model, train = config.model, config.train
    assert (model.kind, model.layers, model.width, model.heads) == ("mingpt", 48, 1536, 24)
    assert train.learning_rate == pytest.approx(4.5e-6 * train.batch_size)
    assert (train.betas, train.weight_decay, train.schedule) == ((0.9, 0.95), 0.01, "constant")
    with torch.device("meta"):
        prior = PRIORS["mingpt"](model, code_spec("imagenet256_vqgan"), 1000)
    assert sum(weight.numel() for weight in prior.parameters()) == pytest.approx(1.36e9, rel=0.01)


FOR_GPUS = {  # a step takes a CPU too long
    "vdvae_cifar10_published",
    "vdvae_imagenet32",
    "vdvae_imagenet64",
    "nvae_celeba64_full",
    "nvae_cifar10_full",
}


@pytest.mark.parametrize("name", recipes("vae"))
def test_recipes_of_vaes_have_a_bound_with_a_gradient_everywhere(name, monkeypatch):
    config, run = read_recipe("train-vae", Stage1VAEConfig, "vae", ["--config", name])
    assert run == Path("runs") / (f"{name}_vae" if name in recipes("stage1") else name)
    torch.manual_seed(0)
    size, binarised = (config.data.height, config.data.width), Binarised(config.binarised, config.binarised_seed)
    if name in FOR_GPUS:
        monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda _: None)  # which takes its time there, too
        with torch.device("meta"):
            assert build_model(config.model, size, binarised).shape
        return
    if isinstance(config.model, M1M2Config):
        first, _ = read_recipe(
            "train-vae", Stage1VAEConfig, "vae", ["--config", "mnist_binary", "--model.latents", "50"]
        )
        vae: LikelihoodVAE = M1M2(config.model, size, binarised, m1=VAE(first.model, size, binarised))
    else:
        vae = build_model(config.model, size, binarised)
    images = torch.rand(2, config.data.channels, config.data.height, config.data.width).round() * 2 - 1
    told = (vae(images),)
    if isinstance(vae, Multimodal):  # the other modality of these images is not in them
        symbols = torch.tensor([[0], [1]]) if vae.config.pair == "image_label" else None
        noise = torch.randn(3 if vae.is_product else 2, 1, 2, vae.config.latents)
        told = vae(images, noise=noise, symbols=symbols, training=True)
    loss = -torch.stack([elbo(terms).mean() for terms in told]).sum()
    loss.backward()
    assert torch.isfinite(loss)
    learning = [(name, weight) for name, weight in vae.named_parameters() if weight.requires_grad]
    assert [name for name, weight in learning if weight.grad is None] == []


@pytest.mark.parametrize("name", recipes("tables"))
def test_recipes_of_tables_have_a_bound_with_a_gradient_everywhere(name, tmp_path):
    config, run = read_recipe("train-table", Stage1TableConfig, "tables", ["--config", name])
    assert run == Path("runs") / name
    (tmp_path / "t.csv").write_text("a,b,c\n1,2,0\n3,4,0\n0,1,5\n")
    table = read_table(tmp_path / "t.csv")
    torch.manual_seed(0)
    model = build_table_model(config.model, table, table, config.table)
    (-model(model.rows(table), 2).log_weights.mean()).backward()
    assert [weight for weight, tensor in model.named_parameters() if tensor.grad is None] == []
