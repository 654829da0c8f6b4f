#!/usr/bin/env bash
# datasets: a photo that is called "test.png", or a folder "train station", hides the rest of an image folder.
#
# Guess: an image folder without folders of splits is one split of all its images, classes from its folders. Seen in 5.2.0:
# words such as train, test, val, eval anywhere in the path are splits, and where one image has such a word, those without
# are left out, without a warning: four images of two classes with one "test.png" among them become one test image without
# class, a folder of photos of trains and trams has the trains alone, and so has one of three places its station.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = "home"
import datasets
from PIL import Image

datasets.disable_progress_bars()
print(f"datasets {datasets.__version__}")
CASES = [
    (["cats/a.png", "cats/b.png", "dogs/a.png", "dogs/b.png"], {"train": 4}),
    (["cats/a.png", "cats/test.png", "dogs/a.png", "dogs/b.png"], {"test": 1}),
    (["tram 01.png", "train 01.png", "train 02.png", "bus 01.png"], {"train": 2}),
    (["train station/1.png", "airport/1.png", "harbour/1.png"], {"train": 1}),
]
for number, (names, expected) in enumerate(CASES):
    root = Path(f"images{number}")
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (level, level, level)).save(root / name)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(root))
    counts = {split: len(rows) for split, rows in loaded.items()}
    print(f"{names}: {counts}, columns {sorted(next(iter(loaded.values())).features)}")
    assert counts == expected, "this has changed"
PYTHON
