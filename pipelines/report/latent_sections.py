"""The sections of a likelihood VAE."""

from __future__ import annotations

import torch

from pipelines.report import latents, memorisation
from pipelines.report.charts import number
from pipelines.report.facts import speeds_of
from pipelines.report.findings import Asked, Findings, Missing
from pipelines.report.images import Sets, Shown, binarised_of
from pipelines.report.measured_images import held_out_of, images_to_measure
from pipelines.report.reconstructions import reconstruct_images
from stage1_vae.model import LikelihoodVAE


def of_vae(found: Findings, asked: Asked) -> None:
    """The sections of a likelihood VAE."""
    pipeline = found.models.vae
    if pipeline is None:
        why = Missing("A prior over latents alone makes no images: name the assembled model of it and its VAE.")
        found.reconstructions = found.latents = found.samples = found.memorisation = why
        return
    vae = pipeline.vae
    sets, test = images_to_measure(found, asked, vae.image_size, vae.config.channels, binarised_of(found.subject, vae))
    if isinstance(test, Shown):
        with torch.no_grad():
            measured = reconstruct_images(
                test,
                lambda images: (vae.encode(images.to(pipeline.device)),),
                lambda z: pipeline.decode(z[0]),
                asked.batch_size,
                sets.class_names,
            )
        found.reconstructions = measured.figures
        found.speeds += speeds_of(measured)
        found.latents = latents.latents_of(pipeline, test, asked.seed, asked.batch_size, likelihood_note(vae, sets))
    else:
        found.reconstructions = found.latents = test
    if not asked.samples:
        found.samples = Missing("No samples were asked for: leave --samples 0 out.")
        found.memorisation = Missing("It is asked of samples, and none were asked for: leave --samples 0 out.")
        return
    found.samples = latents.draw(pipeline, asked.seed, asked.samples, asked.batch_size)
    found.speeds.append(("Samples, per second, here", number(found.samples.speed)))
    if sets.training is not None:
        found.memorisation = memorisation.by_pixels(
            found.samples.images, sets.training, sets.training_title, held_out_of(sets, test)
        )
    else:
        found.memorisation = Missing("Name the run in place of its model: it records where its training images are.")


def likelihood_note(vae: LikelihoodVAE, sets: Sets) -> str:
    """What a person should know of a likelihood of such images; empty where it is one."""
    if vae.config.likelihood.kind == "bernoulli" and not sets.binarised:
        return "grey images under a likelihood of black and white: the ELBO is none"
    return ""
