# SPDX-License-Identifier: Apache-2.0
"""The command `effsam3 VERB ...`. A verb's module, and torch with it, is imported only when that verb runs."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from effsam3 import __version__
from effsam3.errors import RecipeError, UserError, did_you_mean
from effsam3.stopping import STOP, STOPPED, Stopped, stopped_at_once

# verb -> what it does
VERBS = {
    "show": "print the resolved recipe and the numbers that follow from it; needs no GPU and no data",
    "embed": "run the teacher once over the images and store its features",
    "train": "train the student on the stored features; the same command goes on after an interruption",
    "status": "say how runs are, from their files: state, progress, losses, checkpoints, what to do next",
    "plot": "draw the curves of one run, or of several beside each other, as one picture",
    "merge": "put trained students into SAM 3 and write one transformers folder, on request sam3.pt and others",
    "evaluate": "measure the merged model against the teacher and the annotations, and draw pictures",
    "predict": "find or track things on an image or in a video by text, boxes or points",
    "push": "upload the merged model with its card, numbers and pictures to the Hugging Face Hub",
    "launch": "run one verb, or all four in order, on the recipe's `hardware`",
    "import": "turn an EfficientSAM3 checkpoint into a model that can be evaluated, trained on and released",
    "compare": "print the parameter tables: SAM 3, every student, what each saves",
    "inspect": "say what a checkpoint is, who fills its slots, how big its parts are; loads nothing",
    "store": "show, verify or import a store of teacher features",
}
SAVING = ("embed", "train")  # verbs that finish and keep what they are at when they are asked to stop
RECIPE_HELP = "YAML file of one run, such as recipes/stage1/image/es_rv_m.yaml, or the folder of a run that has begun"
FULL_DISK = "; make room, the same command goes on from what is saved"
RUN_HELP = "a run folder such as runs/smoke-image, or the recipe of a run"
RESUME_HELP = (
    "auto: go on from this run's newest checkpoint, if there is one (the default); never: refuse to go on; PATH: "
    "begin with another run's checkpoint of the same recipe"
)
OVERRIDES_HELP = "change single keys of the recipe, such as optim.lr=5e-4 or train.loggers=[wandb]"


def main(argv: Sequence[str] | None = None, verb: str | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 (a check failed), 2 (something for the user to mend) or 75 (asked to
    stop, and the same command goes on).

    `argv` defaults to the process's own arguments; `verb` is given by scripts that are one verb each.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if verb is None:
            if not argv or argv[0] in ("-h", "--help"):
                print(_usage(), flush=True)
                return 0 if argv else 2
            if argv[0] == "--version":
                print(f"effsam3 {__version__}", flush=True)
                return 0
            verb = argv.pop(0)
        with STOP.noted() if verb in SAVING else stopped_at_once():
            return _run(verb, argv)
    except RecipeError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank has the same recipe: say it once
            print(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return STOPPED if isinstance(interrupt, Stopped) else 130
    except BrokenPipeError:  # `effsam3 show ... | head`
        sys.stdout = None
        return 0
    except OSError as error:  # a full disk, a folder that cannot be written: the message names it
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"error: {error}{FULL_DISK if full else ''}", file=sys.stderr)
        return 2


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<9} {meaning}" for verb, meaning in VERBS.items())
    return (
        f"usage: effsam3 VERB ...\n\nDistil SAM 3 into a small student.\n\n{verbs}\n\n"
        "A whole run:   effsam3 launch recipes/smoke/image.yaml\n"
        "More of one:   effsam3 VERB --help"
    )


def _parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of a verb, without the arguments that are its own."""
    # allow_abbrev: an abbreviated option would change its meaning when a longer one is added.
    return argparse.ArgumentParser(prog=f"effsam3 {verb}", description=VERBS[verb], allow_abbrev=False)


