"""DALL-E's dVAE: the published outputs; its pickles are read, and no others."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from common.errors import UserError
from stage1_vq.autoencoders.dvae import DVAE, DVAEConfig
from stage1_vq.imports.dalle import CODE_VECTORS, import_dalle, published_name, read_dalle_pickle
from stage1_vq.quantizers import GumbelQuantizerConfig
from tests.golden import golden, real_shapes

# ---- the published outputs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported() -> DVAE:
    return import_dalle(golden("dalle_encoder").weights, golden("dalle_decoder").weights)


@torch.no_grad()
def test_the_encoder_gives_the_published_logits_and_codes(imported):
    reference = golden("dalle_encoder")
    logits = imported.quantizer.logits(imported.encoder(reference.outputs["x_mapped"]))
    torch.testing.assert_close(logits, reference.outputs["z_logits"], rtol=1e-5, atol=5e-5)
    (codes,) = imported.encode(2 * reference.inputs["x"] - 1)
    assert torch.equal(codes, reference.outputs["codes"])


@torch.no_grad()
def test_the_decoder_gives_the_published_statistics_and_images(imported):
    reference = golden("dalle_decoder")
    codes = (reference.inputs["codes"],)
    statistics = imported.decoder(imported.quantizer.codes_to_latents(codes))
    torch.testing.assert_close(statistics, reference.outputs["x_stats"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(imported.decode(codes), 2 * reference.outputs["x_rec"] - 1, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_a_mixture_of_codes_gives_the_published_statistics(imported):
    reference = golden("dalle_decoder")
    soft = reference.inputs["soft"]  # b k h w
    mixed = torch.einsum("bkhw,kd->bdhw", soft, imported.quantizer.embedding.weight)
    # The bias stands in each code vector: where the weights of a mixture do not sum to 1, some of it is missing.
    mixed += torch.einsum("bhw,d->bdhw", 1 - soft.sum(1), reference.weights["blocks.input.b"])
    torch.testing.assert_close(imported.decoder(mixed), reference.outputs["x_stats_soft"], rtol=1e-5, atol=1e-5)


def test_the_published_size_is_recognised_from_the_shapes():
    with torch.device("meta"):
        weights = [
            {name: torch.empty(shape) for name, shape in real_shapes(part).items()}
            for part in ("dalle_encoder", "dalle_decoder")
        ]
        model = import_dalle(*weights)
    assert model.config == DVAEConfig()
    assert model.code_spec().describe() == "32x32 codes of 8192 (256x256x3 images)"


# ---- a model of ours under the published names ----------------------------------------------------------------------


def tiny() -> DVAE:
    torch.manual_seed(0)
    quantizer = GumbelQuantizerConfig(codebook_size=24, dim=16, embedding_dim=5)
    return DVAE(DVAEConfig(width=8, groups=2, blocks=1, quantizer=quantizer), (16, 16)).eval()


def published_weights(model: DVAE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of encoder.pkl and of decoder.pkl."""
    names = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    bias = torch.randn(model.quantizer.dim_out)
    columns = (names.pop(CODE_VECTORS) - bias).t()[:, :, None, None]
    names.update({"decoder.blocks.input.w": columns, "decoder.blocks.input.b": bias})
    names.pop(None)
    encoder, decoder = (
        {name.removeprefix(part): tensor for name, tensor in names.items() if name.startswith(part)}
        for part in ("encoder.", "decoder.")
    )
    assert len(encoder) + len(decoder) == len(names)
    return encoder, decoder


@torch.no_grad()
def test_importing_undoes_exporting():
    model = tiny()
    imported = import_dalle(*published_weights(model))
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert torch.equal(imported.encode(images)[0], model.encode(images)[0])
    torch.testing.assert_close(imported.decode(model.encode(images)), model.decode(model.encode(images)))


