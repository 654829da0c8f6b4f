"""What networks compute in while they make something: the type of their weights, half of it, or TF32.

bf16 and fp16 are PyTorch's autocast: weights stay what they are, so a model keeps its fingerprint, and so does what is
float32 whatever autocast says (`common.float32`, likelihoods, what logits are turned into). tf32 leaves all types as
they are and takes 11 bits of the factors of products and convolutions. Without a word neither is on, and PyTorch takes
float32 for products, TF32 for cuDNN's convolutions on NVIDIA's GPUs, or what the user has set.

Nothing that encodes an image stands in here: codes of images are the same whatever they are drawn or decoded in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch

from common.errors import UserError
from common.machine import cores
from common.precision import Precision, check_precision

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OF_TWO_HALVES = ("autocast::prioritize", "mixed dtype")  # in PyTorch's words on weights of the half that it is not in
TF32_CAPABILITY = (8, 0)  # of NVIDIA's GPUs from Ampere on

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def check_device(device: torch.device, *precisions: Precision | None) -> None:
    """Raises UserError for what is no precision, and for one that the device does not have."""
    for precision in precisions:
        check_precision("precision", precision)
        if precision is not None:
            check_there(device, precision)


def check_there(device: torch.device, precision: Precision) -> None:
    if precision == "tf32":
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < TF32_CAPABILITY
        if device.type != "cuda" or old:
            raise UserError(
                f"precision=tf32 on {device}, expected an NVIDIA GPU of the Ampere generation or later: nothing else "
                "has TF32; leave it out"
            )
        return
    if not has_autocast(device.type, HALVES[precision]):
        other = "bf16" if precision == "fp16" else "fp16"
        raise UserError(
            f"precision={precision} does not work on {device} with this PyTorch; use {other}, or leave it out"
        )


@cache
def has_autocast(device_type: str, half: torch.dtype) -> bool:
    """PyTorch raises for a type that a CUDA device lacks; on others it warns, and computes in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autocast(device_type, half):
                return torch.is_autocast_enabled(device_type)
        except RuntimeError:
            return False


@contextmanager
def computing_in(precision: Precision | None, device: torch.device, *, remember_casts: bool = True) -> Iterator[None]:
    """In it networks compute so; None: as their weights are, or as the user has set. remember_casts: a weight is cast
    once for all of it; not for a CUDA graph, in which no weights may be remembered that were cast before it began.
    Raises UserError for a precision that the device does not have, and for one half of weights that are the other."""
    check_device(device, precision)
    if precision is None:
        yield
        return
    half = precision in HALVES
    products = (
        torch.autocast(device.type, HALVES[precision], cache_enabled=remember_casts)
        if half
        else with_precisions(["tf32"] * len(tf32_backends()))
    )
    try:
        with products:
            yield
    except RuntimeError as error:  # a CPU lacks some operations in float16
        if half and "not implemented for 'Half'" in str(error):
            raise UserError(
                f"precision={precision} on {device}: PyTorch lacks an operation there that this model needs "
                f"({error}); use bf16"
            ) from error
        if half and any(words in str(error) for words in OF_TWO_HALVES):
            other = "bf16" if precision == "fp16" else "fp16"
            raise UserError(
                f"precision={precision} of a model whose weights are {HALVES[other]}: PyTorch does not mix them "
                f"({error}); use {other}, or leave it out"
            ) from error
        raise


def as_before(function: Callable[Arguments, Result], device: torch.device) -> Callable[Arguments, Result]:
    """`function`, computed, wherever it is called, without autocast and with the TF32 that is allowed now: what encodes
    an image within a draw of half precision finds the codes that it finds outside."""
    now = [backend.fp32_precision for backend in tf32_backends()]

    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.autocast(device.type, enabled=False), with_precisions(now):
            return function(*args, **kwargs)

    return called


@contextmanager
def beside_workers(workers: int, device: torch.device) -> Iterator[None]:
    """In it networks on a CPU leave each of so many busy processes a core, as far as there are cores. All threads of an
    operation wait for the slowest one, and spin meanwhile: where a worker has the core of one of them, two threads are
    several times as slow as one, and take the worker's time besides."""
    threads = torch.get_num_threads()
    fewer = min(threads, max(1, cores() - workers)) if device.type == "cpu" and workers else threads
    torch.set_num_threads(fewer)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tf32_backends() -> tuple[Any, Any]:
    """Whose TF32 is allowed or not: matrix products, and cuDNN's convolutions."""
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv


@contextmanager
def with_precisions(precisions: list[str]) -> Iterator[None]:
    """In it the backends have these, for the whole process."""
    backends = tf32_backends()
    before = [backend.fp32_precision for backend in backends]
    if before == precisions:
        yield
        return
    try:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
