"""The contract of figures: what README and docs claim, by which command, and whether it still comes out.

    python -m benchmarks.claims                        # runs all small ones: `make claims`, 20 minutes on two cores
    python -m benchmarks.claims --ids quickstart-psnr  # one claim, table or run, also a long one
    python -m benchmarks.claims --ci                   # those that CI runs
    python -m benchmarks.claims --page docs/claims.md  # runs nothing, writes the page

docs/claims.yaml (benchmarks/claims_file.py says what it holds) is first held against the pages. Commands run in a
folder of their own, and so may stand as in the docs; what a run needs from beside the repository is linked there. What
is not at hand is told and skipped, and what a long run prints in another form is left to a person: it lies in `--work`.
Prints a row for each figure and ends with 1 if one is off.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.claims_file import Claim, Claims, Run, Table, read_claims
from benchmarks.claims_pages import cell_values, check_pages
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WORDS = {True: "right", False: "WRONG", None: "unread"}
UNREAD = "for a person to compare with what was printed"


class Result(NamedTuple):
    id: str
    claimed: str
    found: str
    tolerance: str
    right: bool | None  # None: for a person to compare


def lines_of(command: str) -> list[str]:
    """The commands of a run, those that go on in the next line put together, without comments."""
    joined = re.sub(r"\\\n\s*", "", command)
    return [line for line in (line.split(" #")[0].strip() for line in joined.splitlines()) if line]


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """What a command sets in its environment, and the words that start it."""
    words = shlex.split(line)
    count = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def arguments_of(words: list[str]) -> list[str]:
    """How a command of the docs is started: by this interpreter, out of this repository."""
    if words[0] == "zellige":
        return [sys.executable, "-m", *words]
    if words[0] == "python":
        return [sys.executable, *(word.replace("tests/", f"{ROOT}/tests/", 1) for word in words[1:])]
    raise UserError(f"cannot run {' '.join(words)}: expected zellige or python")


def lacking(run: Run) -> list[str]:
    """What is not at hand for a run."""
    return [str(path) for path in run.needs.values() if not (ROOT / path).exists()] + [
        f"the package {name}" for name in run.peers if find_spec(name) is None
    ]


def output_of(run: Run, folder: Path) -> tuple[str, str | None]:
    """What the commands of a run print, and what went wrong, if anything did."""
    for link, path in run.needs.items():
        if not (folder / link).is_symlink():
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            (folder / link).symlink_to((ROOT / path).resolve())
    printed = ""
    for line in lines_of(run.command):
        environment, words = words_of(line)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(
            arguments_of(words), cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        printed += done.stdout
        if done.returncode:
            last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
            return printed, f"`{line}` ended with {done.returncode}: {last}"
    return printed, None


def judge_claim(claim: Claim, printed: str) -> Result:
    claimed = ", ".join(f"{value:g}" for value in claim.values) + f" {claim.unit}".rstrip()
    limit = claim.tolerance.text
    if claim.proven:
        return Result(claim.id, claimed, "the command's own check", limit, True)
    if claim.counts is not None:
        found = [float(len(re.findall(claim.counts, printed)))]
    elif claim.reads is None:
        return Result(claim.id, claimed, UNREAD, limit, None)
    else:
        if not (matches := list(re.finditer(claim.reads, printed))):
            return Result(claim.id, claimed, f"nothing printed matches {claim.reads!r}", limit, False)
        last = matches[-1].groups()  # of a training the end
        found = [claim.scale * float(text.replace(",", "")) for text in last]
    pairs = zip(found if len(found) > 1 else found * len(claim.values), claim.values, strict=True)
    right = all(claim.tolerance.allows(new, old) for new, old in pairs)
    return Result(claim.id, claimed, ", ".join(f"{value:g}" for value in found), limit, right)


def judge_table(entry: Table, printed: str, size: str) -> Iterator[Result]:
    """A row for each column: how many cells are right, and the first that is not."""
    cells = entry.cells(printed)
    if not cells and size == "long":
        yield Result(entry.id, f"{figures_in(entry)} cells", UNREAD, "", None)
        return
    for number, (column, tolerance) in enumerate(entry.columns.items()):
        wrong, count = [], 0
        for key, values in entry.rows.items():
            olds = values[number] if isinstance(values[number], list) else [values[number]]
            if olds == [None]:
                continue
            news = cell_values(cells.get(key, {}).get(column, ""), olds) or []
            count += 1
            if len(news) != len(olds) or not all(tolerance.allows(*pair) for pair in zip(news, olds, strict=True)):
                wrong.append(f"{key}: {news} for {olds}")
        found = f"{count - len(wrong)} of {count} cells" + (f"; {wrong[0]}" if wrong else "")
        yield Result(f"{entry.id}, {column}", f"{count} cells", found, tolerance.text, not wrong)


def chosen(claims: Claims, ids: list[str], ci: bool) -> dict[str, set[str]]:
    """Of each run that is to be done what is asked for: `--ids`, or what is small. Runs that these build on, too."""
    wanted: dict[str, set[str]] = {}
    known = set()
    for run in claims.runs:
        own = {claim.id for claim in run.claims} | {table.id for table in run.tables}
        known |= own | {run.id}
        if ids:
            asked = own if run.id in ids else own & set(ids)
        else:
            asked = own if run.size == "small" and (run.ci or not ci) else set()
        if asked:
            wanted[run.id] = asked
    if unknown := sorted(set(ids) - known):
        raise UserError(f"there is no claim, table or run {unknown[0]!r} in the file of claims")
    for run in reversed(claims.runs):
        if run.id in wanted:
            wanted.update({name: wanted.get(name, set()) for name in run.after})
    return wanted


def check(claims: Claims, wanted: dict[str, set[str]], folder: Path) -> bool:
    """Runs and compares; whether all is right. What is skipped is not wrong."""
    right, undone = True, set()
    print("| figure | claimed | found | tolerance | |\n|---|---|---|---|---|")
    for run in claims.runs:
        if run.id not in wanted:
            continue
        missing = lacking(run) + [f"the run {name}" for name in run.after if name in undone]
        if missing:
            undone.add(run.id)
            print(f"| {run.id} | | not run: {', '.join(missing)} is not at hand | | skipped |", flush=True)
            continue
        began = time.perf_counter()
        printed, failure = output_of(run, folder)
        (folder / f"{run.id}.log").write_text(printed, encoding="utf-8")
        results = [judge_claim(claim, printed) for claim in run.claims if claim.id in wanted[run.id]]
        tables = [entry for entry in run.tables if entry.id in wanted[run.id]]
        results += [row for entry in tables for row in judge_table(entry, printed, run.size)]
        for row in results:
            print(f"| {' | '.join(row[:-1])} | {WORDS[row.right]} |")
        right &= all(row.right is not False for row in results)
        # A benchmark may end with an error where its bound is missed, which is claimed then; its figures tell.
        misses = any(claim.met is False for claim in run.claims) or any(entry.missed for entry in run.tables)
        if failure is not None and not (misses and results and all(row.right for row in results)):
            undone.add(run.id)
            right = False
            print(f"| {run.id} | | {failure} | | WRONG |", flush=True)
            continue
        print(f"| {run.id} | | took {(time.perf_counter() - began) / 60:.1f} minutes | | |", flush=True)
    return right


# ---- the page -----------------------------------------------------------------------------------------------------


def page_of(claims: Claims) -> str:
    """docs/claims.md."""
    count = sum(len(run.claims) + sum(map(figures_in, run.tables)) for run in claims.runs)
    runs = {size: [run for run in claims.runs if run.size == size] for size in ("small", "long")}
    parts = [
        "# Figures and their commands",
        "This page is made from `docs/claims.yaml` by `python -m benchmarks.claims --page docs/claims.md`; a test "
        f"holds the two, README and all pages against each other. It has {count:,} figures of {len(claims.runs)} "
        "runs. `make claims` repeats the small ones and compares; of the long ones it says when they ran. What has no "
        "command is not claimed. A time or speed `of the machine` is not compared: another one has its own.",
        "## Bounds that are missed",
        "What we ask of ourselves and do not reach stays here.",
        "\n".join(missed_rows(claims)),
        "## Small: repeated by `make claims`",
        "Seconds to minutes each on two CPU cores; those marked CI run with the tests.",
        *(section for run in runs["small"] for section in run_section(run)),
        "## Long: hours, data that is not bundled, or packages of others",
        *(section for run in runs["long"] for section in run_section(run)),
    ]
    return "\n\n".join(parts) + "\n"


def figures_in(entry: Table) -> int:
    return sum(value is not None for values in entry.rows.values() for value in values)


def missed_rows(claims: Claims) -> Iterator[str]:
    yield "| figure | what | value | bound |\n|---|---|---:|---|"
    for run in claims.runs:
        for claim in run.claims:
            if claim.met is False and claim.bound is not None:
                yield f"| `{claim.id}` | {claim.says} | {said(claim)} | {claim.bound.text} |"
        for entry in run.tables:
            for key, column in entry.misses():
                bound = entry.bound_of(key, column)
                limit = bound.text if bound else ""
                yield f"| `{entry.id}` | {cell(key)}: {column} | {entry.of(key, column)} | {limit} |"


def run_section(run: Run) -> Iterator[str]:
    yield f"### {run.id}"
    yield f"```sh\n{run.command.strip()}\n```"
    facts = [f"seed {run.seed}", run.count, run.date.isoformat(), run.machine, f"commit {run.commit}"]
    facts += [f"needs {', '.join([*run.needs, *run.peers])}"] if run.needs or run.peers else []
    facts += [f"after {', '.join(run.after)}"] if run.after else []
    facts += ["CI"] if run.ci else []
    facts += [f"last checked {run.checked.isoformat()}" if run.checked else "not repeated since"]
    yield "; ".join(facts) + "."
    rows = ["| figure | what | value | a rerun may give | where |", "|---|---|---:|---|---|"]
    for claim in run.claims:
        what = claim.says + (f" ({claim.count})" if claim.count else "")
        bound = f"; bound {claim.bound.text}, {'met' if claim.met else 'MISSED'}" if claim.bound else ""
        places = ", ".join(link(page) for page in claim.where)
        rows.append(f"| `{claim.id}` | {cell(what)} | {said(claim)} | {claim.tolerance.text}{bound} | {places} |")
    for entry in run.tables:
        what = entry.says + (f" ({entry.count})" if entry.count else "")
        limits = "; ".join(f"{cell(name)}: {tolerance.text}" for name, tolerance in entry.columns.items())
        missed = f"; MISSED by {len(entry.missed)}" if entry.missed else ""
        rows.append(
            f"| `{entry.id}` | {cell(what)} | table of {figures_in(entry)} | {limits}{missed} | {link(entry.where)} |"
        )
    yield "\n".join(rows)


def said(claim: Claim) -> str:
    return ", ".join(f"{value:,.10g}" for value in claim.values) + f" {claim.unit}".rstrip()


def cell(text: str) -> str:
    return text.replace("|", "/")


def link(page: str) -> str:
    return f"[{Path(page).stem}]({page.removeprefix('docs/')})" if page.startswith("docs/") else page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", nargs="+", default=[], help="claims, tables or runs; left out: all small ones")
    parser.add_argument("--ci", action="store_true", help="those that CI runs")
    parser.add_argument("--page", type=Path, help="write the page of all claims, and run nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository with docs/claims.yaml and the pages")
    parser.add_argument("--work", type=Path, help="folder of the runs, kept; left out: one that is deleted")
    options = parser.parse_args()
    try:
        claims = read_claims(options.root / "docs" / "claims.yaml")
        if options.page is not None:
            options.page.write_text(page_of(claims), encoding="utf-8")
            return
        if problems := check_pages(claims, options.root):
            raise UserError("\n".join(problems))
        wanted = chosen(claims, options.ids, options.ci)
    except UserError as error:
        sys.exit(f"claims: {error}")
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if check(claims, wanted, work) else 1)


if __name__ == "__main__":
    main()
