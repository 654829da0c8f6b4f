"""The MaskGIT generators of TiTok (Yu et al. 2024, arXiv:2406.07550): on BERT for L-32 and B-64, a U-ViT for S-128."""

from __future__ import annotations

from itertools import count, takewhile

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.foreign_weights import Arguments
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import FirstStage, check_vocabulary, heads_of
from stage2_prior.priors.titok_maskgit import TiTokMaskGIT, TiTokMaskGITConfig

HEADS = {(24, 768): 16, (20, 1024): 16}  # of the published models, by layers and width
IMAGE_SIZE = 256  # pixels, of the published models
IGNORED = r".*position_ids$"  # of files by old versions of transformers
NAMES = {
    "bert": {
        r"^embedding\.": "model.embeddings.word_embeddings.",
        r"^places$": "model.embeddings.position_embeddings.weight",
        r"^network\.norm\.": "model.embeddings.LayerNorm.",
        r"^network\.blocks\.": "model.encoder.layer.",
        r"\.q\.": ".attention.self.query.",
        r"\.k\.": ".attention.self.key.",
        r"\.v\.": ".attention.self.value.",
        r"\.out\.": ".attention.output.dense.",
        r"\.attention_norm\.": ".attention.output.LayerNorm.",
        r"\.up\.": ".intermediate.dense.",
        r"\.down\.": ".output.dense.",
        r"\.feed_forward_norm\.": ".output.LayerNorm.",
        r"^output\.(?=weight|bias)": "model.lm_head.",
    },
    "uvit": {
        r"^embedding\.": "embeddings.",
        r"^places$": "pos_embed",
        r"^network\.down\.(\d+)\.": r"in_blocks.\1.",
        r"^network\.middle\.": "mid_block.",
        r"^network\.up\.(\d+)\.": r"out_blocks.\1.",
        r"^network\.norm\.": "norm.",
        r"\.skip\.": ".skip_linear.",
        r"\.attention_norm\.": ".norm1.",
        r"\.feed_forward_norm\.": ".norm2.",
        r"\.qkv\.": ".attn.qkv.",
        r"\.out\.": ".attn.proj.",
        r"\.up\.": ".mlp.fc1.",
        r"\.down\.": ".mlp.fc2.",
        r"^output\.": "lm_head.",
    },
}


def build_titok_maskgit(
    weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None
) -> TiTokMaskGIT:
    """weights: the file itself; config: the original's, whose `model.generator` has what no shape tells, the number of
    heads. Raises UserError."""
    model = (config or {}).get("model", config or {})
    arguments: Arguments = model.get("generator", model)
    network = "uvit" if "pos_embed" in weights else "bert"
    names = NAMES[network]
    word, place, head = (renamed(name, names) for name in ("embedding.weight", "places", "output.weight"))
    for name in (word, place, head):
        if name not in weights:
            raise UserError(f"the weights have no {name}: they are not those of a MaskGIT generator of TiTok")
    (rows, width), vocabulary = weights[word].shape, len(weights[head])
    places, first = weights[place].shape[-2] - 1, renamed("network.blocks.0.up.weight", names)
    if network == "bert":
        layers = blocks_of(weights, "model.encoder.layer.{}.output.dense.weight")
    else:
        layers, first = 2 * blocks_of(weights, "in_blocks.{}.mlp.fc1.weight"), "mid_block.mlp.fc1.weight"
    classes = rows - vocabulary - 2
    told_by_shapes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "image_seq_len": places,
        "condition_num_classes": classes,
    }
    if network == "uvit" and arguments.get("num_hidden_layers") == layers + 1:
        told_by_shapes["num_hidden_layers"] = layers + 1  # it halves an odd number, too
    for name, value in told_by_shapes.items():
        if arguments.get(name, value) != value:
            raise UserError(
                f"the config has {name}={arguments[name]}, but the weights are of a model with {name}={value}; give "
                "the config of this model, or none"
            )
    stage1 = stage1 or FirstStage(CodeSpec((Grid("tokens", 1, places, vocabulary),), IMAGE_SIZE, IMAGE_SIZE))
    grid = stage1.only_grid()
    check_vocabulary(grid, vocabulary)
    if (grid.size, grid.vocabulary) != (places, vocabulary):
        raise UserError(
            f"the weights are of a prior of {places} codes of {vocabulary}, but the first stage makes "
            f"{stage1.code_spec.describe()}; give --stage1 the tokenizer that it was trained with"
        )
    prior = TiTokMaskGIT(
        TiTokMaskGITConfig(
            network="uvit" if network == "uvit" else "bert",
            layers=layers,
            width=width,
            heads=heads_of({"n_head": arguments.get("num_attention_heads")}, layers, width, HEADS),
            hidden_width=len(weights[first]),
        ),
        stage1.code_spec,
        classes,
        stage1_fingerprint=stage1.fingerprint,
    )
    load_renamed(prior, as_here(weights, network), lambda key: renamed(key, names), IGNORED)
    return prior.eval()


def blocks_of(weights: Weights, name: str) -> int:
    return len(list(takewhile(lambda number: name.format(number) in weights, count())))


def as_here(weights: Weights, network: str) -> Weights:
    """Positions without an axis of one; BERT's with the row of the only token type added, which every place has."""
    if network == "uvit":
        return {**weights, "pos_embed": weights["pos_embed"][0]}
    name, kinds = "model.embeddings.position_embeddings.weight", "model.embeddings.token_type_embeddings.weight"
    return {key: tensor for key, tensor in weights.items() if key != kinds} | {
        name: weights[name] + weights[kinds][0] if kinds in weights else weights[name]
    }
