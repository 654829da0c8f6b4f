#!/usr/bin/env bash
# webdataset: the hidden files of a Mac's tar are samples of their own, if the images lie in a folder.
#
# A Mac's tar writes beside `0001.png` a small `._0001.png` with what its file system knows of the file. Guess:
# webdataset, which passes over `__meta__` and what has no name before its first dot, passes over it too. Seen in
# 1.0.2: it does at the top of a tar. In a folder the name before the first dot is that of the folder, `train/`, and
# `_0001.png` a field of it: 3 images are 6 samples, every other one without a field `png`. Decoding takes the field
# for an image, as its name ends so, and raises DecodingError; without decoding nothing is said at all. Way out: a
# select_files that looks at the last part of the name, or `COPYFILE_DISABLE=1 tar ...` on the Mac.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import tarfile

import webdataset
from PIL import Image

print(f"webdataset {webdataset.__version__}")


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


# AppleDouble, version 2, with one entry, the 32 bytes of Finder's information (RFC 1740).
beside = struct.pack(">II16xHIII32x", 0x00051607, 0x00020000, 1, 9, 38, 32)
for name in ("", "train/"):
    with tarfile.open(f"{name.strip('/') or 'top'}.tar", "w") as tar:
        for number in (1, 2, 3):
            for member, content in ((f"{name}._000{number}.png", beside), (f"{name}000{number}.png", png())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def samples(tar: str, **given) -> list[tuple[str, list[str]]]:
    found = webdataset.WebDataset(tar, shardshuffle=False, **given)
    return [(sample["__key__"], [field for field in sample if not field.startswith("__")]) for sample in found]


top, inside = samples("top.tar"), samples("train.tar")
without = samples("train.tar", select_files=lambda name: not name.rsplit("/", 1)[-1].startswith("."))
print("at the top:", top)
print("in a folder:", inside)
try:
    list(webdataset.WebDataset("train.tar", shardshuffle=False).decode("pil"))
    error = "none"
except Exception as raised:
    error = type(raised).__name__
print(f"error when decoded: {error}")
images = [(f"train/000{number}", ["png"]) for number in (1, 2, 3)]
assert top == [(key.removeprefix("train/"), fields) for key, fields in images], "this has changed"
assert inside[1::2] == without == images, "this has changed"
assert inside[::2] == [("train/", [f"_000{number}.png"]) for number in (1, 2, 3)], "this has changed"
assert error == "DecodingError", "this has changed"
PYTHON
