"""Priors by kind: a new prior is a new file here and a line in this table."""

from __future__ import annotations

from stage2_prior.priors.base import AutoregressivePrior, Prior
from stage2_prior.priors.diffusion import Diffusion, DiffusionConfig
from stage2_prior.priors.halton_maskgit import HaltonMaskGIT, HaltonMaskGITConfig
from stage2_prior.priors.hierarchical import Hierarchical, HierarchicalConfig
from stage2_prior.priors.ibq_gpt import IBQGPT, IBQGPTConfig
from stage2_prior.priors.infinity import Infinity
from stage2_prior.priors.infinity_layers import InfinityConfig
from stage2_prior.priors.llamagen import LlamaGen, LlamaGenConfig
from stage2_prior.priors.masked import MaskedPrior
from stage2_prior.priors.maskgit import MaskGIT, MaskGITConfig
from stage2_prior.priors.mdm_prime import MDMPrime, MDMPrimeConfig
from stage2_prior.priors.mingpt import MinGPT, MinGPTConfig
from stage2_prior.priors.open_magvit2_gpt import OpenMAGVIT2GPT, OpenMAGVIT2GPTConfig
from stage2_prior.priors.pixelcnn import PixelCNN, PixelCNNConfig
from stage2_prior.priors.pixelsnail import PixelSNAIL, PixelSNAILConfig
from stage2_prior.priors.randar import RandAR, RandARConfig
from stage2_prior.priors.rar import RAR, RARConfig
from stage2_prior.priors.rq_transformer import RQTransformer, RQTransformerConfig
from stage2_prior.priors.titok_maskgit import TiTokMaskGIT, TiTokMaskGITConfig
from stage2_prior.priors.transformer import Transformer
from stage2_prior.priors.transformer_layers import TransformerConfig
from stage2_prior.priors.var import VAR, VARConfig

PRIORS: dict[str, type[Prior]] = {
    "transformer": Transformer,
    "pixelcnn": PixelCNN,
    "pixelsnail": PixelSNAIL,
    "mingpt": MinGPT,
    "llamagen": LlamaGen,
    "rar": RAR,
    "randar": RandAR,
    "ibq_gpt": IBQGPT,
    "open_magvit2_gpt": OpenMAGVIT2GPT,
    "rq_transformer": RQTransformer,
    "var": VAR,
    "infinity": Infinity,
    "hierarchical": Hierarchical,
    "maskgit": MaskGIT,
    "diffusion": Diffusion,
    "mdm_prime": MDMPrime,
    "halton_maskgit": HaltonMaskGIT,
    "titok_maskgit": TiTokMaskGIT,
}
PriorConfig = (
    TransformerConfig
    | PixelCNNConfig
    | PixelSNAILConfig
    | MinGPTConfig
    | LlamaGenConfig
    | RARConfig
    | RandARConfig
    | IBQGPTConfig
    | OpenMAGVIT2GPTConfig
    | RQTransformerConfig
    | VARConfig
    | InfinityConfig
    | HierarchicalConfig
    | MaskGITConfig
    | DiffusionConfig
    | MDMPrimeConfig
    | HaltonMaskGITConfig
    | TiTokMaskGITConfig
)

__all__ = [
    "IBQGPT",
    "PRIORS",
    "RAR",
    "VAR",
    "AutoregressivePrior",
    "Diffusion",
    "DiffusionConfig",
    "HaltonMaskGIT",
    "HaltonMaskGITConfig",
    "Hierarchical",
    "HierarchicalConfig",
    "IBQGPTConfig",
    "Infinity",
    "InfinityConfig",
    "LlamaGen",
    "LlamaGenConfig",
    "MDMPrime",
    "MDMPrimeConfig",
    "MaskGIT",
    "MaskGITConfig",
    "MaskedPrior",
    "MinGPT",
    "MinGPTConfig",
    "OpenMAGVIT2GPT",
    "OpenMAGVIT2GPTConfig",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelSNAIL",
    "PixelSNAILConfig",
    "Prior",
    "PriorConfig",
    "RARConfig",
    "RQTransformer",
    "RQTransformerConfig",
    "RandAR",
    "RandARConfig",
    "TiTokMaskGIT",
    "TiTokMaskGITConfig",
    "Transformer",
    "TransformerConfig",
    "VARConfig",
]
