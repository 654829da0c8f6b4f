"""What time goes to: an activity has the seconds that pass inside it, but for those of activities inside that."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

OTHER = "other"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Clock:
    """Seconds of the host. They add up to those since the clock was made."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._inside = [OTHER]
        self._since = time.perf_counter()

    @contextmanager
    def on(self, activity: str) -> Iterator[None]:
        self._turn()
        self._inside.append(activity)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    @property
    def activity(self) -> str:
        """The innermost one at the moment."""
        return self._inside[-1]

    def seconds(self) -> Mapping[str, float]:
        """Of each activity so far; 0 of one that there was not."""
        self._turn()
        return self._seconds

    def _turn(self) -> None:
        now = time.perf_counter()
        self._seconds[self._inside[-1]] += now - self._since
        self._since = now


class DeviceClock(Clock):
    """Seconds of a device that is given work ahead of time, such as a GPU, on its own time line: what stands between
    two turns there is what the device did, or that it waited. Nothing waits for it before `seconds` is asked for.

    The host's own seconds are in `host`: where it waits for the device, the device has enough to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host: dict[str, float] = defaultdict(float)
        self._turns: list[tuple[str, Any]] = []
        self._event = self._record()
        super().__init__()

    def seconds(self) -> Mapping[str, float]:
        self._turn()
        torch.accelerator.synchronize(self.device)
        before = self._turns[0][1]
        for activity, event in self._turns[1:]:
            self._seconds[activity] += before.elapsed_time(event) / 1000
            before = event
        self._turns = [(OTHER, before)]
        return self._seconds

    def _turn(self) -> None:
        now = time.perf_counter()
        self.host[self._inside[-1]] += now - self._since
        self._since = now
        if not self._turns:
            self._turns.append((OTHER, self._event))
        self._turns.append((self._inside[-1], self._record()))

    def _record(self) -> Any:
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event


def clock_of(device: torch.device) -> Clock:
    """The clock that tells the truth of a device."""
    return DeviceClock(device) if device.type in ("cuda", "xpu") else Clock()


class HasClock(Protocol):
    clock: Clock


Owner = TypeVar("Owner", bound=HasClock)


def spent_on(
    activity: str,
) -> Callable[[Callable[Concatenate[Owner, Arguments], Result]], Callable[Concatenate[Owner, Arguments], Result]]:
    """A method whose time its object's clock counts as that of an activity."""

    def decorate(
        method: Callable[Concatenate[Owner, Arguments], Result],
    ) -> Callable[Concatenate[Owner, Arguments], Result]:
        @wraps(method)
        def timed(self: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self.clock.on(activity):
                return method(self, *args, **kwargs)

        return timed

    return decorate
