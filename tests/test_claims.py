"""docs/claims.yaml, README and docs say the same; its commands are ones that there are; quick ones still come out."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from benchmarks.claims import ROOT, judge_claim, judge_table, lines_of, page_of, words_of
from benchmarks.claims_file import Tolerance, read_claims
from benchmarks.claims_pages import check_pages
from benchmarks.claims_scan import numbers, places
from common.errors import UserError
from pipelines.cli import CODES_COMMANDS, COMMANDS

PATH = ROOT / "docs" / "claims.yaml"
CLAIMS = read_claims(PATH)
COMMAND_LINES = sorted({line for run in CLAIMS.runs for line in lines_of(run.command)})


@pytest.fixture
def copy(tmp_path):
    """README, docs and their claims, to be broken."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (old, text.count(old))
    path.write_text(text.replace(old, new))


def run_claims(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.claims", "--root", str(root), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# ---- the file and the pages -----------------------------------------------------------------------------------------


def test_every_claim_stands_on_its_page_and_every_figure_is_claimed():
    problems = check_pages(CLAIMS, ROOT)
    assert not problems, "\n".join(["the figures of README, docs and docs/claims.yaml differ:", *problems])


def test_the_page_is_that_of_the_claims():
    made = page_of(CLAIMS)
    assert (ROOT / "docs" / "claims.md").read_text() == made, "run python -m benchmarks.claims --page docs/claims.md"
    for run in CLAIMS.runs:
        assert all(f"`{entry.id}`" in made for entry in (*run.claims, *run.tables))


def test_small_runs_fit_into_20_minutes_and_those_of_ci_into_one():
    assert sum(run.minutes for run in CLAIMS.runs if run.size == "small") < 20
    assert 0 < sum(run.minutes for run in CLAIMS.runs if run.ci) <= 1


@pytest.mark.parametrize(
    ("page", "old", "new", "said"),
    [
        ("README.md", "24.9 dB", "26.9 dB", "photos-psnr: README.md says '24.9 dB' nowhere"),
        ("docs/results.md", "| 0.55 | 8x8 of 512 | 576 | 24.40 |", "| 0.55 | 8x8 of 512 | 576 | 25.40 |", "25.4"),
        (
            "docs/choosing.md",
            "learns fastest: 24.4 dB at 576 bits",
            "learns fastest: 24.5 dB at 576 bits",
            "24.4 dB at",
        ),
        ("docs/claims.yaml", 'text: "24.4 dB at 576 bits"', 'text: "23.7 dB, 576 bits on"', "23.7 in"),
        ("docs/claims.yaml", "[a download of 528 MB]", "[a download of]", "there is no figure in 'a download of'"),
        ("docs/train.md", "# Train both stages", "It takes 3 minutes.\n\n# Train both stages", "'3 minutes' in"),
        ("docs/generate.md", "# Generate images", "| a | b |\n|---|---|\n| x | 0.5 |\n\n# Generate", "'0.5' in"),
        (
            "docs/studies.md",
            "| MNIST, 7x7 of 128 | 7.0000 | 4.5310 |",
            "| MNIST, 7x7 of 128 | 7.0000 | 4.6310 |",
            "4.631",
        ),
    ],
)
def test_a_figure_that_was_changed_or_added_on_a_page_is_found(copy, page, old, new, said):
    change(copy / page, old, new)
    problems = check_pages(read_claims(copy / "docs" / "claims.yaml"), copy)
    assert problems
    assert any(said in problem for problem in problems), problems


def test_figures_in_commands_code_and_links_are_none_and_boxes_of_the_site_hold_some():
    page = (
        "```\nsleep 5 minutes\n```\n\n`5 minutes` of [it](x.md#5-minutes): codes of 8x8 of 512, of 2^18.\n\n"
        "    5 minutes\n\n!!! note\n    It took\n    **5** minutes and 3 to 4 s.\n"
    )
    found = [place.text[begin:end] for place in places(page) for begin, end in place.figures()]
    assert found == ["5 minutes", "3 to 4 s"]
    assert numbers("six of 1,000, -0.5 and 2e+05") == [6, 1000, -0.5, 200_000]


@pytest.mark.parametrize(
    ("tolerance", "value", "allowed", "refused"),
    [
        ("exactly", 3.0, 3.0, 3.1),
        ("within 0.3", 24.4, 24.7, 24.71),
        ("within 5%", -100.0, -95.0, -94.9),
        ("at least 24", 24.4, 24.0, 23.9),
        ("at least 80%", 10.0, 8.0, 7.9),
        ("at most 12", 6.2, 12.0, 12.1),
    ],
)
def test_tolerances_have_a_direction(tolerance, value, allowed, refused):
    assert Tolerance(tolerance).allows(allowed, value)
    assert not Tolerance(tolerance).allows(refused, value)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda runs: runs[0].update(seed="0"), None),
        (lambda runs: runs[0].pop("date"), r"runs\[0\] \(closed-forms\) lacks date"),
        (lambda runs: runs[0].update(day=1), r"has the field 'day'; the fields are"),
        (lambda runs: runs[0].update(ci="yes"), r"ci='yes', expected true or false"),
        (lambda runs: runs[0].update(size="middle"), r"size='middle', expected small or long"),
        (lambda runs: runs[0].update(commit="main"), r"commit='main', expected a commit"),
        (lambda runs: runs[0].update(machine="mine"), r"machine='mine', expected one of"),
        (lambda runs: runs[0].update(after=["quickstart"]), r"after=.*expected ids of runs above this one"),
        (lambda runs: runs[1].update(id=runs[0]["id"]), r"the id 'closed-forms' is there twice"),
        (lambda runs: runs[0]["claims"][0].update(tolerance="about 3"), r"tolerance='about 3', expected `exactly`"),
        (lambda runs: runs[0]["claims"][0].update(value="many"), r"value='many', expected a number or a list"),
        (lambda runs: runs[0]["claims"][0].pop("reads"), r"needs one of `reads`, `counts` and `proven`"),
        (lambda runs: runs[0]["claims"][0].update(reads="("), r"is no regular expression"),
        (
            lambda runs: runs[1]["tables"][0]["rows"].update(more=[1, 2]),
            r"row 'more' has 2 values, expected one for each",
        ),
        (lambda runs: runs[1]["tables"][0].update(missed=["some"]), r"missed=\['some'\], expected .*: \[\]"),
        (
            lambda runs: runs[1]["tables"][0].update(bounds={"bias": "at most 40"}),
            r"expected .*'categorical . Gumbel-s",
        ),
        (
            lambda runs: runs[1]["tables"][0].update(bounds={"bias": "about 40"}),
            r"bounds\['bias'\]='about 40', expected",
        ),
        (lambda runs: runs[0]["claims"][0].update(bound="at least 99", met=True), r"met=True, but 64 misses its bound"),
    ],
)
def test_a_file_that_is_not_valid_is_refused_in_a_sentence(tmp_path, break_it, message):
    text = PATH.read_text()
    given = yaml.safe_load(text[: text.index("- id: random-access")] + "exceptions: []\n")
    break_it(given["runs"])
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(given))
    if message is None:
        assert len(read_claims(tmp_path / "claims.yaml").runs) == 2
        return
    with pytest.raises(UserError, match=message):
        read_claims(tmp_path / "claims.yaml")


