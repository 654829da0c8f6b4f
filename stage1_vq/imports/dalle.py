"""The published weights of DALL-E's dVAE (Ramesh et al. 2021, arXiv:2102.12092): encoder.pkl and decoder.pkl.

These files are whole pickled modules, and to unpickle a file is to let it call whatever it names. So they are read by
an unpickler that knows a fixed list of names: inert stand-ins for DALL-E's and PyTorch's module classes, which hold
what was stored and do nothing, and a few builders of plain data. Any other name is refused before anything is built.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from common.compatibility import is_torchscript, tensor_of_storage
from common.errors import UserError
from common.packed_files import check_if_packed
from common.renaming import Weights, load_renamed, renamed
from stage1_vq.autoencoders.dvae import DVAE, DVAEConfig
from stage1_vq.quantizers import GumbelQuantizerConfig

IMAGE_SIZE = (256, 256)  # of the published training

MODULE_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)

CODE_VECTORS = "decoder.code_vectors"  # k d: the decoder's first convolution with its bias
QUANTIZER_NAMES = {
    "quantizer.logits.weight": "encoder.blocks.output.conv.w",
    "quantizer.logits.bias": "encoder.blocks.output.conv.b",
    "quantizer.embedding.weight": CODE_VECTORS,
}


# ---- the files ------------------------------------------------------------------------------------------------------


class Inert(type):
    """A class that a pickle cannot change. BUILD sets attributes of whatever it is given: torch.load would write a file
    for a class with a `dump_patches`, and where its `__name__` says."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"it sets {name} of {cls.__name__}")


class StoredModule(metaclass=Inert):
    """What a pickled module held, under the names that nn.Module gives it; it cannot do anything."""

    dump_patches = False  # torch.load asks


class RebuiltTensor(metaclass=Inert):
    """In place of torch's function: a tensor without gradient and hooks."""

    def __new__(cls, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any) -> Any:
        return tensor_of_storage(storage, offset, size, stride)


class RebuiltParameter(metaclass=Inert):
    """In place of torch's function: the parameter's tensor."""

    def __new__(cls, data: Tensor, *unused: Any) -> Any:
        return data


# What a name in the file stands for. Storages are left out: torch.load knows their names itself.
ADMITTED: dict[str, Callable[..., Any]] = {
    **{name: Inert(name.rpartition(".")[2], (StoredModule,), {}) for name in MODULE_CLASSES},
    "torch._utils._rebuild_tensor_v2": RebuiltTensor,
    "torch._utils._rebuild_parameter": RebuiltParameter,
    "torch.device": torch.device,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,  # as pickle writes it for Python 2 to read
}


def read_dalle_pickle(path: str | Path) -> dict[str, Tensor]:
    """The weights, by their published names, of a module that torch.save pickled, in its present or its older format;
    a state dict is taken as well. Raises UserError for a file that is something else, or names anything but what
    DALL-E's modules are made of."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); download DALL-E's encoder.pkl and decoder.pkl and name them"
        ) from error
    check_if_packed(path)
    try:
        if is_torchscript(content):  # torch.load would run it
            raise UserError(f"{path} is a TorchScript program, expected DALL-E's encoder.pkl or decoder.pkl")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older format holds source code too, and torch.load misses ours
            # From memory: given a file, torch.load would also try a format of 2016, a tar archive.
            loaded = torch.load(
                io.BytesIO(content), map_location="cpu", pickle_module=restricted_pickle(path), weights_only=False
            )
        return stored_weights(loaded)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as DALL-E's encoder.pkl or decoder.pkl ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); download it again"
        ) from error


def restricted_pickle(path: Path) -> Any:
    """What torch.load needs of Python's pickle module, for messages about this file."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            try:
                return ADMITTED[f"{module}.{name}"]
            except KeyError:
                raise UserError(
                    f"{path} names {module}.{name}, which DALL-E's encoder.pkl and decoder.pkl do not: nothing of it "
                    "was built; such a file could run any program, take those that OpenAI published"
                ) from None

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__="restricted_pickle", Unpickler=Unpickler, load=load)