def _run(verb: str, argv: list[str]) -> int:
    if verb not in VERBS:
        raise UserError(f"no verb is called {verb!r}{did_you_mean(verb, VERBS)}")
    if verb == "store":
        from effsam3.data.store.tool import main as store_main

        return store_main(argv)
    parser = _parser(verb)
    if verb == "compare":
        parser.add_argument("students", nargs="*", metavar="timm/NAME", help="further image students, of timm")
        parser.add_argument("--json", action="store_true", help="the same numbers, exact, for programs")
        arguments = parser.parse_args(argv)
        from effsam3.compare import compare

        print(compare(arguments.students, as_json=arguments.json))
        return 0
    if verb == "inspect":
        parser.add_argument("path", metavar="PATH", help="a model, run or step-* folder, a .pt file or a Hub id")
        parser.add_argument("--json", action="store_true", help="the same facts for programs")
        arguments = parser.parse_args(argv)
        from effsam3.inspect_model import inspect

        print(inspect(arguments.path, as_json=arguments.json))
        return 0
    if verb == "import":
        parser.add_argument("path", metavar="PATH", help="an EfficientSAM3 .pt: image student, text student or both")
        parser.add_argument("--to", metavar="FOLDER", help="the new folder; default: runs/<name of the file>/merged")
        parser.add_argument(
            "--sam3", metavar="CHASSIS", help="the SAM 3 that gives what the file lacks, as sam3.checkpoint"
        )
        parser.add_argument("--dry-run", action="store_true", help="say what is in the file; write nothing")
        arguments = parser.parse_args(argv)
        from effsam3.import_student import run as run_import

        run_import(arguments.path, arguments.to, arguments.sam3, arguments.dry_run)
        return 0
    if verb == "predict":
        return _predict(parser, argv)
    if verb == "status":
        return _status(parser, argv)
    if verb == "plot":
        return _plot(parser, argv)
    refuse_dashes(argv)
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    # No default, and argparse would ask for them where the recipe is missing.
    overrides = parser.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES_HELP)
    overrides.required = False
    if verb == "launch":
        verbs = "embed, train, merge or evaluate, before any key=value; without it all four run in order"
        parser.description += f". VERB is {verbs}."
        parser.usage = "effsam3 launch [-h] [options] RECIPE [VERB] [key=value ...]"
        _add_machines(parser)
    if verb == "show":
        parser.add_argument("--key", help="print this one value only, such as hardware or optim.lr")
        budget_help = "also estimate the memory of each device and the disk; takes seconds, for stage 2 up to a minute"
        parser.add_argument("--budget", action="store_true", help=budget_help)
        gib_help = "--budget, and whether a device of so much memory is enough, and what to change if not"
        parser.add_argument("--device-gib", type=float, metavar="GIB", help=gib_help)
    if verb == "embed":
        parser.add_argument("--check", type=_count, metavar="N", help="only recompute N stored samples and compare")
    if verb in ("train", "launch"):
        parser.add_argument("--resume", metavar="WHAT", help=RESUME_HELP)
    if verb == "merge":
        formats = "transformers, sam3 or efficientsam3, more of them with commas; short for merge.formats=[...]"
        parser.add_argument("--format", metavar="FORMAT", help=formats)
    if verb == "push":
        parser.add_argument("--dry-run", action="store_true", help="write the card and list the files; send nothing")
    arguments = parser.parse_intermixed_args(argv)
    if verb == "launch":
        from effsam3.launch import Machines, launch

        machines = Machines(
            arguments.nodes,
            arguments.node_rank,
            arguments.main_address,
            arguments.main_port,
            arguments.processes_per_node,
        )
        return launch(arguments.recipe, arguments.overrides, machines, arguments.log_dir, arguments.resume)

    from effsam3.recipe.reader import load_recipe, refuse_verb

    if verb == "merge" and arguments.format is not None:
        arguments.overrides.append(f"merge.formats=[{arguments.format}]")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    refuse_verb(recipe, verb)
    if verb == "show":
        from effsam3.show import budget, show

        print(show(recipe, arguments.key), flush=True)
        if arguments.key is None and (arguments.budget or arguments.device_gib is not None):
            print(budget(recipe, arguments.device_gib))
    elif verb == "embed":
        from effsam3 import embed

        embed.run(recipe, check=arguments.check)
    elif verb == "train":
        from effsam3 import train
        from effsam3.training.resume import AUTO

        train.run(recipe, resume=arguments.resume or AUTO)
    elif verb == "merge":
        from effsam3 import merge

        merge.run(recipe)
    elif verb == "evaluate":
        from effsam3 import evaluate

        evaluate.run(recipe)
    elif verb == "push":
        from effsam3 import push

        push.run(recipe, dry_run=arguments.dry_run)
    return 0


