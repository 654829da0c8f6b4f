"""The pipeline: what it generates depends on seed and index alone, and it refuses stages that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import model_io
from common.errors import UserError
from common.sealed_json import sealed
from pipelines import TwoStagePipeline
from pipelines.any_size import reconstruct
from pipelines.codec.codec import Codec
from pipelines.commands.assemble import AssembleConfig, assemble
from pipelines.model_folders import stage_folder
from pipelines.prior_requests import labels_of
from pipelines.stages import load_autoencoder
from stage2_prior.cuda_graph import RecordedDraw
from stage2_prior.priors import Transformer
from stage2_prior.sampling import SamplingConfig, draw_in_order
from tests.pipelines.conftest import make_autoencoder, make_pipeline, make_prior
from tests.stage1_vq.tiny import OF_ANY_SIZE, images_for
from tests.stage1_vq.tiny import make_autoencoder as autoencoder_of
from tests.stage2_prior.tiny import tiny_prior


def test_a_sample_has_the_same_codes_at_any_batch_size_and_start():
    pipeline = make_pipeline()
    whole = pipeline.generate(13, seed=5, batch_size=13)
    for batch_size in (1, 4):
        parts = pipeline.generate(13, seed=5, batch_size=batch_size)
        assert torch.equal(parts.codes[0], whole.codes[0])
        assert (parts.images - whole.images).abs().max() < 1 / 255
    later = pipeline.generate(6, seed=5, first_index=7)
    assert torch.equal(later.codes[0], whole.codes[0][7:])
    assert not torch.equal(pipeline.generate(13, seed=6).codes[0], whole.codes[0])


def test_classes_take_turns_unless_labels_are_given():
    pipeline = make_pipeline(num_classes=3)
    assert pipeline.generate(5, first_index=1).labels.tolist() == [1, 2, 0, 1, 2]
    assert pipeline.generate(4, labels=2).labels.tolist() == [2, 2, 2, 2]
    assert pipeline.generate(labels=[2, 0]).labels.tolist() == [2, 0]
    assert pipeline.generate(2, labels=np.int64(1)).labels.tolist() == [1, 1]


def test_a_prior_without_classes_generates_without_labels():
    made = make_pipeline(num_classes=0).generate(2)
    assert made.labels is None
    assert made.images.shape == (2, 1, 16, 16)


def test_the_pipelines_own_sampling_settings_hold_unless_others_are_given():
    pipeline = make_pipeline()
    greedy = SamplingConfig(temperature=0)
    pipeline.sampling = greedy
    repeated = pipeline.generate(labels=[1, 1]).codes[0]
    assert torch.equal(repeated[0], repeated[1])  # the most probable codes: seed and index change nothing
    drawn = pipeline.generate(labels=[1, 1], sampling=SamplingConfig()).codes[0]
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing says how many images to generate; give `num`, or one label for each image"),
        ({"num": 0}, "got num=0 and batch_size=64, expected at least 1 of each"),
        (
            {"num": 2, "labels": 3},
            "label 3 is out of range: this model knows the 3 classes 0 to 2; choose one of them",
        ),
        (
            {"labels": [0, -1]},
            "label -1 is out of range: this model knows the 3 classes 0 to 2; choose one of them",
        ),
        ({"num": 3, "labels": [0, 1]}, "got 2 labels for 3 images, expected one for each"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    pipeline = make_pipeline()
    with pytest.raises(UserError) as refused:
        pipeline.generate(**arguments)
    assert str(refused.value) == message


def test_a_cuda_graph_is_refused_where_there_can_be_none(monkeypatch):
    pipeline = make_pipeline()
    with pytest.raises(UserError, match="got cuda_graph on the device cpu, expected a CUDA device; leave it out"):
        pipeline.use_cuda_graph()
    monkeypatch.setattr(TwoStagePipeline, "device", torch.device("cuda"))
    pipeline.prior = tiny_prior("maskgit")
    with pytest.raises(UserError, match="got cuda_graph for a maskgit prior, expected one that draws its codes in an"):
        pipeline.use_cuda_graph()


def test_with_a_cuda_graph_samples_are_drawn_by_its_recording(monkeypatch):
    pipeline, seen = make_pipeline(), []

    def draw(*request):
        seen.append(request)
        return draw_in_order(*request)

    expected = pipeline.generate(5, batch_size=2).codes
    monkeypatch.setattr(TwoStagePipeline, "device", torch.device("cuda"))
    pipeline.use_cuda_graph()
    monkeypatch.undo()
    assert pipeline.recorded is not None
    pipeline.recorded = draw
    assert torch.equal(pipeline.generate(5, batch_size=2).codes[0], expected[0])
    assert len(seen) == 3


def test_a_label_for_a_model_without_classes_is_refused():
    pipeline = make_pipeline(num_classes=0)
    with pytest.raises(UserError, match="this model has no classes, so a label cannot be chosen"):
        pipeline.generate(2, labels=1)


def test_a_saved_pipeline_is_the_same_pipeline(tmp_path: Path):
    pipeline = make_pipeline()
    pipeline.sampling = SamplingConfig(temperature=0.9, top_k=5, guidance=1.5)
    folder = pipeline.save_pretrained(tmp_path / "model")
    loaded = TwoStagePipeline.from_pretrained(folder)
    assert loaded.sampling == pipeline.sampling
    assert loaded.class_names == ("class 0", "class 1", "class 2")
    assert loaded.fingerprint() == pipeline.fingerprint()
    ours, theirs = pipeline.generate(3, seed=2), loaded.generate(3, seed=2)
    assert torch.equal(ours.codes[0], theirs.codes[0])
    assert torch.equal(ours.images, theirs.images)
    assert sorted(path.name for path in folder.iterdir()) == ["model_index.json", "stage1", "stage2"]


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (3, 1), (40, 21)])
def test_images_of_any_size_are_encoded_decoded_and_reconstructed(size):
    pipeline = make_pipeline()
    height, width = size
    images = torch.rand(2, 1, height, width) * 2 - 1
    codes = pipeline.encode(images)
    assert codes[0].shape == (2, -(-height // 4), -(-width // 4))
    assert pipeline.decode(codes, size).shape == images.shape
    assert torch.equal(pipeline.reconstruct(images), pipeline.decode(codes, size))


def test_padding_repeats_the_border(monkeypatch):
    pipeline, seen = make_pipeline(), []
    monkeypatch.setattr(pipeline.autoencoder, "encode", lambda images: seen.append(images) or (images,))
    images = torch.rand(1, 1, 15, 14) * 2 - 1
    pipeline.encode(images)
    (padded,) = seen
    assert padded.shape == (1, 1, 16, 16)
    assert torch.equal(padded[..., :15, :14], images)
    assert torch.equal(padded[..., 15, :14], images[..., 14, :])
    assert torch.equal(padded[..., :15, 15], images[..., :, 13])


def test_images_meet_the_encoder_in_one_layout_whatever_theirs(monkeypatch):
    pipeline = make_pipeline()
    met = []
    encode = pipeline.autoencoder.encode
    monkeypatch.setattr(pipeline.autoencoder, "encode", lambda images: met.append(images.stride()) or encode(images))
    images = torch.rand(3, pipeline.autoencoder.channels, 16, 16) * 2 - 1
    channels_last = images.permute(0, 2, 3, 1)
    inner = channels_last.reshape(-1).view(channels_last.shape).permute(0, 3, 1, 2)
    assert inner.stride() != images.stride()
    codes, others = pipeline.encode(images), pipeline.encode(inner)
    assert met == [images.stride()] * 2
    assert torch.equal(codes[0], others[0])


def test_stages_with_different_vocabularies_are_refused():
    with pytest.raises(UserError) as refused:
        TwoStagePipeline(make_autoencoder(codebook_size=16), make_prior(make_autoencoder(codebook_size=12)))
    assert str(refused.value) == (
        "the two stages do not fit: the autoencoder makes 4x4 codes of 16 (16x16x1 images), "
        "the prior was trained on 4x4 codes of 12 (16x16x1 images); "
        "name the stage-one run whose codes the prior was trained on"
    )


def test_a_prior_of_another_autoencoder_of_the_same_shape_is_refused():
    autoencoder = make_autoencoder()
    prior = make_prior(autoencoder)
    with torch.no_grad():
        next(autoencoder.parameters()).add_(0.1)
    with pytest.raises(UserError, match=r"was trained on codes of autoencoder .* \(same shape, other weights\)"):
        TwoStagePipeline(autoencoder, prior)


def test_a_prior_that_records_no_autoencoder_is_taken_at_its_word():
    autoencoder = make_autoencoder()
    prior = make_prior(autoencoder)
    silent = Transformer(prior.config, prior.code_spec, 3)
    assert TwoStagePipeline(autoencoder, silent).num_classes == 3


def test_a_single_model_is_not_a_pipeline(tmp_path: Path):
    folder = make_autoencoder().save_pretrained(tmp_path / "autoencoder")
    with pytest.raises(
        UserError, match=r"autoencoder is a model of kind vqvae, expected an assembled model; .*zellige assemble"
    ):
        TwoStagePipeline.from_pretrained(folder)


def test_a_missing_folder_below_one_that_exists_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"there is no folder runs/typo"):
        TwoStagePipeline.from_pretrained("runs/typo")


def test_an_assembled_model_of_the_hub_serves_wherever_a_model_is_named(tmp_path: Path, monkeypatch):
    folder = make_pipeline().save_pretrained(tmp_path / "downloaded")
    monkeypatch.setattr(model_io, "download_from_hub", lambda hub_id, revision: folder)
    monkeypatch.chdir(tmp_path)
    expected = make_pipeline()
    assert TwoStagePipeline.from_pretrained("owner/name").fingerprint() == expected.fingerprint()
    assert stage_folder("owner/name", "stage2") == folder / "stage2"
    assert load_autoencoder("owner/name").fingerprint() == expected.autoencoder.fingerprint()
    assert Codec.from_pretrained("owner/name").prior_fingerprint == expected.codec().prior_fingerprint
    make_autoencoder().save_pretrained(folder.with_name("single"))
    monkeypatch.setattr(model_io, "download_from_hub", lambda hub_id, revision: folder.with_name("single"))
    assert load_autoencoder("owner/single").fingerprint() == expected.autoencoder.fingerprint()
    assert Codec.from_pretrained("owner/single").prior is None


@pytest.mark.parametrize("parts", ["both", "autoencoder", "prior"])
def test_cast_to_bfloat16_a_model_saves_loads_and_makes_the_same_images(parts: str, tmp_path: Path):
    original = make_pipeline()
    pipeline = make_pipeline()
    if parts == "both":
        pipeline.to(torch.bfloat16)
    else:
        getattr(pipeline, parts).bfloat16()
    images = torch.rand(2, 1, 18, 16) * 2 - 1
    folder = pipeline.save_pretrained(tmp_path / "model")
    loaded = TwoStagePipeline.from_pretrained(folder)
    assert loaded.fingerprint() == pipeline.fingerprint() != original.fingerprint()
    assert loaded.fingerprint() == json.loads((folder / "model_index.json").read_text())["fingerprint"]
    made = loaded.generate(4, seed=3)
    assert made.images.dtype == torch.float32
    assert torch.equal(made.images, pipeline.generate(4, seed=3).images)
    assert torch.equal(loaded.reconstruct(images), pipeline.reconstruct(images))
    assert (loaded.reconstruct(images) - original.reconstruct(images)).abs().mean() < 0.05
    # Its two parts go together, and with no other.
    assemble(AssembleConfig(stage1=str(folder), stage2=str(folder), out=str(tmp_path / "again")))
    assert TwoStagePipeline.from_pretrained(tmp_path / "again").fingerprint() == loaded.fingerprint()
    if parts != "prior":
        with pytest.raises(UserError, match="the two stages do not fit: the prior was trained on codes of autoencoder"):
            TwoStagePipeline(make_autoencoder(), loaded.prior)
    # And back: the weights are float32 then, but what was rounded stays so.
    wide = TwoStagePipeline.from_pretrained(loaded.to(torch.float32).save_pretrained(tmp_path / "wide"))
    assert {tensor.dtype for tensor in wide.prior.state_dict().values()} == {torch.float32}
    assert wide.fingerprint() != original.fingerprint()


def test_an_autoencoder_that_is_another_by_now_is_not_saved_as_the_priors(tmp_path: Path):
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.autoencoder.last_layer().add_(1)
    with pytest.raises(UserError, match="the two stages do not fit: the prior was trained on codes of autoencoder"):
        pipeline.save_pretrained(tmp_path / "model")
    pipeline = make_pipeline()
    pipeline.autoencoder = load_autoencoder(make_autoencoder().bfloat16().save_pretrained(tmp_path / "half"))
    with pytest.raises(UserError, match="the two stages do not fit"):
        pipeline.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_damaged_weights_are_named(tmp_path: Path):
    folder = make_pipeline().save_pretrained(tmp_path / "model")
    weights = folder / "stage2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"stage2/model\.safetensors is damaged"):
        TwoStagePipeline.from_pretrained(folder)


def test_sampling_settings_of_a_later_version_are_refused(tmp_path: Path):
    folder = make_pipeline().save_pretrained(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["sampling"]["magic"] = 1
    (folder / "model_index.json").write_text(json.dumps(sealed(index)))
    with pytest.raises(UserError, match="sampling settings that this version does not take"):
        TwoStagePipeline.from_pretrained(folder)


@pytest.mark.parametrize(("name", "value"), [("top_k", "all"), ("temperature", -1.0)])
def test_impossible_sampling_settings_are_refused_with_the_file(name, value, tmp_path: Path):
    folder = make_pipeline().save_pretrained(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["sampling"][name] = value
    (folder / "model_index.json").write_text(json.dumps(sealed(index)))
    with pytest.raises(UserError, match=r"model_index.json has sampling settings that this version does not take: "):
        TwoStagePipeline.from_pretrained(folder)


def test_codes_that_were_drawn_may_be_changed():
    pipeline = make_pipeline()
    for codes in (pipeline.sample(range(2), [0, 1], 0), pipeline.vary(torch.zeros(2, 1, 16, 16), 0.5).codes):
        codes[0][:, 0] = -1
        assert (pipeline.redraw(codes).codes[0] >= 0).all()


def test_away_from_the_gpu_there_is_no_graph(monkeypatch):
    pipeline = make_pipeline()
    pipeline.recorded = RecordedDraw(draw_in_order)
    assert pipeline.to("cpu").recorded is None


def test_saving_replaces_a_model_and_nothing_else(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(pipeline.save_pretrained(tmp_path / "model"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(UserError, match="something else than a model folder, so it is left alone"):
        pipeline.save_pretrained(tmp_path / "photos")
    assert (tmp_path / "photos" / "a.png").exists()


@pytest.mark.parametrize("row", OF_ANY_SIZE)
@pytest.mark.parametrize("size", [(1, 1), (7, 50), (33, 18)])
def test_every_autoencoder_reconstructs_images_of_any_size(row, size):
    autoencoder = autoencoder_of(row).eval()
    images = images_for(autoencoder, 2, size=size)
    assert reconstruct(autoencoder, images).shape == images.shape


def test_classes_are_asked_for_by_name_or_number():
    pipeline = make_pipeline()
    assert pipeline.generate(2, labels="class 2").labels.tolist() == [2, 2]
    assert pipeline.generate(labels=["class 1", 0]).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="no class named 'class 7': its classes are class 0, class 1, class 2"):
        pipeline.generate(1, labels="class 7")


def test_a_number_is_the_class_of_this_number_also_where_names_are_numbers():
    autoencoder = make_autoencoder()
    prior = make_prior(autoencoder)
    prior.class_names = ("2", "0", "1")
    pipeline = TwoStagePipeline(autoencoder, prior)
    assert labels_of(pipeline.prior, range(2), [2, "2"]) == [2, 0]


def test_single_settings_are_given_by_name():
    pipeline = make_pipeline()
    pipeline.sampling = SamplingConfig(top_k=3)
    expected = pipeline.generate(4, sampling=SamplingConfig(top_k=3, temperature=0.5)).codes[0]
    assert torch.equal(pipeline.generate(4, temperature=0.5).codes[0], expected)
    with pytest.raises(UserError, match="no setting 'temprature' of sampling; did you mean temperature"):
        pipeline.generate(4, temprature=0.5)
    with pytest.raises(UserError, match="temperature=-1"):
        pipeline.generate(4, temperature=-1)


def test_pictures_and_paths_are_images_too(tmp_path: Path):
    pipeline = make_pipeline()
    made = pipeline.generate(3)
    pictures = made.pil()
    paths = made.save(tmp_path / "made")
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    exact = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])[:, None] / 127.5 - 1
    for given in (pictures, paths, tmp_path / "made"):
        assert torch.equal(pipeline.encode(given)[0], pipeline.encode(exact)[0])
    assert torch.equal(pipeline.reconstruct(pictures[0]), pipeline.reconstruct(exact[:1]))
    back = pipeline.decompress(pipeline.compress(paths, labels="class 1"))
    assert torch.equal(torch.stack(back), pipeline.reconstruct(exact))


def test_saving_replaces_nothing(tmp_path: Path):
    made = make_pipeline().generate(2)
    (tmp_path / "000001.png").write_text("mine")
    with pytest.raises(UserError, match=r"000001\.png is there already"):
        made.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["000001.png"]
    assert (tmp_path / "000001.png").read_text() == "mine"


def test_a_pipeline_says_what_it_is():
    assert repr(make_pipeline()) == (
        "TwoStagePipeline(vqvae + transformer, 4x4 codes of 16 (16x16x1 images), 3 classes, "
        "8,693 parameters, float32 on cpu)"
    )


def test_a_pipeline_is_opened_on_a_device(model: Path):
    assert TwoStagePipeline.from_pretrained(model, device="meta").device.type == "meta"
    with pytest.raises(UserError, match="device 'cuda:77' cannot be used"):
        TwoStagePipeline.from_pretrained(model, device="cuda:77")