def test_weights_that_are_not_of_one_model_are_refused():
    encoder, decoder = published_weights(tiny())
    with pytest.raises(UserError, match="the encoder tells of 6 codes and the decoder of 3"):
        import_dalle(decoder, encoder)
    with pytest.raises(UserError, match=r"the decoder has no blocks.input.w and no blocks.input.b, which DALL-E's has"):
        import_dalle(encoder, {"w": torch.zeros(1)})
    incomplete = {name: tensor for name, tensor in encoder.items() if "group_2.block_1.res_path.conv_3" not in name}
    with pytest.raises(UserError, match=r"missing: encoder.blocks.group_2.block_1.res_path.conv_3.w"):
        import_dalle(incomplete, decoder)
    with pytest.raises(UserError, match=r"wrong shapes: decoder.blocks.output.conv.w is 7x8x1x1, not 6x8x1x1"):
        import_dalle(encoder, {**decoder, "blocks.output.conv.w": torch.zeros(7, 8, 1, 1)})
    with pytest.raises(UserError, match=r"not expected: encoder.extra"):
        import_dalle({**encoder, "extra": torch.zeros(1)}, decoder)


# ---- pickles --------------------------------------------------------------------------------------------------------


class Conv2d(nn.Module):
    def __init__(self, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.use_float16, self.device = True, torch.device("cpu")


class EncoderBlock(nn.Module):
    pass


class Encoder(nn.Module):
    pass


PLACES = {Conv2d: "dall_e.utils", EncoderBlock: "dall_e.encoder", Encoder: "dall_e.encoder"}


@pytest.fixture
def dall_e(monkeypatch):
    """A package `dall_e` whose classes can be pickled, until the test is over."""
    for module_class, place in PLACES.items():
        monkeypatch.setattr(module_class, "__module__", place)
        module = sys.modules.get(place) or ModuleType(place)
        module.__file__ = __file__  # where the older format finds the source code that it stores
        setattr(module, module_class.__name__, module_class)
        monkeypatch.setitem(sys.modules, place, module)
    monkeypatch.setitem(sys.modules, "dall_e", ModuleType("dall_e"))


def as_modules(weights: dict[str, Tensor]) -> nn.Module:
    """Modules, as the original builds them, that hold these weights."""

    def build(prefix: str) -> nn.Module:
        if f"{prefix}w" in weights:
            return Conv2d(weights[f"{prefix}w"], weights[f"{prefix}b"])
        names = dict.fromkeys(name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix))
        children = OrderedDict((name, build(f"{prefix}{name}.")) for name in names)
        if not prefix:
            module: nn.Module = Encoder()
        elif "res_path" in children:
            module = EncoderBlock()
            children.setdefault("id_path", nn.Identity())
        else:
            return nn.Sequential(OrderedDict([*children.items(), ("relu", nn.ReLU()), ("pool", nn.MaxPool2d(2))]))
        for name, child in children.items():
            module.add_module(name, child)
        return module

    return build("")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pickled_module_is_read_without_its_classes(tmp_path, dall_e, zipped, monkeypatch):
    encoder, _ = published_weights(tiny())
    torch.save(as_modules(encoder), tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.split(".")[0] == "dall_e"]:
        monkeypatch.delitem(sys.modules, name)
    weights = read_dalle_pickle(tmp_path / "encoder.pkl")
    assert weights.keys() == encoder.keys()
    assert all(torch.equal(weights[name], encoder[name]) for name in encoder)


def test_a_state_dict_is_read_too(tmp_path):
    _, decoder = published_weights(tiny())
    torch.save(OrderedDict(decoder), tmp_path / "decoder.pkl")
    weights = read_dalle_pickle(tmp_path / "decoder.pkl")
    assert all(torch.equal(weights[name], decoder[name]) for name in decoder)


