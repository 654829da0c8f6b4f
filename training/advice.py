"""What a measured training spends its time and memory on, as a table, and what to do about it.

Advice says what the table shows, or what follows from it in arithmetic. What may help, and the table cannot tell, is
named as something to be compared: `zellige profile` measures it where it is asked to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

from common.wording import counted
from training.metrics_log import COMMUNICATION, PREVIEWS, SAVING, VALIDATION, WAITING, as_options, in_bytes
from training.profiling import BACKWARD, FORWARD, STEP_ROWS, Measured

MUCH = 0.1  # share of the wall time that is worth a change
MOST = 0.5  # share above which the model itself is what takes time
BUSY = 0.05  # share of a GPU's steps for which the host should wait for it at least
FULL = 0.9  # share of a device's memory that may be in use: the rest is for pieces that fit nowhere
SPACING = 34  # columns of names
SETTINGS = {VALIDATION: "train.validate_every", PREVIEWS: "train.preview_every", SAVING: "train.save_every"}


@dataclass(frozen=True)
class Compared:
    """A recipe with other settings, measured between two measurements of the recipe as it is."""

    settings: str  # as they were given
    speed: float  # samples per second over those of the recipe
    memory: float | None  # likewise, the peak
    noise: float  # by which share the two measurements of the recipe differ

    @property
    def verdict(self) -> str:
        """`1.42 times as fast`, or that the two of the recipe itself differ by as much."""
        memory = "" if self.memory is None else f", with {self.memory:.2f} times the memory"
        if abs(self.speed - 1) <= self.noise:
            return f"{self.speed:.2f} times the speed{memory}: no more than the recipe differs from itself"
        return f"{self.speed:.2f} times the speed{memory}"


def table(measured: Measured) -> str:
    """The shares of the wall time, memory, and where batches come from, in lines."""
    train, wall = measured.train, measured.wall_seconds
    several = f"{counted(measured.processes, 'process', 'processes')} on " if measured.processes > 1 else ""
    low, middle, high = spread(measured.seconds_of_steps)
    lines = [
        f"{several}{measured.device}: {counted(len(measured.seconds_of_steps), 'step')} of {train.batch_size:,} "
        f"{measured.samples} from step {measured.first_step:,} on, {measured.samples_per_second:,.0f} "
        f"{measured.samples}/s; half of the steps took {low * 1e3:.4g} to {high * 1e3:.4g} ms, the median "
        f"{middle * 1e3:.4g}",
        "",
        f"{'':<{SPACING}}{'ms a step':>10}{'share':>8}",
    ]
    for row in STEP_ROWS:
        if (seconds := measured.within(row)) <= 0:
            continue
        lines.append(line(row, seconds, wall))
        parts = {name.partition(": ")[2]: part for name, part in measured.step.items() if name.startswith(f"{row}: ")}
        if parts and (own := measured.step.get(row, 0.0)) / wall >= 0.01:
            parts["the rest"] = own
        lines += [line(f"  of that {name}", part, wall) for name, part in parts.items() if part / wall >= 0.01]
    for name, one in measured.between.items():
        lines.append(line(f"{name}, {one.seconds:,.2g} s each {one.every:,} steps", one.seconds / one.every, wall))
    lines += [line("all", wall, wall), "", f"{'memory':<{SPACING}}{'bytes':>10}"]
    for name, count in measured.memory.items():
        lines.append(f"{name:<{SPACING}}{in_bytes(count):>10}")
    kept = f"kept for backward, of {measured.micro_batch:,} {measured.samples}"
    lines.append(f"{kept:<{SPACING}}{in_bytes(measured.activations):>10}")
    if measured.peak is not None:
        where = "at most, of this process" if measured.capacity is None else "at most"
        of = "" if measured.capacity is None else f" of {in_bytes(measured.capacity)}"
        lines.append(f"{where:<{SPACING}}{in_bytes(measured.peak):>10}{of}")
    fetched = ", ".join(f"{name} {share:.0%}" for name, share in measured.fetching.parts.items() if share >= 0.01)
    lines += [
        "",
        f"a batch of {measured.micro_batch:,} takes a worker {measured.fetching.seconds * 1e3:.3g} ms: {fetched}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in measured.notes)])


def line(name: str, seconds: float, wall: float) -> str:
    return f"{name:<{SPACING}}{seconds * 1e3:>10.4g}{seconds / wall:>8.1%}"


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles; of one step, thrice that."""
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    low, middle, high = quantiles(seconds, method="inclusive")
    return low, middle, high


def advice(measured: Measured, compared: Sequence[Compared] = ()) -> list[str]:
    """Sentences, those on what takes most time first."""
    shares = measured.shares
    found = {WAITING: on_data, COMMUNICATION: on_communication}
    said: list[tuple[float, str]] = []
    for name, share in shares.items():
        if share > MUCH and name in found:
            said.append((share, found[name](measured, shares)))
        elif share > MUCH and name in SETTINGS:
            said.append((share, on_rhythm(name, measured, share)))
    if (share := shares[FORWARD] + shares[BACKWARD]) > MOST and (sentence := on_model(measured, share, compared)):
        said.append((share, sentence))
    lines = [sentence for _, sentence in sorted(said, reverse=True)]
    lines += [f"compared: {as_options(one.settings)}: {one.verdict}" for one in compared]
    return [*lines, *on_memory(measured)] or ["nothing takes so much that a setting would change it"]


