"""What the tabs of a demo are made of: uploads, settings, galleries, and how a button asks the model."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args, get_type_hints

import torch

from common.errors import UserError
from pipelines.demo.drawing import Asked, asked_of, class_title, usual_steps
from pipelines.demo.limits import Desk, Limits, StoppedError
from pipelines.demo.model import Subject
from pipelines.two_stage import TwoStagePipeline
from stage2_prior.sampling_config import SamplingConfig

COLUMNS = 4
SAMPLES = "Or take samples of this model"
EASY_SAMPLES = f"{SAMPLES}, which it codes better than any photo"
SMALL = 128  # pixels
SCHEDULES: tuple[str, ...] = get_args(get_type_hints(SamplingConfig)["guidance_schedule"])


@dataclass(frozen=True)
class Page:
    """What all tabs share."""

    gr: Any  # the module gradio: a person without it still has all other commands
    subject: Subject
    limits: Limits
    desk: Desk
    examples: Sequence[str]  # image files

    # ---- asking ------------------------------------------------------------------------------------------------------

    def on_click(self, button: Any, stop: Any, work: Callable[..., Any], inputs: Sequence[Any], outputs: Any) -> None:
        """The model is asked when the button is clicked, one request after the other over all tabs and visitors; `stop`
        ends it, running or waiting."""
        event = button.click(
            self.answer(work, self.desk.serving),
            inputs,
            outputs,
            concurrency_id="model",  # else each button has a queue of its own, and they would run side by side
            concurrency_limit=1,
            api_visibility="private",
        )
        stop.click(self.stop, None, None, cancels=[event], queue=False, api_visibility="private")

    @cached_property
    def stop(self) -> Callable[..., None]:
        def stop(request: Any) -> None:
            self.desk.stop(visitor_of(request))

        stop.__annotations__["request"] = self.gr.Request
        return stop

    def answer(self, work: Callable[..., Any], serving: Callable[[str], Any] | None = None) -> Callable[..., Any]:
        """`work` for a visitor, what is wrong told as one sentence. serving: where it needs the model."""
        no_memory = "the memory of the device is not enough for this; ask for fewer or smaller images"

        def answer(request: Any, *values: Any) -> Any:
            try:
                if serving is None:
                    return work(*values)
                with serving(visitor_of(request)):
                    return work(*values)
            except UserError as error:
                raise self.told(str(error)) from error
            except StoppedError as error:
                raise self.told("stopped, as you asked") from error
            except torch.OutOfMemoryError as error:
                raise self.told(no_memory) from error
            except Exception as error:  # the server's log has the traceback
                raise self.told("something went wrong here, and was noted; ask for something else", log=True) from error

        answer.__annotations__["request"] = self.gr.Request
        return answer

    def told(self, sentence: str, *, log: bool = False) -> Exception:
        """A message at the edge of the page: it is read as HTML there, and may name what a visitor has written."""
        error: Exception = self.gr.Error(html.escape(sentence), title="Sorry", print_exception=log)
        return error

    @property
    def classes(self) -> list[str]:
        """Of what shows pictures: small ones are enlarged, pixel by pixel."""
        return ["pixels"] if max(self.subject.image_size) <= SMALL else []

    # ---- parts -------------------------------------------------------------------------------------------------------

    def buttons(self, name: str) -> tuple[Any, Any]:
        """One that asks, and one that stops."""
        with self.gr.Row():
            return (
                self.gr.Button(name, variant="primary", scale=3, min_width=140),
                self.gr.Button("Stop", scale=1, min_width=80),
            )

    def upload(self, label: str = "Image") -> Any:
        """An image file as it was uploaded, which nobody has read yet."""
        image = self.gr.Image(
            type="filepath",
            label=label,
            sources=["upload", "clipboard"],
            height=260,
            buttons=[],
            elem_classes=[*self.classes, "picture"],
            placeholder=f"Drop an image here, or click to upload\nAt most {self.limits.megabytes:g} MiB",
        )
        # gradio would open it before anybody has looked at its size, and a visitor would see Pillow's error with the
        # server's path in it. (A class derived from Image would write a file beside the module that it stands in.)
        image.preprocess = lambda payload: None if payload is None else payload.path
        return image

    def offer(self, *uploads: Any, label: str = SAMPLES) -> None:
        """Examples, as many pictures side by side as there are uploads."""
        count = len(uploads)
        rows = [list(self.examples[i : i + count]) for i in range(0, len(self.examples) - count + 1, count)]
        if rows:
            self.gr.Examples(rows, list(uploads), label=label, api_visibility="private", preload=False)

    def gallery(self, label: str = "Images") -> Any:
        """Pictures, kept without loss."""
        return self.gr.Gallery(
            label=label,
            format="png",
            columns=COLUMNS,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_classes=self.classes,
        )

    def picture(self, label: str) -> Any:
        return self.gr.Image(
            label=label,
            format="png",
            image_mode=None,
            interactive=False,
            height=260,
            buttons=["download", "fullscreen"],
            elem_classes=[*self.classes, "picture"],
        )

    def sheet(self, label: str) -> Any:
        """A large picture of many small ones."""
        return self.gr.Image(label=label, format="png", interactive=False, buttons=["download", "fullscreen"])

    def command(self, label: str, language: str | None = "shell") -> Any:
        """Lines to be copied, which are there as soon as there are any (`said`)."""
        return self.gr.Code(
            label=label,
            language=language,
            interactive=False,
            lines=1,
            max_lines=14,
            wrap_lines=True,
            show_line_numbers=False,
            visible=False,
        )

    def said(self, lines: str) -> Any:
        """For `command`: what it says now."""
        return self.gr.update(value=lines, visible=bool(lines))

    def count(self, label: str, value: int, least: int = 1) -> Any:
        """Of images."""
        most = self.limits.images
        if least == most:  # no slider has one place only
            return self.gr.Number(most, label=label, precision=0)
        return self.gr.Slider(least, most, min(value, most), step=1, label=label)

    def seed(self) -> Any:
        with self.gr.Row():
            seed = self.gr.Number(0, label="Seed", precision=0, min_width=120, scale=2)
            another = self.gr.Button("Another", min_width=90, scale=1, elem_classes=["beside"])
        # drawn by the browser: no request for a number
        another.click(None, None, seed, js="() => Math.floor(Math.random() * 1000000)", api_visibility="private")
        return seed

    def settings(self, *, of_parts: bool = False) -> Settings:
        """Widgets of all that the prior takes. of_parts: of images of which a part stays; else of whole ones."""
        assert self.subject.pipeline is not None
        return Settings(self, self.subject.pipeline, of_parts)


class Settings:
    """Widgets that say how a prior is to draw."""

    def __init__(self, page: Page, pipeline: TwoStagePipeline, of_parts: bool) -> None:
        gr, prior, own = page.gr, pipeline.prior, pipeline.sampling
        self.pipeline = pipeline
        self.widgets: dict[str, Any] = {}
        if prior.num_classes:
            classes = [(class_title(pipeline, number), number) for number in range(prior.num_classes)]
            if not of_parts:
                classes = [("all classes in turn", -1), *classes]
            elif prior.knows_null_label:
                classes = [("any class", -1), *classes]
            self.widgets["label"] = gr.Dropdown(classes, value=classes[0][1], label="Class")
        if prior.reads_prompts:
            self.widgets["prompt"] = gr.Textbox(label="Prompt", placeholder="what the image shows", lines=2)
        self.widgets["seed"] = page.seed()
        guided = bool(prior.num_classes or prior.reads_prompts) and prior.knows_null_label
        with gr.Accordion("How codes are drawn", open=False):
            add = self.widgets.__setitem__
            add(
                "temperature",
                gr.Slider(
                    0,
                    2,
                    own.temperature,
                    step=0.05,
                    label="Temperature",
                    info="below 1: likelier codes; 0: always the likeliest",
                ),
            )
            most = max(grid.vocabulary for grid in prior.code_spec.grids)
            add(
                "top_k",
                gr.Slider(
                    0,
                    most,
                    own.top_k or 0,
                    step=1,
                    label="Top-k",
                    info="draw from so many of the likeliest codes; 0: from all",
                ),
            )
            add(
                "top_p",
                gr.Slider(
                    0.01,
                    1,
                    own.top_p,
                    step=0.01,
                    label="Top-p",
                    info="draw from the fewest codes that hold this share; 1: from all",
                ),
            )
            add(
                "min_p",
                gr.Slider(
                    0,
                    1,
                    own.min_p,
                    step=0.01,
                    label="Min-p",
                    info="only codes this share as likely as the likeliest; 0: all",
                ),
            )
            if guided:
                add(
                    "guidance",
                    gr.Slider(
                        0, 10, own.guidance, step=0.1, label="Guidance", info="towards the class or prompt; 1: none"
                    ),
                )
                add(
                    "guidance_schedule",
                    gr.Dropdown(list(SCHEDULES), value=own.guidance_schedule, label="Guidance over the steps"),
                )
                add(
                    "guidance_power",
                    gr.Slider(
                        0.25, 5, own.guidance_power, step=0.25, label="Guidance's power", info="above 1: it rises late"
                    ),
                )
                add(
                    "guidance_start",
                    gr.Slider(
                        0, 1, own.guidance_start, step=0.05, label="Guidance from", info="share of an image's steps"
                    ),
                )
                add("guidance_end", gr.Slider(0, 1, own.guidance_end, step=0.05, label="Guidance up to"))
                if layers := getattr(prior, "guided_layers", 0):
                    add(
                        "guidance_layer",
                        gr.Slider(
                            0,
                            layers,
                            own.guidance_layer,
                            step=1,
                            label="Guidance of a layer",
                            info="1: the last; 0: none",
                        ),
                    )
            if (usual := usual_steps(prior)) is not None:
                add(
                    "steps",
                    gr.Slider(
                        1,
                        max(256, own.steps or usual),
                        own.steps or usual,
                        step=1,
                        label="Steps",
                        info="fewer are faster",
                    ),
                )
            if (own_choice := own.choice_temperature_for(prior)) is not None:
                add(
                    "choice_temperature",
                    gr.Slider(
                        0,
                        20,
                        own_choice,
                        step=0.5,
                        label="Choice temperature",
                        info="chance in which codes stay; 0: none",
                    ),
                )

    @property
    def inputs(self) -> list[Any]:
        return list(self.widgets.values())

    def asked(self, values: Sequence[Any]) -> Asked:
        """What the widgets' values say, in the order of `inputs`. Raises UserError."""
        named = dict(zip(self.widgets, values, strict=True))
        if named.get("label") == -1:
            named["label"] = None
        return asked_of(self.pipeline, named)


def visitor_of(request: Any) -> str:
    return str(request.session_hash)


def as_table(rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *([html.escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
