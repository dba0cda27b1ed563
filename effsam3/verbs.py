# SPDX-License-Identifier: Apache-2.0
"""The table of verbs: what each does, the function that does it, and its arguments."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

from effsam3.data_verbs import DATA_VERBS
from effsam3.verb import Verb, arg, count


def nodes(text: str) -> int | str:
    """Parse --nodes for argparse: a number above 0, or slurm."""
    if text != "slurm" and not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is neither a number nor slurm")
    return text if text == "slurm" else count(text)


# ---- verbs that are more than one call


def show(recipe: Any, key: str | None, budget: bool, device_gib: float | None) -> None:
    """Print the recipe at once, and what takes seconds after it."""
    from effsam3 import show as verb

    print(verb.show(recipe, key), flush=True)
    if key is None and (budget or device_gib is not None):
        print(verb.budget(recipe, device_gib))


def launch(recipe: str, overrides: list[str], log_dir: str | None, resume: str | None, **machines: Any) -> int:
    """Run verbs of a recipe as processes."""
    from effsam3 import launch as verb

    return verb.launch(recipe, overrides, verb.Machines(**machines), log_dir, resume)


def status(runs: list[str], watch: int | None, as_json: bool) -> str | None:
    """Report on runs, once or again and again."""
    from effsam3 import status as verb

    return verb.watch(runs, watch, as_json) if watch else verb.status(runs, as_json)


def predict(model: str, source: str, out: str | None, **prompts: Any) -> None:
    """Check the prompts, which need not wait for torch, and predict."""
    from effsam3.models.inference.prompt_options import parse, refuse_swapped

    asked = parse(**prompts)
    refuse_swapped(model, source)
    from effsam3 import predict as verb

    verb.run(model, source, asked, out)


# ---- arguments that several verbs have

RESUME = (
    "auto: resume this run's newest checkpoint, if there is one (the default); never: refuse to resume; PATH: "
    "begin with another run's checkpoint of the same recipe"
)
RUNS = arg("runs", metavar="RUN", nargs="+", help="a run folder such as runs/smoke-image, or the recipe of a run")
JSON = arg("--json", dest="as_json", action="store_true", help="the same for programs, exact")

VERBS = {
    "show": Verb(
        "print the resolved recipe and the numbers that follow from it; needs no GPU and no data",
        show,
        [
            arg("--key", help="print this one value only, such as hardware or optim.lr"),
            arg(
                "--budget",
                action="store_true",
                help="also estimate the memory of each device and the disk; takes seconds, for stage 2 up to a minute",
            ),
            arg(
                "--device-gib",
                type=float,
                metavar="GIB",
                help="--budget, and whether a device with this memory is enough, and what to change if not",
            ),
        ],
        recipe="loaded",
    ),
    "embed": Verb(
        "run the teacher once over the images and save its embeddings",
        "embed:run",
        [arg("--check", type=count, metavar="N", help="only recompute N stored samples and compare")],
        recipe="loaded",
    ),
    "train": Verb(
        "train the student on the teacher's embeddings; the same command resumes after an interruption",
        "train:run",
        [arg("--resume", metavar="WHAT", default="auto", help=RESUME)],
        recipe="loaded",
    ),
    "merge": Verb(
        "put trained students into SAM 3 and write one transformers folder, on request sam3.pt and others",
        "merge:run",
        [
            arg(
                "--format",
                metavar="FORMAT",
                dest="overrides_by_option",
                type="merge.formats=[{}]".format,
                action="append",
                help="transformers, sam3 or efficientsam3, several with commas; short for merge.formats=[...]",
            )
        ],
        recipe="loaded",
    ),
    "evaluate": Verb(
        "measure the merged model against the teacher and the annotations, and draw pictures",
        "evaluate:run",
        recipe="loaded",
    ),
    "launch": Verb(
        "run one verb, or all four in order, on the recipe's `hardware`",
        launch,
        [
            arg("--nodes", type=nodes, metavar="N", help="number of machines; slurm: from the srun step"),
            arg("--node-rank", type=int, metavar="K", help="rank of this machine, from 0; 0 merges and evaluates"),
            arg("--main-address", metavar="HOST", help="name or IP address of node 0"),
            arg("--main-port", type=int, metavar="P", help="a free port of node 0, the same on all nodes"),
            arg(
                "--processes-per-node",
                type=count,
                metavar="G",
                help="such as 4 where the hardware's config was written for machines of 8 GPUs",
            ),
            arg(
                "--log-dir",
                metavar="FOLDER",
                help="keep what each rank prints in a file of its own, below FOLDER/node-K",
            ),
            arg("--resume", metavar="WHAT", help=f"for train. {RESUME}"),
        ],
        recipe="path",
        more=". The verb (embed, train, merge or evaluate) comes before any key=value; without it all four run in "
        "order. docs/cluster.md explains the options for several machines.",
    ),
    "push": Verb(
        "upload the merged model with its card, numbers and pictures to the Hugging Face Hub",
        "push:run",
        [arg("--dry-run", action="store_true", help="write the card and list the files; send nothing")],
        recipe="loaded",
    ),
    "status": Verb(
        "show the state of runs from their files: progress, losses, checkpoints, what to do next",
        status,
        [RUNS, arg("--watch", type=count, metavar="SECONDS", help="print it again until all runs have ended"), JSON],
    ),
    "plot": Verb(
        "draw the curves of one run, or of several next to each other, as one picture",
        "plot:plot",
        [
            RUNS,
            arg(
                "--out",
                metavar="FILE",
                help="a .png, .pdf or .svg; default: curves.png in the folder of one run, next to several",
            ),
            arg(
                "--metrics",
                metavar="NAMES",
                help="at most six names of metrics.jsonl with commas, such as loss,val/cosine",
            ),
            arg(
                "--smooth",
                type=float,
                metavar="WEIGHT",
                help="weight of the past in the smoothed lines, 0: none; default: 0.9, of short curves less",
            ),
        ],
    ),
    "predict": Verb(
        "find or track things on an image or in a video by text, boxes or points",
        predict,
        [
            arg("model", metavar="MODEL", help="merged or run folder, checkpoint, Hub id, tiny"),
            arg("source", metavar="INPUT", help="an image, a video or a folder of frames"),
            arg(
                "--text",
                dest="texts",
                metavar="TEXT",
                action="append",
                default=[],
                help="find all instances of this; may be repeated",
            ),
            arg(
                "--box",
                dest="boxes",
                action="append",
                default=[],
                metavar="X1,Y1,X2,Y2[,LABEL]",
                help="in pixels: an object, on a video's first frame; with --text an example (label 0: of what "
                "it is not)",
            ),
            arg(
                "--point",
                dest="points",
                action="append",
                default=[],
                metavar="X,Y[,LABEL]",
                help="in pixels: a point on the object, or next to it (label 0), on a video's first frame",
            ),
            arg("--mask", metavar="PNG", help="objects on a video's first frame, one per value above 0"),
            arg("--threshold", type=float, metavar="SCORE", help="of --text; default: 0.5, in a video 0.7"),
            arg("--out", metavar="FOLDER", help="default: predictions/<name of INPUT>"),
        ],
    ),
    "recipes": Verb("list the recipes that come with effsam3, by their short names", "shipped:listing"),
    "recipes copy": Verb(
        "begin a recipe of your own that inherits one of these",
        "shipped:copy",
        [
            arg("name", metavar="NAME", help="short name of a recipe, as `effsam3 recipes` lists them"),
            arg("file", metavar="FILE", nargs="?", help="the new file; default: <end of NAME>.yaml"),
        ],
    ),
    "import": Verb(
        "turn an EfficientSAM3 checkpoint into a model that can be evaluated, trained on and released",
        "import_student:run",
        [
            arg("path", metavar="PATH", help="an EfficientSAM3 .pt: image student, text student or both"),
            arg("--to", metavar="FOLDER", help="the new folder; default: runs/<name of the file>/merged"),
            arg("--sam3", metavar="CHASSIS", help="the SAM 3 that gives what the file lacks, as sam3.checkpoint"),
            arg("--dry-run", action="store_true", help="report what is in the file; write nothing"),
        ],
    ),
    "compare": Verb(
        "print the parameter tables: SAM 3, every student, what each saves",
        "compare:compare",
        [arg("others", nargs="*", metavar="timm/NAME", help="further image students, of timm"), JSON],
    ),
    "inspect": Verb(
        "tell what a checkpoint is, who fills its slots, how big its parts are; loads nothing",
        "inspect_model:inspect",
        [arg("path", metavar="PATH", help="a model, run or step-* folder, a .pt file or a Hub id"), JSON],
    ),
    **DATA_VERBS,
}