def on_data(measured: Measured, shares: Mapping[str, float]) -> str:
    """Why steps wait, and how many workers would keep up."""
    train, fetching = measured.train, measured.fetching
    alone = train.accumulate * fetching.seconds  # of a worker that has a core to itself
    computing = max(measured.step_seconds - measured.within(WAITING), 1e-9)
    # Steps that wait take what the workers deliver: all of them together one step's batch in a step's time.
    among_others = train.workers * measured.step_seconds if train.workers else alone
    wanted = max(math.ceil(among_others / computing), train.workers + 1)
    free = max(measured.cores // measured.processes - (1 if measured.device == "cpu" else 0), 1)
    slowest = max(fetching.parts, key=lambda part: fetching.parts[part])
    remedy = {
        "decoding": "; decoding takes most of that: smaller image files, of the size that is trained on, help as well",
        "scaling": "; scaling takes most of that: image files of the size that is trained on help as well",
        "reading files": "; reading takes most of that: a faster disk, or fewer and larger files, help as well",
    }.get(slowest, "")
    begin = f"waiting for data takes {shares[WAITING]:.0%}"
    why = f"a step computes for {computing * 1e3:.3g} ms, and its batch takes a worker {alone * 1e3:.3g} ms{remedy}"
    if not train.workers:
        begin += ", as the training process fetches its batches itself"
    if train.workers < free:
        return f"{begin}: give --train.workers {min(wanted, free)}; {why}"
    if alone * 2 < among_others:
        why += f", among the others {among_others * 1e3:.3g}: they share cores, or wait for the disk"
    return (
        f"{begin}: {why}; {wanted} workers would be needed, and there are {counted(measured.cores, 'core')} for "
        f"{counted(measured.processes, 'process', 'processes')}, so each sample has to cost less"
    )


def on_communication(measured: Measured, shares: Mapping[str, float]) -> str:
    sent = in_bytes(measured.memory["gradients"])
    return (
        f"processes wait for each other's gradients, {sent} in each step, for {shares[COMMUNICATION]:.0%}: a larger "
        "--train.batch_size, if need be by --train.accumulate, exchanges them less often; waiting for a slower process "
        "among them counts as well"
    )


def on_rhythm(name: str, measured: Measured, share: float) -> str:
    """Of what is done every so many steps: how rarely it would have to be done."""
    one, field = measured.between[name], SETTINGS[name]
    others = measured.wall_seconds - one.seconds / one.every
    target = MUCH / 2
    every = one.seconds * (1 - target) / (target * others)
    digit = 10 ** max(math.floor(math.log10(max(every, 1.0))) - 1, 0)
    rounded = math.ceil(every / digit) * digit
    return f"{name}: {share:.0%}, {one.seconds:,.2g} s each time; --{field} {rounded} makes that {target:.0%}"


def on_model(measured: Measured, share: float, compared: Sequence[Compared]) -> str | None:
    """Of forward and backward passes: what may make them faster, and has not been compared yet."""
    train, parts = measured.train, list[str]()
    asked = " ".join(one.settings for one in compared)
    begin = f"the model's own passes take {share:.0%}"
    if measured.device == "cpu":
        room = measured.cores // measured.processes
        if measured.threads < room:
            begin += f", on {measured.threads} of {room} cores: OMP_NUM_THREADS={room} lets them use all"
    elif measured.host_waits is not None and measured.host_waits < BUSY:
        begin += (
            f", and the GPU waits for the host to give it work: the host waits {measured.host_waits:.0%} for the GPU; "
            "larger batches and --train.compile true have the host do less"
        )
    if measured.device != "cpu" and train.precision == "no" and "train.precision" not in asked:
        parts.append("train.precision=bf16")
    if not train.compile and "train.compile" not in asked:
        parts.append("train.compile=true")
    if not parts:
        return begin
    return f"{begin}; whether it can be less, --compare {' --compare '.join(parts)} tells"


def on_memory(measured: Measured) -> list[str]:
    """How large a micro-batch the device can hold."""
    if measured.capacity is None or measured.peak is None:
        return []
    train, used = measured.train, measured.peak / measured.capacity
    pieces = [n for n in range(1, train.batch_size + 1) if train.batch_size % (n * measured.processes) == 0]
    if used > FULL:
        smaller = [n for n in pieces if n > train.accumulate]
        return (
            [f"memory is {used:.0%} full: --train.accumulate {smaller[0]} computes the same in less"] if smaller else []
        )
    most = largest_micro_batch(measured)
    sentence = (
        f"memory is {used:.0%} full: a process can hold some {most:,} {measured.samples} at once, in place of "
        f"{measured.micro_batch:,}"
    )
    fitting = next((n for n in pieces if train.batch_size // (n * measured.processes) <= most), train.accumulate)
    if fitting < train.accumulate:
        sentence += f"; --train.accumulate {fitting} computes the same in larger pieces"
    return [sentence]


def largest_micro_batch(measured: Measured) -> int:
    """What passes need grows with the samples, and what is held all the time does not."""
    assert measured.peak is not None
    assert measured.capacity is not None
    held = sum(measured.memory.values())
    for_each = max(measured.peak - held, measured.activations, 1) / measured.micro_batch
    return max(int((FULL * measured.capacity - held) / for_each), 1)
