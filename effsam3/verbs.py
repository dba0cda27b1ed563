# SPDX-License-Identifier: Apache-2.0
"""The table of verbs: what each does, the function that does it, and its arguments."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

Argument = tuple[str, dict[str, Any]]  # as argparse's `add_argument` takes it


def arg(name: str, text: str, **options: Any) -> Argument:
    """An argument with its help."""
    return name, {"help": text, **options}


def flag(name: str, text: str) -> Argument:
    """An option without a value."""
    return arg(name, text, action="store_true")


RECIPE = (
    arg(
        "recipe",
        "YAML file of a run, a short name such as stage1/image/es_rv_m (`effsam3 recipes`), or a run's folder",
        metavar="RECIPE",
    ),
    arg(
        "overrides",
        "change single keys of the recipe, such as optim.lr=5e-4 or train.loggers=[wandb]",
        metavar="key=value",
        nargs="*",
    ),
)


@dataclass(frozen=True)
class Verb:
    """A row of the table of verbs.

    `call` is a function, or `module:function` below effsam3, imported only when its verb runs, and torch with it. It
    is given the loaded recipe, if the verb has one, and the arguments by name. Without a loaded recipe, a text that
    it returns is printed and a number is the exit code.
    """

    does: str
    call: str | Callable[..., str | int | None]
    arguments: Sequence[Argument] = ()
    recipe: Literal["", "loaded", "path"] = ""  # path: the function loads it itself
    more: str = ""  # for the verb's own --help

    def parser(self, verb: str) -> ArgumentParser:
        """Return the parser of this row."""
        # allow_abbrev: an abbreviated option would change its meaning when a longer one is added.
        parser = ArgumentParser(prog=f"effsam3 {verb}", description=f"{self.does}{self.more}", allow_abbrev=False)
        for argument in [*(RECIPE if self.recipe else ()), *self.arguments]:
            action = parser.add_argument(argument[0], **argument[1])
            if action.nargs == "*":
                action.required = False  # argparse would ask for it where another one is missing
        return parser

    def function(self) -> Callable[..., str | int | None]:
        """Return the function, imported."""
        if not isinstance(self.call, str):
            return self.call
        module, _, name = self.call.partition(":")
        return getattr(import_module(f"effsam3.{module}"), name)


# ---- values of arguments


def count(text: str) -> int:
    """Parse a number above 0 for argparse."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{text} is not above 0")
    return number


if TYPE_CHECKING:
    from effsam3.recipe.common import Recipe


def nodes(text: str) -> int | str:
    """Parse --nodes for argparse: a number above 0, or slurm."""
    if text != "slurm" and not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is neither a number nor slurm")
    return text if text == "slurm" else count(text)


# ---- verbs that are more than one call


def show(recipe: Recipe, key: str | None, budget: bool, device_gib: float | None) -> None:
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

    if not watch:
        return verb.status(runs, as_json)
    verb.watch(runs, watch, as_json)
    return None


def predict(model: str, source: str, out: str | None, **prompts: Any) -> None:
    """Check the prompts, which need not wait for torch, and predict."""
    from effsam3.models.inference.prompt_options import parse, refuse_swapped

    asked = parse(**prompts)
    refuse_swapped(model, source)
    from effsam3 import predict as verb

    verb.run(model, source, asked, out)


def index_sa1b(**options: Any) -> str:
    """Index photographs."""
    from effsam3.data.images import index

    return _index(index, options)


def index_sav(**options: Any) -> str:
    """Index videos."""
    from effsam3.data.videos import index

    return _index(index, options)


def _index(index: Any, options: dict[str, Any]) -> str:
    out, report = options["out"], index.build_index(**options)
    return (
        f"{index.summary(report)}\nindex   {out}  ({report['seconds']} s)\n"
        f"report  {out.with_name(out.stem + '.report.json')}"
    )


def extract_frames(out: Path, **options: Any) -> int:
    """Extract frames; 1 where a video could not be read."""
    from effsam3.data.videos.extract_frames import extract_frames as extract

    extracted, kept, bad = extract(out=out, **options)
    for name in bad:
        print(f"left out: {name}", file=sys.stderr)
    print(f"{extracted} videos extracted to {out}, {kept} were there, {len(bad)} could not be read")
    return 1 if bad else 0


def store_verify(root: Path, index: Path | None) -> int:
    """Verify a store, and the images of an index; 1 where anything is damaged."""
    from effsam3.data.store.tool import verify, verify_images

    damaged = verify(root)
    return damaged if index is None else max(damaged, verify_images(root, index))


# ---- arguments that several verbs have

