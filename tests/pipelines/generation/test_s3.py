"""A bucket of a real server of S3's protocol, on this machine; skips where its packages are not installed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("flask_cors")
server = pytest.importorskip("moto.server")

import s3fs  # noqa: E402

from common.errors import UserError  # noqa: E402
from pipelines.commands.generate import GenerateConfig, generate_files  # noqa: E402
from pipelines.commands.vary import VaryConfig, vary_files  # noqa: E402
from pipelines.evaluation.written import written  # noqa: E402
from pipelines.generation.records import PASSES  # noqa: E402


@pytest.fixture(scope="module")
def files() -> Iterator[s3fs.S3FileSystem]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        made = s3fs.S3FileSystem()
        made.mkdir("pictures")
        yield made
    running.stop()


def objects_of(files: s3fs.S3FileSystem, place: str) -> dict[str, bytes]:
    """All that is there, but how many passes images took, which timing decides."""
    files.invalidate_cache()
    found = files.cat([name for name in files.find(place) if PASSES not in name])
    return {name.removeprefix(f"{place}/"): data for name, data in found.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """As `objects_of`."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != PASSES]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_a_bucket_gets_the_objects_of_a_folder_and_is_completed(files, model: Path, tmp_path: Path, kind: str):
    config = GenerateConfig(
        model=str(model), out=str(tmp_path), num=9, batch_size=3, images_per_shard=4, device="cpu", format=kind
    )
    generate_files(config)
    bucket = replace(config, out=f"s3://pictures/{kind}")
    generate_files(replace(bucket, range="4:8"))
    assert "9 images in s3://pictures" in generate_files(bucket)

    before = files_of(tmp_path)
    assert objects_of(files, f"pictures/{kind}") == before
    files.rm_file(f"pictures/{kind}/" + ("000004.tar" if kind == "tar" else "000004/000006.png"))
    assert ("4" if kind == "tar" else "1") + " of them new" in generate_files(bucket)
    assert objects_of(files, f"pictures/{kind}") == before
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        generate_files(replace(bucket, seed=1))


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_a_bucket_of_samples_is_judged(files, model: Path, tmp_path: Path, kind: str, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = GenerateConfig(model=str(model), out=str(tmp_path / "out"), num=9, images_per_shard=4, device="cpu")
    generate_files(config)
    generate_files(replace(config, out=f"s3://pictures/judged-{kind}", format=kind))
    expected, source = written(config.out), written(f"s3://pictures/judged-{kind}")
    assert source.labels.tolist() == [i % 3 for i in range(9)]
    assert all((source.read(i, 16, 16, 1) == expected.read(i, 16, 16, 1)).all() for i in range(9))


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_a_bucket_of_variants_is_completed(files, model: Path, pictures: Path, tmp_path: Path, kind: str):
    config = VaryConfig(
        model=str(model), images=str(pictures), out=str(tmp_path / "out"), variants=2, images_per_shard=2, format=kind
    )
    vary_files(config)
    expected = files_of(tmp_path / "out")
    bucket = replace(config, out=f"s3://pictures/varied-{kind}")
    vary_files(replace(bucket, range="2:3"))
    assert "4 of them new" in vary_files(bucket)
    assert objects_of(files, f"pictures/varied-{kind}") == expected
    files.rm_file(f"pictures/varied-{kind}/" + ("000000.tar" if kind == "tar" else "1_1.png"))
    assert ("4" if kind == "tar" else "1") + " of them new" in vary_files(bucket)
    assert objects_of(files, f"pictures/varied-{kind}") == expected


def test_a_bucket_that_is_not_there_is_one_sentence(files, model: Path):
    config = GenerateConfig(model=str(model), out="s3://nobody-has-this/x", num=2, device="cpu")
    with pytest.raises(UserError, match=r"s3://nobody-has-this/x cannot be written or read .*bucket does not exist"):
        generate_files(config)
