"""Autoencoders by the `kind` of their config and of their model folder."""

from __future__ import annotations

from stage1_vq.autoencoders.base import Autoencoder, Stage1Output
from stage1_vq.autoencoders.dvae import DVAE, DVAEConfig
from stage1_vq.autoencoders.flextok import FlexTok, FlexTokConfig
from stage1_vq.autoencoders.flow_decoder import FlowDecoder, FlowDecoderConfig
from stage1_vq.autoencoders.infinity import InfinityTokenizer, InfinityTokenizerConfig
from stage1_vq.autoencoders.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from stage1_vq.autoencoders.open_magvit2 import OpenMAGVIT2, OpenMAGVIT2Config
from stage1_vq.autoencoders.tatitok import TATiTok, TATiTokConfig
from stage1_vq.autoencoders.titok import TiTok, TiTokConfig
from stage1_vq.autoencoders.titok_two_stage import TwoStageTiTok, TwoStageTiTokConfig
from stage1_vq.autoencoders.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from stage1_vq.autoencoders.vqgan import VQGAN, VQGANConfig
from stage1_vq.autoencoders.vqvae import VQVAE, VQVAEConfig
from stage1_vq.autoencoders.vqvae2 import VQVAE2, VQVAE2Config

AutoencoderConfig = (
    VQVAEConfig
    | VQGANConfig
    | VQVAE2Config
    | DVAEConfig
    | ViTVQGANConfig
    | TiTokConfig
    | MaskGITVQGANConfig
    | OpenMAGVIT2Config
    | TwoStageTiTokConfig
    | TATiTokConfig
    | FlowDecoderConfig
    | InfinityTokenizerConfig
    | FlexTokConfig
)

AUTOENCODERS: dict[str, type[Autoencoder]] = {
    "vqvae": VQVAE,
    "vqvae2": VQVAE2,
    "vqgan": VQGAN,
    "dvae": DVAE,
    "vit_vqgan": ViTVQGAN,
    "titok": TiTok,
    "maskgit_vqgan": MaskGITVQGAN,
    "open_magvit2": OpenMAGVIT2,
    "titok_two_stage": TwoStageTiTok,
    "tatitok": TATiTok,
    "flow_decoder": FlowDecoder,
    "infinity_tokenizer": InfinityTokenizer,
    "flextok": FlexTok,
}

__all__ = [
    "AUTOENCODERS",
    "DVAE",
    "VQGAN",
    "VQVAE",
    "VQVAE2",
    "Autoencoder",
    "AutoencoderConfig",
    "DVAEConfig",
    "FlexTok",
    "FlexTokConfig",
    "FlowDecoder",
    "FlowDecoderConfig",
    "InfinityTokenizer",
    "InfinityTokenizerConfig",
    "MaskGITVQGAN",
    "MaskGITVQGANConfig",
    "OpenMAGVIT2",
    "OpenMAGVIT2Config",
    "Stage1Output",
    "TATiTok",
    "TATiTokConfig",
    "TiTok",
    "TiTokConfig",
    "TwoStageTiTok",
    "TwoStageTiTokConfig",
    "VQGANConfig",
    "VQVAE2Config",
    "VQVAEConfig",
    "ViTVQGAN",
    "ViTVQGANConfig",
]