RESUME = (
    "auto: resume this run's newest checkpoint, if there is one (the default); never: refuse to resume; PATH: "
    "begin with another run's checkpoint of the same recipe"
)
RUNS = arg("runs", "a run folder such as runs/smoke-image, or the recipe of a run", metavar="RUN", nargs="+")
JSON = arg("--json", "the same for programs, exact", dest="as_json", action="store_true")
STORE = arg("root", "folder of the store", type=Path, metavar="STORE")
WORKERS = arg("--workers", "processes (default: one per core)", type=count)
INDEX = arg("--out", "the index to write, .parquet", required=True, type=Path)
MANY: dict[str, Any] = {"action": "append", "default": []}
SPEED: dict[str, Any] = {"choices": ("decode", "header"), "default": "decode"}
RESUMES = "The same command resumes after an interruption."

VERBS = {
    "show": Verb(
        "print the resolved recipe and the numbers that follow from it; needs no GPU and no data",
        show,
        [
            arg("--key", "print this one value only, such as hardware or optim.lr"),
            flag("--budget", "also estimate the memory of each device and the disk; takes seconds to a minute"),
            arg("--device-gib", "--budget, and what to change if this is too little", type=float, metavar="GIB"),
        ],
        recipe="loaded",
    ),
    "embed": Verb(
        "run the teacher once over the images and save its embeddings",
        "embed:run",
        [arg("--check", "only recompute N stored samples and compare", type=count, metavar="N")],
        recipe="loaded",
    ),
    "train": Verb(
        "train the student on the teacher's embeddings; the same command resumes after an interruption",
        "train:run",
        [arg("--resume", RESUME, metavar="WHAT", default="auto")],
        recipe="loaded",
    ),
    "merge": Verb(
        "put trained students into SAM 3 and write one transformers folder, on request sam3.pt and others",
        "merge:run",
        [
            arg(
                "--format",
                "transformers, sam3 or efficientsam3, several with commas; short for merge.formats=[...]",
                metavar="FORMAT",
                dest="overrides_by_option",
                type="merge.formats=[{}]".format,
                action="append",
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
            arg("--nodes", "number of machines; slurm: from the srun step", type=nodes, metavar="N"),
            arg("--node-rank", "rank of this machine, from 0; 0 merges and evaluates", type=int, metavar="K"),
            arg("--main-address", "name or IP address of node 0", metavar="HOST"),
            arg("--main-port", "a free port of node 0, the same on all nodes", type=int, metavar="P"),
            arg("--processes-per-node", "such as 4 where the hardware's config says 8", type=count, metavar="G"),
            arg("--log-dir", "keep what each rank prints in a file below FOLDER/node-K", metavar="FOLDER"),
            arg("--resume", f"for train. {RESUME}", metavar="WHAT"),
        ],
        recipe="path",
        more=". The verb (embed, train, merge or evaluate) comes before any key=value; without it all four run in "
        "order. docs/cluster.md explains the options for several machines.",
    ),
    "push": Verb(
        "upload the merged model with its card, numbers and pictures to the Hugging Face Hub",
        "push:run",
        [flag("--dry-run", "write the card and list the files; send nothing")],
        recipe="loaded",
    ),
    "status": Verb(
        "show the state of runs from their files: progress, losses, checkpoints, what to do next",
        status,
        [RUNS, arg("--watch", "print it again until all runs have ended", type=count, metavar="SECONDS"), JSON],
    ),
    "plot": Verb(
        "draw the curves of one run, or of several next to each other, as one picture",
        "plot:plot",
        [
            RUNS,
            arg("--out", "a .png, .pdf or .svg; default: curves.png in or next to the run folder", metavar="FILE"),
            arg("--metrics", "at most six of metrics.jsonl with commas, such as loss,val/cosine", metavar="NAMES"),
            arg("--smooth", "weight of the past in smoothed lines (default 0.9)", type=float, metavar="WEIGHT"),
        ],
    ),
    "predict": Verb(
        "find or track things on an image or in a video by text, boxes or points",
        predict,
        [
            arg("model", "merged or run folder, checkpoint, Hub id, tiny", metavar="MODEL"),
            arg("source", "an image, a video or a folder of frames", metavar="INPUT"),
            arg("--text", "find all instances of this; may be repeated", dest="texts", metavar="TEXT", **MANY),
            arg(
                "--box",
                "in pixels: an object, on a video's first frame; with --text an example (label 0: of what it is not)",
                dest="boxes",
                metavar="X1,Y1,X2,Y2[,LABEL]",
                **MANY,
            ),
            arg(
                "--point",
                "in pixels: a point on the object, or next to it (label 0), on a video's first frame",
                dest="points",
                metavar="X,Y[,LABEL]",
                **MANY,
            ),
            arg("--mask", "objects on a video's first frame, one per value above 0", metavar="PNG"),
            arg("--threshold", "of --text; default: 0.5, in a video 0.7", type=float, metavar="SCORE"),
            arg("--out", "default: predictions/<name of INPUT>", metavar="FOLDER"),
        ],
    ),
    "recipes": Verb("list the recipes that come with effsam3, by their short names", "shipped:listing"),
    "recipes copy": Verb(
        "begin a recipe of your own that inherits one of these",
        "shipped:copy",
        [
            arg("name", "short name of a recipe, as `effsam3 recipes` lists them", metavar="NAME"),
            arg("file", "the new file; default: <end of NAME>.yaml", metavar="FILE", nargs="?"),
        ],
    ),
    "import": Verb(
        "turn an EfficientSAM3 checkpoint into a model that can be evaluated, trained on and released",
        "import_student:run",
        [
            arg("path", "an EfficientSAM3 .pt: image student, text student or both", metavar="PATH"),
            arg("--to", "the new folder; default: runs/<name of the file>/merged", metavar="FOLDER"),
            arg("--sam3", "the SAM 3 that gives what the file lacks, as sam3.checkpoint", metavar="CHASSIS"),
            flag("--dry-run", "report what is in the file; write nothing"),
        ],
    ),
    "compare": Verb(
        "print the parameter tables: SAM 3, every student, what each saves",
        "compare:compare",
        [arg("others", "further image students, of timm", nargs="*", metavar="timm/NAME"), JSON],
    ),
    "inspect": Verb(
        "tell what a checkpoint is, who fills its slots, how big its parts are; loads nothing",
        "inspect_model:inspect",
        [arg("path", "a model, run or step-* folder, a .pt file or a Hub id", metavar="PATH"), JSON],
    ),
    "index sa1b": Verb(
        "index SA-1B, or any photographs, for training",
        index_sa1b,
        [
            arg("sources", "folder or .tar", metavar="SOURCE", nargs="+", type=Path),
            INDEX,
            arg("--val-fraction", "share held out, by a hash of the key (default 0.1)", type=float, default=0.1),
            flag("--own", "photographs of your own: named by path, divided by content, copies left out"),
            WORKERS,
            arg("--check", "decode every image (default), or read headers only: truncated ones pass", **SPEED),
            arg("--min-side", "pixels of the shorter side (default 16)", type=int, default=16),
            arg("--max-pixels", "of an image (default: Pillow's limit)", type=int, default=178_956_970),
        ],
        more=": folders (also images/{train,val} + annotations/{train,val}), tars as downloaded (read in place), or "
        f"folders of tars. {RESUMES}",
    ),
    "index sav": Verb(
        "index SA-V's training set",
        index_sav,
        [
            arg("sources", "searched with its subfolders", metavar="FOLDER", nargs="+", type=Path),
            INDEX,
            arg("--val-fraction", "share held out, by a hash of the id (default 0.02)", type=float, default=0.02),
            WORKERS,
            arg("--check", "decode every video (default), or only count frames: damage passes", **SPEED),
        ],
        more=": folders with <id>_manual.json, <id>_auto.json and <id>.mp4, or folders <id> of the frames that "
        f"`effsam3 extract frames` writes. {RESUMES}",
    ),
    "fetch recap": Verb(
        "download captions of Recap-DataComp-1B",
        "data.captions.fetch:fetch",
        [
            arg("--out", "folder for the parquet files", required=True, type=Path),
            arg("--fraction", "of the train files (default 0.01)", type=float, default=0.01),
            arg("--repo", "dataset on the Hub (default: Recap-DataComp-1B)"),
            arg("--revision", "commit, branch or tag (default: the newest)"),
            flag("--verify", "also check the files that are already there"),
        ],
        more=": the first 1 % of its train files, about 9 million captions. The same command, or one with a larger "
        "fraction, keeps whole files. HF_ENDPOINT names a mirror, HF_TOKEN (or `hf auth login`) a login.",
    ),
    "extract frames": Verb(
        "extract frames of videos as JPEGs",
        extract_frames,
        [
            arg("sources", "folders with subfolders", metavar="VIDEO_OR_FOLDER", nargs="+", type=Path),
            arg("--out", "folder for a folder of frames per video", required=True, type=Path),
            arg("--every", "frames 0, N, 2N ... (default 4: 24 to 6 per second)", type=int, default=4, metavar="N"),
            arg("--quality", "of the JPEGs, 1 to 95 (default 95)", type=int, default=95),
            WORKERS,
        ],
        more=", FOLDER/<video>/<number of the frame>.jpg: every fourth frame of SA-V's 24 per second are the "
        "annotated ones. A video's folder appears when it is complete; run again, complete ones are kept.",
    ),
    "store show": Verb("tell what a store of embeddings holds", "data.store.tool:show", [STORE]),
    "store verify": Verb(
        "read every record of a store and compare its checksum",
        store_verify,
        [STORE, arg("--index", "also compare the bytes of every image of this index", type=Path)],
    ),
    "store import": Verb(
        "make upstream's rank*-values.bin readable without copying them",
        "data.store.tool:import_",
        [
            arg("source", "folder that upstream's exporter wrote", type=Path),
            arg("root", "new folder for the manifest", type=Path),
            arg("--channels", "channels of a record, where its size is not a known one", type=int),
            arg("--grid", "rows and columns of a record, given with --channels", type=int),
        ],
    ),
}
