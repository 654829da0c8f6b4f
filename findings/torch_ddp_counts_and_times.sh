#!/usr/bin/env bash
# torch's DDP: its second step sends more than all others, and its own time of communication is also that of waiting.
#
# Guess 1: every step exchanges the same, so that counting the collectives of the first steps counts those of all.
# Seen in 2.15.0 (gloo, two processes, one bucket): the first step has 1 all-reduce, the second 1 and 2 broadcasts, by
# which the first process tells the order in which gradients became ready, for buckets that are laid out anew, and
# from the third on it is 1. Way out: to count from the third step on.
#
# Guess 2: `backward_comm_time` of DDP's own logger, a duration of communication, tells what the network costs. Seen:
# it runs from a bucket's being ready to its result, so it holds the wait for the slowest process: where another one
# sleeps for half a second before its forward pass, it is half a second. Way out: a barrier before what is timed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
cat > job.py <<'PYTHON'
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

dist.init_process_group("gloo")
first = dist.get_rank() == 0
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)))
model._set_ddp_runtime_logging_sample_rate(1)
x = torch.randn(8, 64)
counts = []
for _ in range(6):
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        model(x).sum().backward()
    found = {event.key.removeprefix("c10d::"): event.count for event in watched.key_averages() if "c10d::" in event.key}
    counts.append(found)
milliseconds = {}
for late in (0, 0.5):
    for _ in range(3):  # a step's times are written down when the next one begins
        if not first:
            time.sleep(late)
        model(x).sum().backward()
    milliseconds[late] = model._get_ddp_logging_data()["backward_comm_time"] / 1e6
dist.destroy_process_group()
if first:
    print(f"torch {torch.__version__}, collectives of each step: {counts}")
    print(f"backward_comm_time, ms, by seconds that the other process sleeps: {milliseconds}")
    usual = {"allreduce_": 1}
    assert counts == [usual, {"broadcast_": 2, **usual}, *[usual] * 4], "this has changed"
    assert milliseconds[0.5] > 400 and milliseconds[0] < 200, "this has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 job.py
