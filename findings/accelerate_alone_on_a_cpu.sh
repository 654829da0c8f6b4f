#!/usr/bin/env bash
# accelerate: on a machine without a GPU each of several processes takes itself for the only one, and FSDP2 is
# dropped.
#
# Guess 1: of two processes that `accelerate launch --num_processes 2` or torchrun starts, each knows of the other,
# since RANK and WORLD_SIZE tell it; without a GPU they talk over gloo, as torch.distributed would. Seen in 1.15.0:
# only if Accelerator is given cpu=True or `accelerate launch --cpu`. Else `num_processes` is 1 and `is_main_process`
# true in both, the model is not wrapped, and a training is run twice over, into the same files; not a word of it.
# `--use_fsdp` changes nothing.
#
# Guess 2: with cpu=True, FSDP2 that was asked for, by `--use_fsdp --fsdp_version 2` or by a plugin, is given (torch's
# fully_shard works on the CPU), or refused. Seen: DDP is given, in silence: every process holds the whole model.
# (`accelerate launch` refuses its own `--cpu` beside `--use_fsdp`.) Way out: to compare `num_processes` with
# WORLD_SIZE and `distributed_type` with what was asked for, and to refuse what is not so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
cat > job.py <<'PYTHON'
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

given = {}
if "cpu" in sys.argv:
    given["cpu"] = True
if "plugin" in sys.argv:
    given["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)
accelerator = Accelerator(**given)
model = accelerator.prepare(torch.nn.Linear(2, 2))
seen = f"{accelerator.num_processes} {accelerator.distributed_type.value} {type(model).__name__}"
Path(f"{os.environ['RANK']}.seen").write_text(f"{os.environ['WORLD_SIZE']} processes: {seen}")
PYTHON
export CUDA_VISIBLE_DEVICES="" HF_HOME="$folder/home" OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import subprocess
import sys
from pathlib import Path

programs = Path(sys.executable).parent
launch = [programs / "accelerate", "launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
launch += ["--dynamo_backend", "no"]
fsdp = ["--use_fsdp", "--fsdp_version", "2"]
torchrun = [programs / "torchrun", "--standalone", "--nproc-per-node", "2"]
alone, together = "2 processes: 1 NO Linear", "2 processes: 2 MULTI_CPU DistributedDataParallel"
for name, command, expected in (
    ("torchrun", [*torchrun, "job.py"], alone),
    ("torchrun, cpu=True", [*torchrun, "job.py", "cpu"], together),
    ("torchrun, cpu=True, FSDP2 by plugin", [*torchrun, "job.py", "cpu", "plugin"], together),
    ("launch, FSDP2", [*launch, *fsdp, "job.py"], alone),
    ("launch, FSDP2, cpu=True", [*launch, *fsdp, "job.py", "cpu"], together),
):
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    seen = [Path(f"{rank}.seen").read_text() for rank in (0, 1)]
    print(f"{name}: {seen}; warned of FSDP: {'FSDP' in done.stderr}")
    assert seen == [expected, expected] and "FSDP" not in done.stderr, "this has changed"
    for rank in (0, 1):
        Path(f"{rank}.seen").unlink()
PYTHON
