"""Reading what other projects published: weights without running code from the file, and their configs."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from common.errors import UserError
from common.files import foreign_content
from common.packed_files import check_if_packed
from common.safe_yaml import load_yaml
from common.tensor_files import load_tensors


class Loader(yaml.SafeLoader):
    """YAML in which 1e-5 and 1.0e5 are numbers, as JSON has them, YAML 1.2 and OmegaConf, which these configs are made
    for; to PyYAML they are text (findings/omegaconf_reads_numbers_where_pyyaml_has_text.sh)."""


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


class StandIn:
    """What stands in a loaded file for the class of a training tool, which is only named there and never used."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class StoredArguments(StandIn):
    """What stands in a loaded file for a command line, argparse's Namespace: its values by their names, of which the
    plain ones are kept."""

    values: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.values = {str(name): value for name, value in state.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    return all(map(is_plain, value)) if type(value) in (list, tuple) else type(value) in PLAIN


PLAIN = (bool, int, float, str, type(None))

# PyTorch Lightning keys the state of its callbacks by their classes; training scripts store paths, and NumPy's numbers
# and arrays, such as the best loss.
TOOLS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    *(f"pathlib.{kind}Path" for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")),
    *(f"numpy.{core}.multiarray.{kind}" for core in ("core", "_core") for kind in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
)
STAND_INS: list[Any] = [(StoredArguments, "argparse.Namespace"), *((StandIn, name) for name in TOOLS)]
Arguments = Mapping[str, Any]  # of the original's constructor, by their names there


def read_weights(path: Path, places: Sequence[str] = ()) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU.

    places: where in the file they may lie, such as `state_dict` or `trainer.vae_local`, the best first; when none is
    there the file itself must be a state dict. Raises UserError.
    """
    return weights_in(read_tensors(path), path, places)


def read_weights_and_arguments(
    path: Path, places: Sequence[str], arguments: str
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """`read_weights`, and of the same file the plain values of a command line that is stored at the place `arguments`,
    by their names; None where there is none."""
    content = read_tensors(path)
    stored = look_up(content, arguments)
    said = dict(stored.values) if isinstance(stored, StoredArguments) else None
    return weights_in(content, path, places), said


def weights_in(content: Any, path: Path, places: Sequence[str]) -> dict[str, Tensor]:
    """Of what the file holds."""
    for place in places:
        if isinstance(found := look_up(content, place), Mapping):
            content = found
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds a {type(content).__name__}, expected named tensors; give the project's own file")
    others = [f"{name!r} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{path} holds {first_few(others)} where only tensors are expected"
            f"{f', and nothing under {quoted(places)}' if places else ''}; is it of another --kind?"
        )
    return unwrapped(content)


def read_tensors(path: Path) -> Any:
    """What a .safetensors file, or a .pt, .pth, .ckpt or .bin file without foreign classes, holds. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the file with the weights")
    check_if_packed(path)
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # of the disk, not of what the file holds
    except Exception as error:  # on bytes that are no pickle the unpickler trips over anything
        if (reason := foreign_content(path)) is not None:
            raise UserError(f"{path} {reason}") from error
        if isinstance(error, pickle.UnpicklingError):
            raise refusal(path, error) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is no file of weights, or damaged ({reason}): download it again") from error


def refusal(path: Path, error: pickle.UnpicklingError) -> UserError:
    """Of a file that the unpickler does not take."""
    found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    if found is None:
        return UserError(f"{path} is no file of weights, or damaged: download it again")
    return UserError(
        f"{path} contains {found[1]}: to load it would run code from the file, so it is refused; open it once "
        "where it was made, and save the state dict alone, best as .safetensors"
    )


def look_up(content: Any, place: str) -> Any:
    """content["a"]["b"] for the place `a.b`, or None."""
    for name in place.split("."):
        if not isinstance(content, Mapping) or name not in content:
            return None
        content = content[name]
    return content


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers have put into the names: torch.compile, of the whole model or a part, and data parallelism
    and torch's weight averaging (which counts its updates beside the model) before every name."""
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    wrapped = {name: tensor for name, tensor in weights.items() if name != "n_averaged"}
    if wrapped and all(name.startswith("module.") for name in wrapped):
        return unwrapped({name.removeprefix("module."): tensor for name, tensor in wrapped.items()})
    return weights


def read_original_config(path: Path) -> dict[str, Any]:
    """Constructor arguments from a YAML or JSON file: at its top, or under `model.params`, `model.init_args` (of
    Lightning's command line) or `params`, where the projects that build classes by name have them. Raises UserError."""
    try:
        config = load_yaml(path.read_text(encoding="utf-8"), Loader)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"there is no file {path}; give the original's config, YAML or JSON") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    for place in ("model.params", "model.init_args", "params"):
        if isinstance(found := look_up(config, place), Mapping):
            config = found
            break
    if not isinstance(config, Mapping):
        raise UserError(f"{path} holds a {type(config).__name__}, expected the constructor arguments by name")
    return dict(config)


def given(arguments: Arguments, names: Mapping[str, str]) -> dict[str, Any]:
    """Those of our fields that the original's arguments tell: `names` maps a field to the argument's name. Lists become
    tuples, and an argument that is None counts as not given."""
    values = {field: arguments.get(name) for field, name in names.items()}
    return {
        field: tuple(value) if isinstance(value, list) else value
        for field, value in values.items()
        if value is not None
    }


def refuse(arguments: Arguments, supported: Mapping[str, Any]) -> None:
    """Raises UserError for an argument with which the original is another network than ours."""
    for name, value in supported.items():
        if name in arguments and arguments[name] not in (value, None):
            raise UserError(f"the original's {name}={arguments[name]!r} is not supported: expected {value!r}")


@contextmanager
def refusing_others(kind: str) -> Iterator[None]:
    """What builds a model out of weights of `kind` reads its sizes off their shapes, and trips over those of anything
    else. Raises UserError instead."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the weights, or what --config says of them, are not those of --kind {kind}, or they are damaged "
            f"({type(error).__name__}: {reason}); check --kind and --config, or download them again"
        ) from error


def first_few(items: Sequence[str], count: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def quoted(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