def refuse_dashes(argv: Sequence[str]) -> None:
    """Refuse keys of a recipe that are spelled as options.

    Raises:
        UserError: naming the right spelling.
    """
    from effsam3 import stages

    sections = {field for stage in stages.STAGES for field in stages.recipe_class(stage).__dataclass_fields__}
    for place, word in enumerate(argv):
        key, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and key.split(".")[0] in sections:
            following = argv[place + 1 : place + 2]
            if not equals and following and "=" not in following[0]:
                word, value = f"{word} {following[0]}", following[0]
            raise UserError(f"{word}: keys of a recipe are given as {key}={value or 'VALUE'}, without dashes")


def _add_machines(parser: argparse.ArgumentParser) -> None:
    """Add what `launch` is told of the machines; without any of it the hardware's own numbers hold."""
    group = parser.add_argument_group("several machines, and machines of another size (docs/cluster.md)")
    nodes = "number of machines; slurm: number and rank are those of the srun step that this is a task of"
    group.add_argument("--nodes", type=_nodes, metavar="N", help=nodes)
    group.add_argument(
        "--node-rank", type=int, metavar="K", help="which of them this is, from 0; 0 merges and evaluates"
    )
    group.add_argument("--main-address", metavar="HOST", help="name or IP address of node 0")
    group.add_argument("--main-port", type=int, metavar="P", help="a free port of node 0, the same on all nodes")
    per_node = "such as 4 where the hardware's config was written for machines of 8 GPUs"
    group.add_argument("--processes-per-node", type=_count, metavar="G", help=per_node)
    log_dir = "keep what each rank prints in a file of its own, below FOLDER/node-K"
    group.add_argument("--log-dir", metavar="FOLDER", help=log_dir)


def _nodes(text: str) -> int | str:
    """Parse --nodes for argparse: a number above 0, or slurm."""
    if text != "slurm" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor slurm")
    return text if text == "slurm" else _count(text)


def _predict(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("model", metavar="MODEL", help="merged or run folder, checkpoint, Hub id, tiny")
    parser.add_argument("source", metavar="INPUT", help="an image, a video or a folder of frames")
    parser.add_argument("--text", action="append", default=[], help="find all instances of this; may be repeated")
    box = "X1,Y1,X2,Y2[,LABEL]"
    box_help = "in pixels: an object, on a video's first frame; with --text an example (label 0: of what it is not)"
    parser.add_argument("--box", action="append", default=[], metavar=box, help=box_help)
    point_help = "in pixels: a point on the object, or beside it (label 0), on a video's first frame"
    parser.add_argument("--point", action="append", default=[], metavar="X,Y[,LABEL]", help=point_help)
    parser.add_argument("--mask", metavar="PNG", help="objects on a video's first frame, one per value above 0")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="of --text; default: 0.5, in a video 0.7")
    parser.add_argument("--out", metavar="FOLDER", help="default: predictions/<name of INPUT>")
    arguments = parser.parse_args(argv)
    from effsam3.models.inference.prompt_options import parse, refuse_swapped

    asked = parse(arguments.text, arguments.box, arguments.point, arguments.mask, arguments.threshold)
    refuse_swapped(arguments.model, arguments.source)
    from effsam3 import predict  # torch, which wrong prompts need not wait for

    predict.run(arguments.model, arguments.source, asked, arguments.out)
    return 0


def _status(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN_HELP)
    watch_help = "print it again every so many seconds until all runs have ended"
    parser.add_argument("--watch", type=_count, metavar="SECONDS", help=watch_help)
    parser.add_argument("--json", action="store_true", help="the same for programs: a list, an object per run")
    arguments = parser.parse_args(argv)
    from effsam3.status import status, watch

    if arguments.watch:
        watch(arguments.runs, arguments.watch, arguments.json)
    else:
        print(status(arguments.runs, arguments.json))
    return 0


def _plot(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN_HELP)
    out_help = "a .png, .pdf or .svg; default: curves.png in the folder of one run, beside the first of several"
    parser.add_argument("--out", metavar="FILE", help=out_help)
    metrics_help = "at most six names of metrics.jsonl with commas, such as loss,val/cosine"
    parser.add_argument("--metrics", metavar="NAMES", help=metrics_help)
    smooth_help = "weight of the past in the smoothed lines, 0: none; default: 0.9, of short curves less"
    parser.add_argument("--smooth", type=float, metavar="WEIGHT", help=smooth_help)
    arguments = parser.parse_args(argv)
    from effsam3.plot import plot

    print(plot(arguments.runs, arguments.out, arguments.metrics, arguments.smooth))
    return 0


def _count(text: str) -> int:
    """Parse a number above 0 for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
