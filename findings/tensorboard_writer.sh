#!/usr/bin/env bash
# torch's SummaryWriter and accelerate's tracker: settings become runs of their own, and pictures lose a grey level.
#
# Guess 1: a tracker that is told the settings of a training (accelerate's `store_init_configuration`, which calls torch's
# `add_hparams`) writes them to the log of that training, so that TensorBoard's tab HParams shows them beside its curves.
# Seen: every start makes two folders more, named by the clock: one with an event file that TensorBoard shows as another run,
# which has settings and no curves, and one with hparams.yml. After one start and two restarts there are 4 runs where one
# was trained. A list among the settings is a ValueError, and True is written as the number 1. Way out: the message
# `session_start_info` in the run's own event file, once; TensorBoard then finds out by itself which settings and metrics
# there are.
#
# Guess 2: add_image of a float picture in [0, 1] rounds to the nearest of 256 levels, as saving a PNG usually does. Seen: it
# cuts off, and of pictures in [-1, 1] that were shifted, (x + 1) / 2, 63 of the 256 levels are shown one too dark. Way
# out: hand over bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.15.0 accelerate==1.15.0 tensorboard==2.21.0 numpy==2.4.6 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import time
from pathlib import Path

import accelerate
import numpy as np
import torch
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

print(f"torch {torch.__version__}, accelerate {accelerate.__version__}")
accelerate.PartialState(cpu=True)
for start in range(3):
    tracker = TensorBoardTracker("run", "log")
    tracker.start()
    tracker.store_init_configuration({"steps": 100, "flip": True})
    tracker.log({"loss": 1.0 / (start + 1)}, step=start)
    tracker.finish()
    time.sleep(1.1)
folders = [path for path in Path("log/run").iterdir() if path.is_dir()]
runs = EventMultiplexer().AddRunsFromDirectory("log").Reload()
curves = [name for name in runs.Runs() if runs.GetAccumulator(name).Tags()["scalars"] == ["loss"]]
with_settings = [name for name in runs.Runs() if runs.GetAccumulator(name).summary_metadata]
said = [
    HParamsPluginData.FromString(meta.plugin_data.content).session_start_info.hparams["flip"].WhichOneof("kind")
    for name in with_settings
    for tag, meta in runs.GetAccumulator(name).summary_metadata.items()
    if tag == "_hparams_/session_start_info"
]
print(f"folders {len(folders)}, runs {len(runs.Runs())}, with curves {curves}, True is a {set(said)}")
try:
    SummaryWriter("other").add_hparams({"betas": [0.9, 0.999]}, {})
    refused = ""
except ValueError as error:
    refused = str(error)
print(f"a list: ValueError: {refused}")

levels = np.arange(256, dtype=np.uint8)[None]
x = torch.from_numpy(levels).float() / 127.5 - 1
dark = {}
for name, pixels in {"floats": (x + 1) / 2, "bytes": levels}.items():
    writer = SummaryWriter(name)
    writer.add_image("x", pixels, dataformats="HW")
    writer.close()
    (event,) = EventAccumulator(name).Reload().Images("x")
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
    dark[name] = int((levels.astype(int) - shown == 1).sum()), int((levels != shown).sum())
print(f"levels that are one too dark, and all that differ, of 256: {dark}")
assert (len(folders), len(runs.Runs()), curves) == (6, 4, ["run"]), "this has changed"
assert set(said) == {"number_value"} and "value should be one of" in refused, "this has changed"
assert dark == {"floats": (63, 63), "bytes": (0, 0)}, "this has changed"
PYTHON
