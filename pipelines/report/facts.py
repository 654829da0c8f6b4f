"""What the summary says of a subject, and how fast all of it was."""

from __future__ import annotations

from collections.abc import Sequence

from common.model_io import PretrainedModel
from common.wording import counted
from pipelines.report import codebook
from pipelines.report.charts import number
from pipelines.report.collect import Run, Subject, is_number
from pipelines.report.findings import Findings, Missing
from pipelines.report.reconstructions import Measured
from training.metrics_log import duration


def facts_of(found: Findings) -> list[tuple[str, str]]:
    """Names and values for the summary."""
    subject, models = found.subject, found.models
    facts = [("What", subject.what), ("Where", ", ".join([subject.given, *subject.given_parts]))]
    if models.autoencoder is not None or models.prior is not None:
        kinds = [one.kind for one in (models.autoencoder, models.prior) if one is not None]
        facts.append(("Kind", " + ".join(kinds)))
        spec = models.autoencoder.code_spec() if models.autoencoder else models.prior.code_spec  # type: ignore[union-attr]
        facts.append(("Codes of an image", f"{spec.describe()}, {number(round(spec.bits_per_image))} bits"))
    if models.vae is not None:
        vae = models.vae.vae
        shape = "x".join(map(str, vae.shape))
        facts.append(("Kind", f"VAE: {vae.family()}"))
        facts.append(
            ("Latents of an image", f"{shape} for {vae.image_size[0]}x{vae.image_size[1]}x{vae.config.channels}")
        )
    facts += [(f"Weights of the {name}", f"{weights_of(part):,}") for name, part in models.parts.items()]
    if not isinstance(found.reconstructions, Missing):
        of = f"{counted(found.reconstructions.images, 'image')}"
        facts.append(("PSNR", f"{found.reconstructions.psnr:.2f} dB over {of}"))
        if found.reconstructions.ssim is not None:
            facts.append(("SSIM", f"{found.reconstructions.ssim:.4f} over {of}"))
    if not isinstance(found.latents, Missing):
        facts.append(("ELBO", f"{found.latents.elbo:.2f} ± {found.latents.elbo_error:.2f} nats"))
        facts.append(("Active units", f"{found.latents.active} of {found.latents.numbers}"))
    if not isinstance(found.usage, Missing):
        facts += [
            (
                f"Codes in use{of_grid(use, found.usage)}",
                f"{use.used} of {use.grid.vocabulary} over {counted(use.images, 'image')}",
            )
            for use in found.usage
        ]
    for run in subject.runs:
        facts.append((f"Steps, {run.stage}", steps_of(run)))
        if (bits := run.last("bits_per_code")) is not None:
            facts.append(("Held-out bits per code, logged", f"{bits:.3f}"))
    facts += [(f"Fingerprint of the {name}", part.fingerprint()[:16]) for name, part in models.parts.items()]
    return facts


def steps_of(run: Run) -> str:
    """`900 of 1,500`, or as many as are known where the config does not say how many there are to be."""
    train = run.config.get("train")
    planned = train.get("steps") if isinstance(train, dict) else None
    return f"{run.last_step:,} of {planned:,}" if isinstance(planned, int) else f"{run.last_step:,}"


def weights_of(model: PretrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


def of_grid(use: codebook.GridUse, uses: Sequence[codebook.GridUse]) -> str:
    return f", {use.grid.name}" if len(uses) > 1 else ""


def training_speeds(subject: Subject) -> list[tuple[str, str]]:
    """What the clock said of the trainings, from their last line."""
    found = []
    for run in subject.runs:
        line = run.timing[-1] if run.timing else {}
        seconds, images, training, waiting = (
            float(line[name]) if is_number(line.get(name)) else 0.0
            for name in ("seconds", "images", "training_seconds", "waiting_seconds")
        )
        if seconds > 0 and training > 0:
            found.append((f"Training of {run.stage}", f"{duration(seconds)}, {number(images)} samples"))
            found.append((f"Training samples per second, {run.stage}", number(images / training)))
            found.append((f"Waiting for data, {run.stage}", f"{waiting / training:.1%} of the training time"))
    return found


def speeds_of(measured: Measured) -> list[tuple[str, str]]:
    return [
        ("Encoding, images per second, here", number(measured.encode_speed)),
        ("Decoding, images per second, here", number(measured.decode_speed)),
    ]
