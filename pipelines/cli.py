"""The program `zellige`: one subcommand per job. Nothing heavy is imported before a subcommand is chosen."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from common.errors import NO_SPACE, STOPPED_CODE, Stopped, UserError
from common.memory import keep_freed_memory
from common.wording import either

Job = Callable[[], str]
"""Does what the command says; returns the one line that tells what was made and where."""


def from_arguments(module: str) -> Callable[[Sequence[str]], Job]:
    """A command that reads its arguments itself: `prepare` of a module."""
    return lambda arguments: own_module(module).prepare(arguments)


def from_options(
    command: str, module: str, config_class: str, function: str, **bare: str
) -> Callable[[Sequence[str]], Job]:
    """A command that is `function(config)` of a module, its options the fields of a config class there. bare: which
    of them are given without their names, the arguments `listed` and `first` of `read_options`."""

    def prepare(arguments: Sequence[str]) -> Job:
        from pipelines.options import read_options

        code = own_module(module)
        config = read_options(command, getattr(code, config_class), arguments, **bare)
        return lambda: getattr(code, function)(config)

    return prepare


def own_module(name: str) -> Any:
    """A module of this package, which has another name where `pipelines` is somebody else's (zellige/shadowing.py)."""
    return import_module(name.removeprefix("pipelines"), __package__)


# What torch's process groups say when another process is gone, or has not answered for as long as they wait.
LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket (closed|[Tt]imeout)|[Tt]imed out|[Tt]imeout"
    r"|remote process exited|ncclRemoteError|recvValue failed|sendBytes failed"
)
ANOTHER_ENDED = (
    "another process of this job has ended, or does not answer: what it said last tells why; what is saved is whole, "
    "and the same command continues"
)


class Command(NamedTuple):
    help: str
    prepare: Callable[[Sequence[str]], Job]  # reads and checks the arguments


CODES_COMMANDS = {
    "info": Command(
        "show what the shards hold, and how evenly their codes are used",
        from_options("codes info", "pipelines.commands.codes", "CodesInfoConfig", "info"),
    ),
    "verify": Command(
        "read every byte and compare it with the index",
        from_options("codes verify", "pipelines.commands.codes", "CodesVerifyConfig", "verify"),
    ),
    "export": Command(
        "write them as .npz files or as tar files for webdataset",
        from_options("codes export", "pipelines.commands.codes", "CodesExportConfig", "export"),
    ),
}


def codes(arguments: Sequence[str]) -> Job:
    """`zellige codes ACTION`: the action's own job."""
    if not arguments:
        raise UserError(f"codes needs an action, got none; the actions are {', '.join(CODES_COMMANDS)}")
    arguments = help_in_front(arguments)
    if arguments[0] in ("-h", "--help"):
        print(usage_of("codes ACTION", CODES_COMMANDS))
        sys.exit(0)
    return named(arguments[0], CODES_COMMANDS, "action of codes").prepare(arguments[1:])


COMMANDS = {
    "quickstart": Command(
        "train both stages on bundled MNIST digits and draw samples: minutes on a CPU",
        from_options("quickstart", "pipelines.commands.quickstart", "QuickstartConfig", "quickstart"),
    ),
    "train-stage1": Command(
        "train an autoencoder: images to codes and back", from_arguments("pipelines.commands.train_stage1")
    ),
    "train-vae": Command(
        "train a likelihood VAE: images to continuous latents and back",
        from_arguments("pipelines.commands.train_vae"),
    ),
    "train-table": Command(
        "train a likelihood VAE of a table: rows of numbers, some missing, or of counts",
        from_arguments("pipelines.commands.train_table"),
    ),
    "profile": Command(
        "tell what limits a training, by a few of its steps: `profile train-stage1 ...`",
        from_arguments("pipelines.commands.profile"),
    ),
    "encode": Command(
        "turn images into code shards, with a trained autoencoder",
        from_options("encode", "pipelines.commands.encode", "EncodeConfig", "encode_images"),
    ),
    "codes": Command("look into code shards, check them, export them", codes),
    "train-stage2": Command("train a prior on code shards", from_arguments("pipelines.commands.train_stage2")),
    "import": Command(
        "make a model folder of a model that another project published",
        from_options("import", "pipelines.commands.import_weights", "ImportConfig", "import_weights"),
    ),
    "assemble": Command(
        "put an autoencoder and its prior together into one model folder",
        from_options("assemble", "pipelines.commands.assemble", "AssembleConfig", "assemble"),
    ),
    "generate": Command(
        "write new images", from_options("generate", "pipelines.commands.generate", "GenerateConfig", "generate_files")
    ),
    "inpaint": Command(
        "draw what is not kept of images",
        from_options("inpaint", "pipelines.commands.inpaint", "InpaintConfig", "inpaint_files"),
    ),
    "train-sequence": Command(
        "train a likelihood VAE of sequences: lines of a text, or drawings of a pen",
        from_arguments("pipelines.commands.train_sequence"),
    ),
    "write": Command(
        "write new texts or drawings of a VAE of sequences",
        from_options("write", "pipelines.commands.write", "WriteConfig", "write_sequences"),
    ),
    "impute": Command(
        "fill in the missing numbers of a table",
        from_options("impute", "pipelines.commands.impute", "ImputeConfig", "impute_file"),
    ),
    "encode-table": Command(
        "turn the rows of a table into latents, and counts into denoised ones",
        from_options("encode-table", "pipelines.commands.encode_table", "EncodeTableConfig", "encode_file"),
    ),
    "vary": Command(
        "draw a share of the codes of images anew",
        from_options("vary", "pipelines.commands.vary", "VaryConfig", "vary_files"),
    ),
    "analogies": Command(
        "keep the style of images and change their class, with a VAE that knows some",
        from_options("analogies", "pipelines.commands.analogies", "AnalogiesConfig", "analogy_files"),
    ),
    "interpolate": Command(
        "walk from one image to another, code by code",
        from_options("interpolate", "pipelines.commands.interpolate", "InterpolateConfig", "interpolate_files"),
    ),
    "evaluate": Command(
        "measure reconstructions, codes, likelihood and samples, and say how",
        from_options("evaluate", "pipelines.commands.evaluate", "EvaluateConfig", "evaluate"),
    ),
    "translate": Command(
        "tell classes or texts of images, images of those, or images of their halves",
        from_options("translate", "pipelines.commands.translate", "TranslateConfig", "translate"),
    ),
    "cluster": Command(
        "sort images into the clusters of a VAE",
        from_options("cluster", "pipelines.commands.cluster", "ClusterConfig", "cluster_images"),
    ),
    "diagnose": Command(
        "tell why samples look bad although reconstructions are good: one page",
        from_options("diagnose", "pipelines.commands.diagnose", "DiagnoseConfig", "diagnose"),
    ),
    "report": Command(
        "put runs and models side by side on one page: curves, codebook, samples",
        from_options("report", "pipelines.commands.report", "ReportConfig", "report", listed="runs"),
    ),
    "reconstruct": Command(
        "show how images look after encoding and decoding, with their PSNR",
        from_options("reconstruct", "pipelines.commands.reconstruct", "ReconstructConfig", "reconstruct_files"),
    ),
    "demo": Command(
        "try a model in the browser: a page on this machine",
        from_options("demo", "pipelines.commands.demo", "DemoConfig", "demo", first="model"),
    ),
    "tables": Command(
        "count codes, so that a model compresses without its prior too",
        from_options("tables", "pipelines.commands.tables", "TablesConfig", "add_tables"),
    ),
    "compress": Command(
        "turn images into small .zlg files",
        from_options("compress", "pipelines.commands.compress", "CompressConfig", "compress_files"),
    ),
    "decompress": Command(
        "turn .zlg files into images",
        from_options("decompress", "pipelines.commands.decompress", "DecompressConfig", "decompress_files"),
    ),
    "info": Command(
        "show what a .zlg file holds, and how good it is",
        from_options("info", "pipelines.commands.info", "InfoConfig", "describe_file"),
    ),
}