# ---- the commands ---------------------------------------------------------------------------------------------------


class ParsedError(Exception):
    """Arguments are right; nothing is to be run."""


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_are_ones_that_there_are(line, monkeypatch, tmp_path):
    """Each is read to the end of its arguments, and not run."""
    _, words = words_of(line)
    monkeypatch.chdir(tmp_path)
    if words[0] == "zellige":
        commands, rest = (CODES_COMMANDS, words[2:]) if words[1] == "codes" else (COMMANDS, words[1:])
        name, arguments = (rest[0], rest[1:]) if words[1] != "codes" else (words[2], words[3:])
        assert callable(commands[name].prepare(arguments))
        return
    assert words[:2] == ["python", "-m"], words
    if words[2] == "pytest":
        assert all((ROOT / word).is_file() for word in words[3:] if word.startswith("tests/"))
        return
    module = import_module(words[2])

    def parse(parser: argparse.ArgumentParser, _arguments: object = None) -> None:
        unknown = argparse.ArgumentParser.parse_known_args(parser, words[3:])[1]
        assert not unknown, unknown
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(ParsedError):
        module.main()


def test_commits_of_claims_are_of_this_history():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no history here")
    commits = sorted({run.commit for run in CLAIMS.runs})
    found = subprocess.run(
        ["git", "cat-file", "--batch-check"],
        input="\n".join(commits),
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    if (ROOT / ".git" / "shallow").exists():
        pytest.skip("a shallow history")
    assert all(" commit " in line for line in found), found


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_the_quick_figures_come_out():
    done = run_claims(ROOT, "--ci")
    assert done.returncode == 0, done.stdout + done.stderr
    for run in CLAIMS.runs:
        if run.ci:
            assert f"| {run.id} | | took" in done.stdout


def test_tables_that_commands_print_are_read_as_those_of_the_pages_are():
    for run in CLAIMS.runs:
        for entry in run.tables:
            page = (ROOT / entry.where).read_text()
            assert all(row.right for row in judge_table(entry, page, run.size)), entry.id
    entry = next(run for run in CLAIMS.runs if run.id == "gradient-estimators").tables[0]
    page = (ROOT / entry.where).read_text()
    worse = page.replace("| Gaussian | reparameterised | yes | 0.63% |", "| Gaussian | reparameterised | yes | 0.93% |")
    first, *others = judge_table(entry, worse, "small")
    assert not first.right
    assert first.found == "15 of 16 cells; Gaussian | reparameterised: [0.93] for [0.63]"
    assert all(row.right for row in others)
    lost = worse.replace("| bound | VIMCO |", "| bound | another |")
    assert [row.found.partition(";")[0] for row in judge_table(entry, lost, "small")] == [
        "14 of 16 cells", *["15 of 16 cells"] * 3
    ]  # fmt: skip
    assert not any(row.right for row in judge_table(entry, "nothing", "small"))
    assert [row.right for row in judge_table(entry, "nothing", "long")] == [None]


def test_figures_are_read_from_what_is_printed_last():
    claims = {claim.id: claim for run in CLAIMS.runs for claim in run.claims}
    psnr = claims["quickstart-psnr"]
    assert judge_claim(psnr, "PSNR 20.0 dB\nPSNR 24.1 dB, 128 of 128").right
    assert not judge_claim(psnr, "PSNR 24.1 dB\nPSNR 23.9 dB").right
    assert judge_claim(psnr, "nothing").right is False
    assert judge_claim(claims["quickstart-bits-per-dimension"], "2.26 bits per code").found == "0.14125"
    killed = claims["killed-runs-equal"]
    assert judge_claim(killed, "killed after steps 1, 2, 3, 4, 5, and continued").right
    assert not judge_claim(killed, "killed after steps 1, 2, 3, 4, and continued").right
    assert judge_claim(claims["cifar10-psnr"], "PSNR 25.4 dB").right is None  # a long run: a person reads it


def test_a_figure_broken_on_purpose_is_red(copy):
    change(copy / "docs" / "format.md", "51 for a grid of 16x16 codes of 1024", "52 for a grid of 16x16 codes of 1024")
    done = run_claims(copy, "--ids", "zlg-head-grid")
    assert done.returncode == 1
    assert "zlg-head-grid: docs/format.md says '51 for a grid of 16x16 codes of 1024' nowhere" in done.stderr
    claims = (copy / "docs" / "claims.yaml").read_text()
    claims = claims.replace("51 for a grid", "52 for a grid").replace("value: 51,", "value: 52,")
    (copy / "docs" / "claims.yaml").write_text(claims)
    done = run_claims(copy, "--ids", "zlg-head-grid")
    assert done.returncode == 1
    assert "| zlg-head-grid | 52 bytes | 51 | exactly | WRONG |" in done.stdout


def test_a_command_that_fails_is_red_and_what_is_not_at_hand_is_skipped(copy):
    path = copy / "docs" / "claims.yaml"
    change(path, "command: python -m benchmarks.closed_forms", "command: python -m benchmarks.closed_forms --no-such")
    done = run_claims(copy, "--ids", "zlg-head-grid")
    assert done.returncode == 1
    assert re.search(r"\| closed-forms \|.*ended with 2: .*no-such.*WRONG", done.stdout)
    if find_spec("vector_quantize_pytorch") is None:
        done = run_claims(copy, "--ids", "quantizer-quality")
        assert done.returncode == 0
        assert "the package vector_quantize_pytorch, the run systems is not at hand" in done.stdout
    done = run_claims(copy, "--ids", "no-such-claim")
    assert done.returncode == 1
    assert "there is no claim, table or run 'no-such-claim'" in done.stderr
