"""Model folders: `config.json` with kind and constructor arguments, and `model.safetensors`. Never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_folder, check_replaceable, foreign_content, read_json, sha256_of_file
from common.hub import download_from_hub
from common.model_size import no_larger_than
from common.processes import usable_device
from common.short_repr import weights_of
from common.tensor_files import load_tensors, save_tensors
from common.wording import an

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
RECORDS = "records"  # of config.json: the SHA-256 of each further file that is no part of the fingerprint
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # that a model can be in


class PretrainedModel(nn.Module):
    """An nn.Module that a folder can hold: `kind` names its class, `arguments()` rebuilds it."""

    kind: ClassVar[str]
    recompute: ClassVar = "parts"  # of a model inside a model too: its blocks are recomputed, not it as one

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON values: `from_arguments(**arguments())` builds the same architecture."""
        raise NotImplementedError

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Self:
        """The model that `arguments()` describes, with fresh weights."""
        raise NotImplementedError

    def traits(self) -> list[str]:
        """Phrases on what the model is, for `repr`."""
        return []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([*self.traits(), weights_of(self)])})"

    def documents(self) -> dict[str, str]:
        """Further text files of the model folder, content by name: what a model needs to be used, such as its
        tokenizer."""
        return {}

    def records(self) -> dict[str, Mapping[str, Tensor]]:
        """Further files of the model folder, tensors by their names: what is known of how the model was made. Unlike
        documents they are no part of what it is, and of its fingerprint."""
        return {}

    def fitted(self, name: str, weight: Tensor, fresh: Tensor, other: Self) -> Tensor | None:
        """What this model takes for its own tensor `name`, which is `fresh`, where it starts from `other`, a model of
        its kind that has `weight` under that name: `weight` itself, another tensor of the shape of `fresh`, or None for
        nothing."""
        return weight if weight.shape == fresh.shape else None

    def read_documents(self, folder: Path) -> None:
        """Takes back from a model folder what `documents` and `records` gave it. Raises UserError."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the model folder atomically and returns its path. Raises UserError if `folder` is something else."""
        folder = Path(folder)
        check_replaceable(folder, CONFIG_NAME)
        description: dict[str, Any] = {
            "kind": self.kind,
            "zellige_version": version("zellige"),
            "arguments": self.arguments(),
            "fingerprint": self.fingerprint(),  # by which a byte that flips on a disk is noticed
        }
        with atomic_folder(folder) as temporary:
            save_tensors(self.state_dict(), temporary / WEIGHTS_NAME)
            for name, content in self.documents().items():
                (temporary / name).write_text(content, encoding="utf-8")
            for name, tensors in self.records().items():
                save_tensors(tensors, temporary / name)
                description[RECORDS] = {**description.get(RECORDS, {}), name: sha256_of_file(temporary / name)}
            (temporary / CONFIG_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """The model of a local folder or a Hugging Face hub id, in eval mode. Arguments and errors: those of
        `load_pretrained`."""
        return load_pretrained(folder_or_hub_id, {cls.kind: cls}, device=device, dtype=dtype, revision=revision)

    def fingerprint(self) -> str:
        """SHA-256 over kind, arguments, documents and weights: equal for equal models, whatever file or device holds
        them. Of the arguments only those count that are not their defaults, so that a later version, which has more of
        them, knows the models of an earlier one."""
        said = {name: value for name, value in self.arguments().items() if value not in (None, [])}
        config: Any = getattr(self, "config", None)
        if is_dataclass(config):
            said["config"] = said_by(config)
        digest = hashlib.sha256(json.dumps([self.kind, said], sort_keys=True).encode())
        for name, content in sorted(self.documents().items()):
            digest.update(f"{name} {content}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            array = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def said_by(config: Any) -> dict[str, Any]:
    """The fields of a config that are not their defaults, those of configs inside it alike, and its `kind`."""
    said = {}
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if is_dataclass(value):
            said[field.name] = said_by(value)
        elif field.name == "kind" or value != default:
            said[field.name] = value
    return said


Model = TypeVar("Model", bound=PretrainedModel)


def load_pretrained(
    folder_or_hub_id: str | Path,
    kinds: Mapping[str, type[Model]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Model:
    """The model of a folder, its class picked from `kinds` by the folder's "kind", in eval mode.

    A run folder stands for the model inside it. Each weight has the type that the file holds it in, so that a model in
    bfloat16 comes back as it was saved; dtype: another floating type that the weights are cast to, as far as the model
    allows (a quantizer stays in float32). revision: branch, tag or commit of a repository of the hub. Raises UserError
    for a missing folder, an unknown kind, damaged weights, weights that do not fit the config, anything else than what
    was saved (folders of earlier versions do not tell), a device that is not there, a type that models do not compute
    in, and a revision of a local folder.
    """
    check_type(dtype)
    folder = model_folder(folder_or_hub_id, revision=revision)
    description = read_json(folder / CONFIG_NAME)
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{folder} holds a model of kind {kind!r}, expected one of: {', '.join(sorted(kinds))}")
    try:
        weights = load_tensors(folder / WEIGHTS_NAME)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {WEIGHTS_NAME}: its weights are missing; copy or train the model again"
        ) from error
    except (SafetensorError, OSError) as error:
        if (reason := foreign_content(folder / WEIGHTS_NAME)) is not None:
            raise UserError(f"{folder / WEIGHTS_NAME} {reason}") from error
        raise UserError(
            f"{folder / WEIGHTS_NAME} is damaged ({error}); copy it again from where it came, or take the model "
            "from an earlier checkpoint of its run"
        ) from error
    try:
        with no_larger_than(weights):
            model = kinds[kind].from_arguments(**description["arguments"])
        take_types(model, weights)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder} cannot be read as {an(kind)} model by this version: {' '.join(str(error).split())}; "
            f"it was written by zellige "
            f"{description.get('zellige_version', 'of unknown version')}: use that one, or copy the folder again if it "
            "is damaged"
        ) from error
    check_records(folder, description)
    model.read_documents(folder)
    if (recorded := description.get("fingerprint")) is not None and recorded != model.fingerprint():
        raise UserError(
            f"{folder} is damaged: {WEIGHTS_NAME}, {CONFIG_NAME} or a document beside them is not what was saved; copy "
            "the folder again from where it came, or take the model from an earlier checkpoint of its run; if you "
            f"edited it yourself, delete fingerprint from {folder / CONFIG_NAME}"
        )
    return model.eval().to(device=usable_device(device), dtype=dtype)


def check_records(folder: Path, description: Mapping[str, Any]) -> None:
    """Raises UserError for a file beside the model that is not what was saved; one that somebody took away may be."""
    for name, digest in dict(description.get(RECORDS, {})).items():
        if (folder / name).is_file() and sha256_of_file(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged: its checksum is not that of {CONFIG_NAME}; copy it again from where it "
                "came, or delete it, and what it tells of the training is unknown"
            )


def check_type(dtype: torch.dtype | None) -> None:
    """Raises UserError for a type that models do not compute in."""
    if dtype is not None and dtype not in FLOATS:
        raise UserError(
            f"dtype={dtype}, expected one of {', '.join(map(str, FLOATS))}; leave it out for the model's own"
        )


def take_types(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Casts the model's floats, tied ones together, to the types that `weights` has under their names, as far as its
    modules allow: a quantizer stays in float32. Raises ValueError for types that nothing is computed in, and for whole
    numbers in the place of floats or the reverse, which loading would round."""
    state = model.state_dict(keep_vars=True)
    changed: dict[int, torch.dtype] = {}  # by the identity of a tensor of `state`
    for name, tensor in state.items():
        found, is_float = weights[name].dtype if name in weights else tensor.dtype, tensor.is_floating_point()
        if found not in FLOATS if is_float else found.is_floating_point:
            expected = f"one of {', '.join(map(str, FLOATS))}" if is_float else str(tensor.dtype)
            raise ValueError(f"{name} is of {found}, expected {expected}")
        if is_float and found != tensor.dtype:
            changed[id(tensor)] = found
    if changed:
        model._apply(lambda tensor: tensor.to(changed.get(id(tensor), tensor.dtype)))


def in_type_of(network: nn.Module, x: Tensor) -> Tensor:
    """x in the type of the network's weights: images, code vectors and latents are float32, whatever a model was cast
    to."""
    return x.to(next(network.parameters()).dtype)


def weight_types(model: nn.Module) -> dict[str, torch.dtype]:
    """The type of everything that a model saves, by name: another after a cast, the same after training."""
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def model_folder(
    folder_or_hub_id: str | Path,
    *markers: str,
    advice: str = "name the folder that `zellige train-stage1` or `zellige train-stage2` wrote",
    revision: str | None = None,
) -> Path:
    """Local folder that holds one of the files `markers` (config.json), for a path (a run folder stands for its
    `model/`) or a hub id.

    A path below a folder that exists is taken for a local one, so that a typing error asks nothing of the
    hub. revision: branch, tag or commit there. Raises UserError, which ends in `advice`, and for a revision of a local
    folder.
    """
    path, name, markers = Path(folder_or_hub_id), str(folder_or_hub_id), markers or (CONFIG_NAME,)
    wanted = " or ".join(markers)

    def holds(folder: Path) -> bool:
        return any((folder / marker).is_file() for marker in markers)

    for folder in (path, path / "model"):
        if holds(folder):
            if revision is not None:
                raise UserError(
                    f"got revision={revision!r} for the local folder {folder}, expected none: only models of the hub "
                    "have revisions; leave it out, or give a hub id such as owner/name"
                )
            return folder
    if path.exists():
        raise UserError(f"{path} is not a model folder: it holds no {wanted}, nor does {path / 'model'}; {advice}")
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.parent.is_dir():
        raise UserError(f"there is no folder {path}; {advice}, or a hub id such as owner/name")
    folder = download_from_hub(name, revision)
    if not holds(folder):
        raise UserError(f"{name!r} on the hub is not a model of this kind: it holds no {wanted}; {advice}")
    return folder
