"""The page: templates, style and script of this package put together into one file that asks the network for nothing.

`pipelines/commands/diagnose.py` makes its page of the same parts. The Content-Security-Policy of a page names its own
style and script by their hashes: nothing else in it can run, whatever a path, a class or a prompt is called.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report.findings import Findings, Missing
from pipelines.report.pictures import Picture, sources_of
from training.run_folder import flat

TEMPLATES = Path(__file__).parent / "templates"


def render(**content: Any) -> tuple[str, str]:
    """The report and what is to be said of its pictures. content: of report.html."""
    sources, note = sources_of(list(pictures_in(content)))
    content["evaluations"] = {
        one.subject.number: groups_of(one.subject.evaluation) for one in content["found"] if one.subject.evaluation
    }
    content["facts"] = side_by_side([dict(one.facts) for one in content["found"]])
    content["chart_data"] = chart_data(content)
    return page(
        "report.html", ("base.css", "report.css"), ("theme.js", "report.js", "charts.js"), sources, note=note, **content
    ), note


def page(
    template: str, styles: Sequence[str], scripts: Sequence[str], sources: Mapping[Picture, str], **content: Any
) -> str:
    """A page of a template of this package. styles, scripts: files of it; sources: data URIs of pictures."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals.update(missing=is_missing, number_of=number_of)
    style, script = (
        Markup("\n" + "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names))
        for names in (styles, scripts)
    )
    policy = f"default-src 'none'; img-src data:; style-src {hashed(style)}; script-src {hashed(script)}; "
    policy += "base-uri 'none'; form-action 'none'"
    return environment.get_template(template).render(
        style=style, script=script, policy=policy, source=lambda picture: sources[picture], **content
    )


def hashed(text: str) -> str:
    """A style or script as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def pictures_in(value: Any) -> Iterator[Picture]:
    """All pictures in nested tuples, lists, dicts and dataclasses of the report."""
    if isinstance(value, Picture):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from pictures_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from pictures_in(inner)
    elif isinstance(value, Findings):
        yield from pictures_in(vars(value))


def side_by_side(facts: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Of each name that any of several subjects has, the value of each."""
    names = list(dict.fromkeys(name for of_one in facts for name in of_one))
    return [(name, [of_one.get(name, "–") for of_one in facts]) for name in names]


def chart_data(content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of each chart of lines, by the name under which the template draws it."""
    found: dict[str, Any] = {}
    for number, stage in enumerate(content["curves"]):
        for prefix, charts in (("curve", stage.charts), ("more", stage.more)):
            found |= {f"{prefix}-{number}-{place}": chart.data for place, chart in enumerate(charts)}
    return found | {f"speed-{place}": chart.data for place, chart in enumerate(content["speeds"].values())}


def is_missing(value: Any) -> bool:
    return isinstance(value, Missing)


def number_of(value: Any) -> str:
    """A value of evaluation.json for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) and 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(number_of, value))
    return str(value)


def groups_of(evaluation: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What evaluation.json holds, by the name of its part: its own figures, each with what must stand beside it, the
    notes, then each object in it."""
    labels = evaluation.get("labels")
    beside = labels if isinstance(labels, Mapping) else {}
    own = [
        (name, f"{number_of(value)} ({beside[name]})" if name in beside else number_of(value))
        for name, value in evaluation.items()
        if not isinstance(value, dict) and name != "notes"
    ]
    groups = [("Figures", own)] if own else []
    notes = evaluation.get("notes")
    if isinstance(notes, list) and notes:
        groups.append(("Notes", [("", str(note)) for note in notes]))
    for name, value in evaluation.items():
        if isinstance(value, dict) and value and name != "labels":
            rows = [(path, number_of(leaf)) for path, leaf in flat(value).items()]
            groups.append((name.replace("_", " ").capitalize(), rows))
    return groups
