from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from training.signals import stop_on_signals, this_command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks(number: signal.Signals):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name
    assert signal.getsignal(number) is before


def test_a_second_sigint_insists_and_a_second_sigterm_does_not():
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_the_request_is_never_made():
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize(
    ("argv", "processes", "command"),
    [
        (
            ["/env/bin/zellige", "train-stage1", "--run", "my run"],
            None,
            "zellige train-stage1 --run 'my run'",
        ),
        (["/x/pipelines/__main__.py", "encode"], "1", "zellige encode"),
        (["/x/zellige/__main__.py", "encode"], "1", "zellige encode"),
        (["/x/pipelines/__main__.py", "encode"], "2", "torchrun --nproc_per_node 2 -m zellige -- encode"),
        (["/env/bin/zellige", "--", "encode"], "2", "torchrun --nproc_per_node 2 -m zellige -- encode"),
        (["train.py", "--fast"], None, "python train.py --fast"),
        (["train.py"], "4", "torchrun --nproc_per_node 4 train.py"),
    ],
)
def test_the_command_that_continues(monkeypatch, argv: list[str], processes: str | None, command: str):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert this_command() == command


def test_the_command_that_continues_with_shares_of_weights(monkeypatch):
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["/x/zellige/__main__.py", "train-stage2", "--run", "a"])
    launch = "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8"
    assert this_command() == f"{launch} -m zellige train-stage2 --run a"
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    launch = launch.replace(" --num", " --fsdp_reshard_after_forward false --num")
    assert this_command() == f"{launch} -m zellige train-stage2 --run a"
