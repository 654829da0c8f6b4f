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


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_a_bucket_gets_the_objects_of_a_folder_and_is_completed(files, model: Path, tmp_path: Path, kind: str):
    config = GenerateConfig(
        model=str(model), out=str(tmp_path), num=9, batch_size=3, images_per_shard=4, device="cpu", format=kind
    )
    generate_files(config)
    bucket = replace(config, out=f"s3://pictures/{kind}")
    generate_files(replace(bucket, range="4:8"))
    assert "9 images in s3://pictures" in generate_files(bucket)

    def objects() -> dict[str, bytes]:
        files.invalidate_cache()
        found = files.cat(files.find(f"pictures/{kind}"))
        return {name.removeprefix(f"pictures/{kind}/"): data for name, data in found.items()}

    before = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert objects() == before
    files.rm_file(f"pictures/{kind}/" + ("000004.tar" if kind == "tar" else "000004/000006.png"))
    assert ("4" if kind == "tar" else "1") + " of them new" in generate_files(bucket)
    assert objects() == before
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        generate_files(replace(bucket, seed=1))


def test_a_bucket_that_is_not_there_is_one_sentence(files, model: Path):
    config = GenerateConfig(model=str(model), out="s3://nobody-has-this/x", num=2, device="cpu")
    with pytest.raises(UserError, match=r"s3://nobody-has-this/x cannot be written or read .*bucket does not exist"):
        generate_files(config)