def usage_of(command: str, commands: Mapping[str, Command]) -> str:
    width = max(map(len, ["--version", *commands])) + 2
    return "\n".join(
        [
            f"usage: zellige {command} [options]      zellige {command} --help shows its options",
            "",
            *(f"  {name:<{width}}{choice.help}" for name, choice in commands.items()),
            "",
            f"  {'--debug':<{width}}show the traceback of an error",
            f"  {'--version':<{width}}show the version",
        ]
    )


def help_in_front(arguments: Sequence[str]) -> list[str]:
    """`help COMMAND` as `COMMAND --help`."""
    return [*arguments[1:], "--help"] if arguments[:1] == ["help"] else [*arguments]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 when it has finished, 2 for what the user can mend, 75 where it was
    asked to stop and saved what it did (trainings), 130 after a Ctrl-C that ended it at once."""
    keep_freed_memory()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # torchrun takes `--num` and `--run` for abbreviations of its own options unless a bare -- stands before ours.
    given = [argument for i, argument in enumerate(given) if argument != "--debug" and (i, argument) != (0, "--")]
    process = int(os.environ.get("RANK", "0"))  # set by torchrun and accelerate launch
    prepared = False
    try:
        given = help_in_front(given)
        if not given or given[0] in ("-h", "--help"):
            print(usage_of("COMMAND", COMMANDS))
            return 0 if given else 2
        if given[0] == "--version":
            from importlib.metadata import version

            print(f"zellige {version('zellige')}")
            return 0
        job = named(given[0], COMMANDS, "command").prepare(given[1:])
        prepared = True
        summary = job()
        if process == 0:
            print(summary, flush=True)
    except Stopped as stopped:
        if process == 0:
            print(stopped, flush=True)
        return STOPPED_CODE
    except BrokenPipeError:  # who reads what we print has seen enough: `zellige generate --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError, KeyboardInterrupt, RuntimeError) as error:
        if debug or not (message := explain(error)):
            raise
        # All processes refuse the same arguments: one says so. What fails later may fail on one alone.
        if process == 0:
            print(f"zellige: {message}", file=sys.stderr)
        elif prepared:
            print(f"zellige, process {process}: {message}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    return 0


def named(name: str, commands: Mapping[str, Command], what: str) -> Command:
    if name not in commands:
        meant = [known for known in commands if name and known.startswith(name)]
        meant = meant or difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {either(meant)}?" if meant else f"the {what.partition(' ')[0]}s are {', '.join(commands)}"
        raise UserError(f"there is no {what} {name!r}; {hint}")
    return commands[name]


def explain(error: BaseException) -> str | None:
    """One sentence for what the user can mend; None for anything else, which deserves its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command continues where it stopped"
    if isinstance(error, RuntimeError):
        return ANOTHER_ENDED if "LOCAL_RANK" in os.environ and LOST.search(str(error)) else None
    if isinstance(error, OSError):
        if error.errno in NO_SPACE:
            where = error.filename or "while writing"
            return f"the disk is full ({where}); free some space and repeat the command"
        if error.filename and error.errno in (errno.EACCES, errno.EPERM):
            return f"no permission for {error.filename}; choose another file or folder, or change its owner"
        return None
    return str(error)
