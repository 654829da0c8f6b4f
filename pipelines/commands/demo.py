"""`zellige demo`: a page in the browser on which a model is tried."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError
from pipelines.demo.limits import Limits
from pipelines.demo.model import open_subject
from pipelines.demo.page import gradio, interruptible, served

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """A page in the browser on which a model is tried: generate, reconstruct, compress, inpaint, vary, interpolate."""

    model: str  # assembled model, model or run folder of an autoencoder or a VAE, or a hub id
    host: str = "127.0.0.1"  # who may come: this machine alone; 0.0.0.0 lets everybody who reaches it
    port: int = 7860  # on which the page is served
    share: bool = False  # ask gradio's servers for a public address, for a week at most
    examples: int = 6  # of the model's own samples, drawn at the start, for visitors without an image; 0: none
    max_images: int = 16  # of a request
    max_megabytes: float = 10.0  # of an upload
    max_megapixels: float = 25.0  # of an uploaded image
    max_side: int = 512  # pixels: images that are seen in their own size are scaled down to this longer side
    max_seconds: float = 60.0  # of a request, once its turn has come
    max_waiting: int = 16  # requests in the queue, of which one is served at a time
    text_encoder: str | None = None  # folder or hub id of the text encoder; left out: as the model records
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; left out: the fastest there is

    def __post_init__(self) -> None:
        if not 1 <= self.port < 2**16:
            raise UserError(f"port={self.port}, expected 1 to {2**16 - 1}")
        if self.examples < 0:
            raise UserError(f"examples={self.examples}, expected 0 or more")
        if not 2 <= self.max_images <= 64:  # the ends of a walk; as many as are drawn at once
            raise UserError(f"max_images={self.max_images}, expected 2 to 64")
        for name in ("max_megabytes", "max_megapixels", "max_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}, expected more than 0")
        for name in ("max_side", "max_waiting"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}, expected at least 1")

    @property
    def limits(self) -> Limits:
        return Limits(
            megabytes=self.max_megabytes,
            megapixels=self.max_megapixels,
            side=self.max_side,
            images=self.max_images,
            seconds=self.max_seconds,
            waiting=self.max_waiting,
        )


def demo(config: DemoConfig) -> str:
    """Serves the page until Ctrl-C; returns one line. Raises UserError for a model that is none, a port that is taken,
    and where gradio is not installed."""
    gradio()
    subject = open_subject(config.model, config.device, config.text_encoder)
    pages = served(subject, config.limits, config.host, config.port, config.examples, config.share)
    with interruptible() as ended, pages as address:
        print(f"{config.model} at {address}; Ctrl-C ends it", flush=True)
        if config.host not in LOOPBACK or config.share:
            print("note: whoever reaches this address can use the model; nobody is asked for a password", flush=True)
        while not ended.wait(0.5):  # an endless wait would not see the signal on Windows
            pass
    return f"the demo of {config.model} has ended"
