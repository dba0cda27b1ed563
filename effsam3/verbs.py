# SPDX-License-Identifier: Apache-2.0
"""The table of verbs: what each does, the function that does it, and its arguments."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from effsam3.data_verbs import DATA_VERBS
from effsam3.errors import UserError, did_you_mean
from effsam3.verb import Verb, arg, count, flag

if TYPE_CHECKING:
    from effsam3.recipe.common import Recipe


ONNX = ("onnx", "onnxscript", "onnxruntime")
RUNTIMES = {"onnx": ONNX, "openvino": (*ONNX, "openvino")}  # of `export`, named like their extras: what each needs

# Of `profile`: what it measures in, and the runtime whose packages that takes.
PROFILED = {
    "eager": "", "compiled": "", "onnxruntime": "onnx", "openvino": "openvino", "openvino_default": "openvino",
}  # fmt: skip
PARTS = (
    "trunk", "detector_neck", "text_encoder", "detector", "tracker_neck", "mask_decoder", "memory_encoder",
    "memory_attention",
)  # fmt: skip


def nodes(text: str) -> int | str:
    """Parse --nodes for argparse: a number above 0, or slurm."""
    if text != "slurm" and not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is neither a number nor slurm")
    return text if text == "slurm" else count(text)


# ---- verbs that are more than one call


def show(recipe: Recipe, key: str | None, flops: bool, budget: bool, device_gib: float | None) -> None:
    """Print the recipe at once, and what takes seconds after it."""
    from effsam3 import show as verb

    print(verb.show(recipe, key), flush=True)
    if key is None and flops:
        print(verb.flops(recipe), flush=True)
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


def predict(
    model: str,
    sources: list[str],
    out: str | None,
    device: str | None,
    images: bool,
    frames: int | None,
    **prompts: Any,
) -> None:
    """Check the prompts, which need not wait for torch, and predict."""
    from effsam3.models.inference.prompt_options import parse, refuse_swapped

    asked = parse(**prompts)
    for source in sources:
        refuse_swapped(model, source)
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs lack runs on the CPU
    from effsam3 import predict as verb

    verb.run(model, sources, asked, out, device, images, frames)


def export(model: str, to: str, **options: Any) -> None:
    """Check what need not wait for torch, and export."""
    from effsam3.extras import refuse_missing

    for package in RUNTIMES[to]:
        refuse_missing(package, f"--to {to}", to)
    from effsam3 import export as verb

    verb.run(model, to, **options)


def demo(**options: Any) -> None:
    """Serve the page, where what it needs is installed."""
    from effsam3.extras import refuse_missing

    refuse_missing("gradio", "effsam3 demo", "demo")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # as for `predict`
    from effsam3 import demo as verb

    verb.run(**options)


def profile(model: str, runtimes: str, parts: str, **options: Any) -> None:
    """Check what need not wait for torch, and measure."""
    from effsam3.extras import refuse_missing

    asked = chosen(runtimes, PROFILED, "--runtimes")
    for runtime in asked:
        for package in RUNTIMES.get(PROFILED[runtime], ()):
            refuse_missing(package, f"--runtimes {runtime}", PROFILED[runtime])
    from effsam3 import profile as verb

    verb.run(model, runtimes=asked, parts=chosen(parts, PARTS, "--parts") if parts else (), **options)


def chosen(text: str, among: Iterable[str], option: str) -> list[str]:
    """Read names with commas.

    Raises:
        UserError: a name is not among those that there are.
    """
    names = text.split(",")
    for name in names:
        if name not in among:
            raise UserError(f"{option}: there is no {name!r}{did_you_mean(name, among)}")
    return names


# ---- arguments that several verbs have

RESUME = (
    "auto: resume this run's newest checkpoint, if there is one (the default); never: refuse to resume; PATH: "
    "begin with another run's checkpoint of the same recipe"
)
RUNS = arg("runs", "a run folder such as runs/smoke-image, or the recipe of a run", metavar="RUN", nargs="+")
JSON = arg("--json", "the same for programs, exact", dest="as_json", action="store_true")
MANY: dict[str, Any] = {"action": "append", "default": []}

VERBS = {
    "show": Verb(
        "print the resolved recipe and the numbers that follow from it; needs no GPU and no data",
        show,
        [
            arg("--key", "print this one value only, such as hardware or optim.lr"),
            flag("--flops", "also count the operations of every part of the model, next to SAM 3's; takes seconds"),
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
        [
            arg("--resume", RESUME, metavar="WHAT", default="auto"),
            flag(
                "--debug",
                "try the recipe: 4 steps that print all terms, the gradient of each module and the peak memory, with "
                "validation and checkpoint, in <name>-debug, which is replaced each time",
            ),
        ],
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
        "run one verb, or all of them in order, on the recipe's `hardware`",
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
        more=". The verb (embed, train, merge or evaluate) comes before any key=value; without it all of them "
        "run in order. docs/cluster.md explains the options for several machines.",
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
    "report": Verb(
        "write one HTML file of a run: state, curves, tables, pictures to compare, recipe, environment",
        "report:report",
        [
            arg("run", "a folder of a run or a release, or its recipe", metavar="RUN"),
            arg("--out", "default: report.html in the folder", metavar="FILE"),
        ],
    ),
    "predict": Verb(
        "find or track things on images or in videos by text, boxes or points",
        predict,
        [
            arg("model", "merged or run folder, checkpoint, Hub id, tiny", metavar="MODEL"),
            arg(
                "sources",
                'images, videos, folders of frames or of videos, patterns ("*.jpg"), or the number of a webcam',
                metavar="INPUT",
                nargs="+",
            ),
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
            flag("--coarse-masks", "of --text on images: compute every second row and column only, which is cheaper"),
            arg("--out", "default: predictions/<name of INPUT>", metavar="FOLDER"),
            arg("--device", "such as cuda:1, mps or cpu; default: a GPU, where there is one", metavar="DEVICE"),
            flag("--images", "the images of a folder are images of their own, not the frames of a video"),
            arg("--frames", "of a video or webcam, stop after so many", type=count, metavar="N"),
        ],
    ),
    "export": Verb(
        "write a model as files for other runtimes, each compared with PyTorch",
        export,
        [
            arg("model", "merged or run folder, checkpoint, Hub id, tiny", metavar="MODEL"),
            arg("--to", "the runtime (default onnx)", choices=tuple(RUNTIMES), default="onnx"),
            arg(
                "--precision",
                "fp32 (the default), fp16 or, of onnx's convolutions, int8",
                choices=("fp32", "fp16", "int8"),
                default="fp32",
            ),
            arg(
                "--calibrate",
                "images: int8 takes its ranges from them; of any precision the masks on them are compared",
                metavar="FOLDER",
            ),
            arg("--out", "default: exports/<name of MODEL>-<runtime>[-<precision>]", metavar="FOLDER"),
        ],
    ),
    "demo": Verb(
        "try a model on a page in the browser: images and videos, by text, clicks and boxes",
        demo,
        [
            arg("model", "merged or run folder, checkpoint, Hub id, tiny", metavar="MODEL"),
            arg("--teacher", "another model, whose answers are shown next to it", metavar="MODEL"),
            arg("--host", "0.0.0.0 lets others on the network in", default="127.0.0.1", metavar="ADDRESS"),
            arg("--port", "default: 7860", type=count, default=7860, metavar="P"),
            arg("--device", "such as cuda:1, mps or cpu; default: a GPU, where there is one", metavar="DEVICE"),
        ],
    ),
    "profile": Verb(
        "measure what each part of a model costs on this machine, next to its teacher, in several runtimes",
        profile,
        [
            arg("model", "merged or run folder, checkpoint, Hub id, tiny, random", metavar="MODEL"),
            arg("--teacher", "another one, measured in the same turns", metavar="MODEL"),
            arg(
                "--runtimes",
                f"with commas, of {', '.join(PROFILED)} (default eager,onnxruntime)",
                metavar="NAMES",
                default="eager,onnxruntime",
            ),
            arg("--parts", "up to the last of these, with commas; default: all", metavar="NAMES", default=""),
            arg("--rounds", "timed calls of each part (default 5)", type=count, metavar="N", default=5),
            arg("--out", "default: profiles/<name of MODEL>", metavar="FOLDER"),
        ],
    ),
    "recipes": Verb("list the recipes that come with effsam3, by their short names", "shipped:listing"),
    "new": Verb(
        "begin a recipe of your own, with comments and with marks at what you must change",
        "new:new",
        [
            arg("name", "of the recipe and of its run's folder", metavar="NAME"),
            arg(
                "--stage",
                "image, text, memory, video, adapt, release: the stage's recipe with all its comments",
                metavar="STAGE",
            ),
            arg("--from", "or this one, a short name of `effsam3 recipes`, as it is", dest="source", metavar="RECIPE"),
            arg("--out", "the new file; default: NAME.yaml", metavar="FILE"),
        ],
    ),
    "import": Verb(
        "turn a checkpoint of EfficientSAM3 or SAM 3.1 into a model that can be evaluated, trained on and released",
        "import_student:run",
        [
            arg(
                "path",
                "an EfficientSAM3 .pt (image student, text student or both), or sam3.1_multiplex.pt",
                metavar="PATH",
            ),
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
    "leaderboard": Verb(
        "join what `evaluate` has found of several runs, next to published numbers of other models",
        "leaderboard:leaderboard",
        [RUNS, arg("--out", "folder for leaderboard.md, .json and .png", metavar="FOLDER")],
    ),
    "zoo": Verb(
        "write the page of released models: slots, parameters, operations, scores, formats, licence",
        "zoo:zoo",
        [
            arg(
                "runs",
                "a folder of a release, or its recipe; without any the page says so",
                metavar="RUN",
                nargs="*",
            ),
            arg("--out", "the page, such as docs/zoo.md", metavar="FILE"),
        ],
    ),
    "inspect": Verb(
        "tell what a checkpoint is, who fills its slots, how big its parts are; loads nothing",
        "inspect_model:inspect",
        [arg("path", "a model, run or step-* folder, a .pt file or a Hub id", metavar="PATH"), JSON],
    ),
    **DATA_VERBS,
}
