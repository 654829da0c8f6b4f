"""The priors of RandAR (Pang et al. 2024, arXiv:2412.01827), over the codes of LlamaGen's tokenizer."""

from __future__ import annotations

from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, first_few, given, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import FirstStage, check_vocabulary, heads_of
from stage2_prior.imports.llamagen import CLASSES, HEADS, NAMES, published_stage, with_gate_up
from stage2_prior.priors.llamagen import EPSILON, ROPE_BASE
from stage2_prior.priors.randar import RandAR, RandARConfig

INSTRUCTION = "pos_instruct_embeddings"
IGNORED = r"freqs_cis$"


def build_randar(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> RandAR:
    """weights: the file itself, or its `model`, `module` or `state_dict`; config: arguments of `RandARTransformer`.
    What they leave out the shapes tell, or else the published models. Raises UserError."""
    arguments = config or {}
    refuse(arguments, {"rope_base": ROPE_BASE, "norm_eps": EPSILON, "cls_token_num": 1, "model_type": "c2i"})
    needed = [INSTRUCTION, "tok_embeddings.weight", "layers.0.feed_forward.w1.weight", CLASSES]
    if missing := [name for name in needed if name not in weights]:
        raise UserError(f"the weights have no {first_few(missing)}: they are not those of RandAR's transformer")
    vocabulary, width = weights["tok_embeddings.weight"].shape
    layers = len(list(takewhile(lambda number: f"layers.{number}.attention.wo.weight" in weights, count())))
    stage1 = stage1 or published_stage(vocabulary, arguments)
    grid = stage1.only_grid()
    check_vocabulary(grid, vocabulary)
    if arguments.get("block_size", grid.size) != grid.size:
        raise UserError(
            f"the config has block_size={arguments['block_size']}, but the first stage makes "
            f"{stage1.code_spec.describe()}; import it anew with the --image_size of this prior"
        )
    prior = RandAR(
        RandARConfig(
            layers=layers,
            width=width,
            heads=heads_of(arguments, layers, width, HEADS),
            hidden_width=len(weights["layers.0.feed_forward.w1.weight"]),
            **given(arguments, {"dropout": "token_dropout_p", "residual_dropout": "resid_dropout_p"}),
        ),
        stage1.code_spec,
        len(weights[CLASSES]) - 1,
        stage1_fingerprint=stage1.fingerprint,
    )
    own = {**with_gate_up(weights), INSTRUCTION: weights[INSTRUCTION].flatten()}
    load_renamed(prior, own, lambda key: renamed(key, {r"^instruction$": INSTRUCTION, **NAMES}), IGNORED)
    return prior.eval()