def stored_weights(loaded: Any) -> dict[str, Tensor]:
    """The tensors of a stored module and its submodules, or of a state dict, by name."""
    if isinstance(loaded, dict):
        weights = dict(loaded)
    elif isinstance(loaded, StoredModule):
        own, inner = vars(loaded)["_parameters"], vars(loaded)["_modules"]
        weights = {name: tensor for name, tensor in own.items() if tensor is not None}
        for prefix, module in inner.items():
            weights.update({f"{prefix}.{name}": tensor for name, tensor in stored_weights(module).items()})
    else:
        raise TypeError(f"it holds a {type(loaded).__name__}, expected a module")
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise TypeError("not all of its weights are tensors")
    return weights


# ---- the model ------------------------------------------------------------------------------------------------------


def import_dalle(encoder: Weights, decoder: Weights) -> DVAE:
    """The dVAE of these weights, under their published names; its size is read off their shapes. Raises UserError when
    they are not those of one dVAE.

    The published decoder's first layer is a convolution of one-hot codes: its columns, each with the bias added, are
    the quantizer's code vectors.
    """
    model = DVAE(config_of(encoder, decoder), IMAGE_SIZE)
    weights = {
        **{f"encoder.{name}": tensor for name, tensor in encoder.items()},
        **{f"decoder.{name}": tensor for name, tensor in decoder.items()},
    }
    columns, bias = weights.pop("decoder.blocks.input.w"), weights.pop("decoder.blocks.input.b")
    weights[CODE_VECTORS] = rearrange(columns, "d k 1 1 -> k d") + bias
    load_renamed(model, weights, published_name)
    return model.eval()


def config_of(encoder: Weights, decoder: Weights) -> DVAEConfig:
    for part, weights, needed in (
        ("encoder", encoder, ("blocks.input.w", "blocks.output.conv.w")),
        ("decoder", decoder, ("blocks.input.w", "blocks.input.b")),
    ):
        if missing := [name for name in needed if name not in weights]:
            raise UserError(
                f"the {part} has no {' and no '.join(missing)}, which DALL-E's has; give encoder.pkl and decoder.pkl, "
                "each in its place"
            )
    places = [match for name in encoder if (match := re.match(r"blocks\.group_(\d+)\.block_(\d+)\.", name))]
    width, channels = encoder["blocks.input.w"].shape[:2]
    codebook_size, dim = encoder["blocks.output.conv.w"].shape[:2]
    embedding_dim, decoder_codes = decoder["blocks.input.w"].shape[:2]
    if codebook_size != decoder_codes:
        raise UserError(
            f"the encoder tells of {codebook_size} codes and the decoder of {decoder_codes}; give the encoder.pkl and "
            "decoder.pkl of one model, each in its place"
        )
    return DVAEConfig(
        channels=channels,
        width=width,
        groups=max((int(place[1]) for place in places), default=0),
        blocks=max((int(place[2]) for place in places), default=0),
        quantizer=GumbelQuantizerConfig(codebook_size=codebook_size, dim=dim, embedding_dim=embedding_dim),
    )


def published_name(name: str) -> str | None:
    """Of a weight of ours, after `encoder.` or `decoder.`: `decoder.blocks.group_2.block_1.res_path.conv_3.w`."""
    if name.startswith("quantizer."):
        return QUANTIZER_NAMES.get(name)
    return renamed(
        name,
        {
            r"^(encoder|decoder)\.": r"\1.blocks.",
            r"\.groups\.(\d+)\.(\d+)\.": lambda match: f".group_{int(match[1]) + 1}.block_{int(match[2]) + 1}.",
            r"\.convolutions\.(\d)\.": lambda match: f".res_path.conv_{int(match[1]) + 1}.",
            r"\.skip\.": ".id_path.",
            r"\.output\.": ".output.conv.",
            r"\.weight$": ".w",
            r"\.bias$": ".b",
        },
    )
