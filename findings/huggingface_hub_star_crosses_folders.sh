#!/usr/bin/env bash
# huggingface_hub: a star of allow_patterns crosses folders: "*.safetensors" is the weights of every folder.
#
# Guess: patterns are those of a shell or of pathlib, "*.safetensors" is of the top folder, and "**/" goes deeper. Seen in
# 2.4.0: names are matched whole by fnmatch, where a star takes a slash too. So who wants a model's weights gets those of
# checkpoints/ and of every variant as well, an ignored "ema*" takes a folder with all within, and "**/*.json", which
# asks for a slash, leaves out the one at the top that pathlib would find.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check huggingface_hub==2.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import PurePosixPath

import huggingface_hub
from huggingface_hub.utils import filter_repo_objects

names = ["config.json", "model.safetensors", "ema/model.safetensors", "checkpoints/9/model.safetensors", "ema/config.json"]
print(f"huggingface_hub {huggingface_hub.__version__}")
weights = list(filter_repo_objects(names, allow_patterns="*.safetensors"))
deep = list(filter_repo_objects(names, allow_patterns="**/*.json"))
left = list(filter_repo_objects(names, ignore_patterns="ema*"))
print(f"*.safetensors: {weights}")
print(f"**/*.json: {deep}")
print(f"without ema*: {left}")
assert weights == names[1:4] and deep == ["ema/config.json"], "this has changed"
assert left == [names[0], names[1], names[3]], "this has changed"
PYTHON