class Hostile:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, r"(posix|nt).system"), (eval, r"(builtins|__builtin__).eval"), (getattr, r"\w+.getattr")],
)
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path, zipped, function, name):
    marker = tmp_path / "marker"
    commands = {os.system: (f"touch {marker}",), eval: (f"open({str(marker)!r}, 'w')",), getattr: (1, "real")}
    content = {"blocks.input.w": Hostile(function, *commands[function])}
    torch.save(content, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"encoder.pkl names {name}, which DALL-E's encoder.pkl and decoder.pkl do not"):
        read_dalle_pickle(tmp_path / "encoder.pkl")
    assert not marker.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "encoder.pkl"
    path.write_bytes(pickle.dumps(Hostile(os.system, f"touch {marker}")))
    with pytest.raises(UserError, match=r"names (posix|nt).system"):
        read_dalle_pickle(path)
    assert not marker.exists()


NAMES = ["torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter", "dall_e.encoder\nEncoder"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_cannot_change_what_its_names_stand_for(tmp_path, name):
    """BUILD sets attributes of whatever it is given, also of a function or a class."""
    path = tmp_path / "encoder.pkl"
    body = b"\x80\x02c" + name.encode() + b"\n(N}X\x04\x00\x00\x00evilK\x01stb."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match=r"encoder.pkl cannot be read as .*TypeError: it sets evil of "):
        read_dalle_pickle(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_that_asks_for_a_patch_of_its_source_code_writes_no_file(tmp_path, name):
    """The older format stores source code, and torch.load writes how it differs where the class asks for it."""
    path, target = tmp_path / "encoder.pkl", str(tmp_path / "written")
    attributes = {"dump_patches": True, "__name__": target, "__qualname__": "StoredModule"}
    body = b"\x80\x02c" + name.encode() + b"\n" + b"(N" + pickle.dumps(attributes, 2)[2:-1] + b"tbq\x630"
    body += b"(X\x06\x00\x00\x00moduleh\x63X\x01\x00\x00\x00sX\x01\x00\x00\x00ctQ."
    with open(path, "wb") as file:
        for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True, "protocol_version": 1001}):
            pickle.dump(value, file, 2)
        file.write(body)
    with pytest.raises(UserError, match=r"TypeError: it sets "):
        read_dalle_pickle(path)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.pkl"]


def as_program(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("encoder/constants.pkl", b"")
        archive.writestr("encoder/version", "3\n")
    return path.read_bytes()


def test_a_program_is_refused(tmp_path):
    as_program(tmp_path / "encoder.pkl")
    with pytest.raises(UserError, match=r"is a TorchScript program, expected DALL-E's encoder.pkl"):
        read_dalle_pickle(tmp_path / "encoder.pkl")


def test_a_program_that_other_readers_of_zip_files_do_not_see_is_refused(tmp_path):
    path = tmp_path / "encoder.pkl"
    program = as_program(path)
    begin, end = program.index(b"PK\x01\x02"), program.index(b"PK\x05\x06")
    directory = program[begin:end]  # torch goes to where it is said to begin, Python counts back from its end
    path.write_bytes(program[:end] + directory.replace(b"constants", b"harmless_") + program[end:])
    with zipfile.ZipFile(path) as archive:
        assert "encoder/constants.pkl" not in archive.namelist()
    with pytest.raises(UserError, match=r"is a TorchScript program"):
        read_dalle_pickle(path)


def test_files_that_are_none_are_named(tmp_path):
    path: Path = tmp_path / "encoder.pkl"
    with pytest.raises(UserError, match=r"encoder.pkl cannot be read .No such file"):
        read_dalle_pickle(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"encoder.pkl cannot be read as DALL-E's encoder.pkl or decoder.pkl .*again"):
        read_dalle_pickle(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(UserError, match="it holds a list, expected a module"):
        read_dalle_pickle(path)
    torch.save({"blocks.input.w": 3}, path)
    with pytest.raises(UserError, match="not all of its weights are tensors"):
        read_dalle_pickle(path)
    torch.save({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read as DALL-E's"):
        read_dalle_pickle(path)
