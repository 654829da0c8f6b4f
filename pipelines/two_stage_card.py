"""What the model card of a two-stage pipeline says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from PIL import Image

from common.wording import an, counted
from pipelines.model_card import CardTraits, Use
from stage1_vq.autoencoders import Autoencoder
from stage2_prior.priors import Prior
from stage2_prior.sampling import SamplingConfig


def traits_of_stages(
    autoencoder: Autoencoder, prior: Prior, sampling: SamplingConfig, samples: Callable[[], Sequence[Image.Image]]
) -> CardTraits:
    """samples: pictures to show, drawn by the prior's classes alone."""
    defaults = asdict(SamplingConfig())
    asked = f" of {counted(prior.num_classes, 'class', 'classes')}" if prior.num_classes else ""
    use = Use()
    if prior.reads_prompts:
        asked, use = " from a text", Use('--num 4 --prompt "WHAT TO DRAW"', '4, prompts="WHAT TO DRAW"')
    elif prior.given:
        asked, use = " from other codes", Use("--num 4 --given CODES", "4, given=codes")
    # Nobody gives other codes here, nor a text to a prior that cannot do without.
    alone = not prior.given and (prior.knows_null_label or not prior.reads_prompts)
    return CardTraits(
        what=f"A two-stage generator of images{asked}: {an(prior.kind)} prior draws the codes that a "
        f"{autoencoder.kind} autoencoder turns into pixels.",
        task="text-to-image" if prior.reads_prompts else "unconditional-image-generation",
        class_names=prior.class_names or (),
        settings={name: value for name, value in asdict(sampling).items() if value != defaults[name]},
        samples=samples if alone else None,
        use=use,
    )
