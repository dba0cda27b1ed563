# SPDX-License-Identifier: Apache-2.0
"""What becomes of small students of a tiny concept teacher: a table of cgF1, IL_MCC and pmF1, and a picture.

    effsam3 launch smoke/tiny_concept_teacher                       # the teacher, and what it has drawn
    python scripts/concept_table.py runs/tiny-concept-teacher data/tiny-concepts

Every row is one run of a stage in a folder of its own; a finished one is not repeated, so rows and seeds can be added
(`--rows`, `--seeds`), and two processes can share the work by seeds once `--rows teacher` is done. Rows `control`
learn features for as much processor time as the row `both` takes.

Rows after `ruined` repeat choices of EfficientSAM3's training, one at a time and together. Those that are keys of a
recipe are overrides; the others, which no recipe offers, are context managers of `concept_rows.py`, marked WRONG.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from concept_rows import FIRST, IMAGE, PROMPTED, ROWS, RUINED, model_of
from matplotlib.figure import Figure

from effsam3 import embed, merge, train
from effsam3.benchmarks.results import Results
from effsam3.files import atomic_file, write_json, write_text
from effsam3.models.chassis.find import chassis_folder
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.concepts import ConceptEvaluate
from effsam3.recipe.reader import load_recipe
from effsam3.stages import base, concept_pairs
from effsam3.training.report import table

ENOUGH = 0.97  # share of the processor time of its row that a control has at least
NUMBERS = ("cgF1", "IL_MCC", "pmF1")


# ---- running them


@dataclass(frozen=True)
class Bench:
    """What all rows have in common."""

    teacher: str
    data: Path
    to: Path
    steps: int  # of what goes through the heads
    pairs: int

    def run(self, name: str, seed: int) -> Path:
        """The run folder of a row."""
        return self.to / f"{name}-s{seed}"

    def asked(self) -> ConceptEvaluate:
        """What every model is measured on."""
        return ConceptEvaluate(
            benchmarks=("concepts",),
            concepts=str(self.data / "held_out.json"),
            max_pairs=self.pairs,
            concept_pictures=0,
        )

    def recipe(self, name: str, seed: int, steps: int | None = None) -> StageRecipe:
        """The recipe of a row; `steps` where they are known better than by the row."""
        row = ROWS[name]
        start = str(self.run(row.after, seed)) if row.after else self.teacher
        usual, photographs = self.steps, (
            "data.source=folder", f"data.folder={self.data / 'train'}", "data.synthetic_images=0",
            f"data.index={self.to / 'photographs.parquet'}",
        )  # fmt: skip
        common = [
            f"name={name}-s{seed}", f"train.runs={self.to}", f"train.seed={seed}", "merge.checkpoint=last",
            "train.log_every=100", "train.eval_samples=48", "optim.min_lr=1e-5", "optim.warmup_lr=0",
            "optim.clip_grad_norm=1", "data.workers=0",
        ]  # fmt: skip
        if row.recipe == IMAGE:
            own = [
                *photographs, f"sam3.checkpoint={self.teacher}", "head=linear", f"embed.to={self.to / 'store'}",
                "embed.pixels=true", "embed.dtype=float16", "optim.lr=2e-3", "optim.warmup_steps=30",
                "train.global_batch_size=16", "train.micro_batch_size=16", "evaluate.benchmarks=[fidelity]",
            ]  # fmt: skip
            if row.after:
                own.append(f"student_init={start}")
            if row.as_long_as:
                usual = self.equal_steps(name, seed)
        elif row.recipe == PROMPTED:
            own = [
                *photographs, f"sam3.checkpoint={start}", f"teacher.checkpoint={self.teacher}",
                f"teacher.store={self.to / 'store'}", "optim.lr=2e-3", "optim.warmup_steps=20",
                "train.global_batch_size=6", "train.micro_batch_size=6",
            ]  # fmt: skip
        else:
            own = [
                "data.source=concepts", "data.synthetic_images=0", f"data.path={self.data / 'train.json'}",
                f"data.val_path={self.data / 'held_out.json'}", f"sam3.checkpoint={start}",
                f"teacher.checkpoint={self.teacher}",
                "model.trainable=[vision_encoder.backbone, vision_encoder.neck]", "optim.lr=4e-3",
                "optim.warmup_steps=20", "train.global_batch_size=6", "train.micro_batch_size=6",
            ]  # fmt: skip
        # Later overrides win, so a row's own come last.
        lines = [*common, *own, f"train.steps={usual}", *row.overrides, *([f"train.steps={steps}"] if steps else [])]
        total = next(line for line in reversed(lines) if line.startswith("train.steps=")).partition("=")[2]
        return load_recipe(row.recipe, [*lines, f"train.eval_every={total}", f"train.save_every={total}"])

    def equal_steps(self, name: str, seed: int) -> int:
        """How many steps of `after` take the processor time of `as_long_as`."""
        row = ROWS[name]
        assert row.after is not None and row.as_long_as is not None
        # By the longest run of the same student: of a short one, the first steps weigh too much.
        a_step = min(done["cpu_s"] / done["steps"] for done in (self.finished(row.after, seed), self.finished(
            "w16" if row.after == "early" else row.after, seed)) if done)  # fmt: skip
        return round(self.result(row.as_long_as, seed)["cpu_s"] / a_step)

    def finished(self, name: str, seed: int) -> dict:
        """What a row has come to, empty if it has not been run."""
        path = self.run(name, seed) / "row.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def result(self, name: str, seed: int) -> dict:
        """Run a row and what it goes on from, unless that is done; return what it has come to."""
        row = ROWS[name]
        for needed in filter(None, (row.after, row.as_long_as)):
            self.result(needed, seed)
        if done := self.finished(name, seed):
            return done
        done = self._trained(name, seed, self.recipe(name, seed))
        wanted = self.result(row.as_long_as, seed)["cpu_s"] if row.as_long_as else 0.0
        if done["cpu_s"] < ENOUGH * wanted:  # a step took longer when they were counted: the machine was busier
            steps = round(done["steps"] * wanted / done["cpu_s"])
            done = self._trained(name, seed, self.recipe(name, seed, steps))
        write_json(self.run(name, seed) / "row.json", done)
        return done

    def _trained(self, name: str, seed: int, recipe: StageRecipe) -> dict:
        """Train, merge and measure a row anew."""
        row = ROWS[name]
        folder = self.run(name, seed)
        if folder.exists():
            shutil.rmtree(folder)  # what a kill has left: a row is short
        print(f"\n==== {name}, seed {seed}: {row.title}; {recipe.train.steps} steps", flush=True)
        with ExitStack() as built:
            for wrap in model_of(row):
                built.enter_context(wrap())
            with ExitStack() as learning:
                for wrap in row.wrongs:
                    learning.enter_context(wrap())
                clock = learning.enter_context(clocked())
                fresh()
                train.run(recipe)
            merge.run(recipe)
            found = self.measure(folder)
        steps = recipe.train.steps
        assert steps is not None
        done = found | {"row": name, "seed": seed, "title": row.title, "steps": steps, "cpu_s": clock[-1] - clock[0]}
        told = "  ".join(f"{key} {done['student'][key]:.3f}" for key in NUMBERS)
        print(f"==== {name}, seed {seed}: {told}  {done['cpu_s']:.0f} CPU s", flush=True)
        return done

    def measure(self, folder: Path) -> dict:
        """Run the benchmark concepts on `folder`/merged; the teacher answers once, for all rows."""
        answers = folder / "eval" / "concepts" / "teacher"
        known = self.to / "teacher" / "eval" / "concepts" / "student"
        if known.is_dir():
            shutil.copytree(known, answers)
        results = Results(folder / "eval", "", {})
        models = {"teacher": chassis_folder(self.teacher), "student": folder / "merged"}
        concept_pairs.measure(self.asked(), folder, models, torch.device("cpu"), results)
        (subset,) = results.by_name["concepts"]["subsets"].values()
        return {model: subset["models"][model] for model in ("teacher", "student")} | {"pairs": subset["pairs"]}

    def prepare(self) -> dict:
        """Let the teacher answer, and store its features for all students."""
        folder = self.to / "teacher"
        if not (folder / "row.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "merged").exists():
                (folder / "merged").symlink_to(chassis_folder(self.teacher).resolve(), target_is_directory=True)
            fresh()
            embed.run(self.recipe("w4", 0))
            write_json(folder / "row.json", self.measure(folder))
        return json.loads((folder / "row.json").read_text())


def fresh() -> None:
    """Let the next run make its own accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def clocked() -> Iterator[list[float]]:
    """Note the processor time at every step of a training: what is loaded before and saved after does not count."""
    seen: list[float] = []
    divide = base.StageBase.divide

    def noted(self, *arguments, **options):
        for batch in divide(self, *arguments, **options):
            seen.append(time.process_time())
            yield batch
            seen.append(time.process_time())

    with mock.patch.object(base.StageBase, "divide", noted):
        yield seen


# ---- the table


def report(bench: Bench, teacher: dict, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Write table.md, table.json and table.png of all rows that are there; return the table."""
    own = teacher["student"]
    rows = {name: done for name in names if (done := [one for seed in seeds if (one := bench.finished(name, seed))])}
    lines = [["teacher", "", _cgf1(own), "100", f"{own['IL_MCC']:.2f}", f"{100 * own['pmF1']:.1f}", ""]]
    for name, done in rows.items():
        students = [one["student"] for one in done]
        share = 100 * mean(one["cgF1"] for one in students) / own["cgF1"] if own["cgF1"] else 0.0
        lines.append(
            [
                ROWS[name].title,
                f"{mean(one['steps'] for one in done):.0f}",
                " / ".join(map(_cgf1, students)),
                f"{share:.0f}",
                f"{mean(one['IL_MCC'] for one in students):.2f}",
                f"{100 * mean(one['pmF1'] for one in students):.1f}",
                f"{mean(one['cpu_s'] for one in done):.0f}",
            ]
        )
    text = table(lines, ["student", "steps", "cgF1, each seed", "% of teacher", "IL_MCC", "pmF1", "CPU s"], 1)
    write_text(bench.to / "table.md", text + "\n")
    write_json(bench.to / "table.json", {"teacher": teacher, "rows": rows})
    with atomic_file(bench.to / "table.png") as partial:
        picture(own, rows).savefig(partial, format="png")
    return text


def _cgf1(one: dict) -> str:
    low, high = one["intervals"]["cgF1"]
    return f"{100 * one['cgF1']:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def picture(teacher: dict, rows: dict[str, list[dict]]) -> Figure:
    """Draw a bar of each row's cgF1, the mean of its seeds, and their bootstrap intervals; two panels."""
    panels = {
        "Students of the tiny concept teacher": [name for name in rows if not name.startswith("ruined")],
        f"What ruins one ({ROWS[RUINED].title.split(',')[0]})": [
            name for name in rows if name.startswith("ruined") or name.split("-")[0] == RUINED
        ],
    }
    height = 1.6 + 0.34 * max(map(len, panels.values()), default=1)
    figure = Figure(figsize=(15, height), dpi=100, layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        low, high = (100 * end for end in teacher["intervals"]["cgF1"])
        axis.axvspan(low, high, color="tab:gray", alpha=0.15)
        axis.axvline(100 * teacher["cgF1"], color="tab:gray", label="teacher")
        for place, name in enumerate(names):
            students = [one["student"] for one in rows[name]]
            colour = (
                "tab:red"
                if name.startswith("ruined")
                else "tab:blue"
                if rows[name][0]["row"] in FIRST
                else "tab:green"
            )
            colour = "tab:orange" if name.endswith("-control") else colour
            axis.barh(place, 100 * mean(one["cgF1"] for one in students), color=colour, alpha=0.55)
            for number, one in enumerate(students):
                at = place + 0.3 * ((number + 0.5) / len(students) - 0.5)
                axis.plot([100 * end for end in one["intervals"]["cgF1"]], [at, at], color="black", linewidth=0.8)
                axis.plot(100 * one["cgF1"], at, ".", color="black", markersize=5)
        axis.set_yticks(range(len(names)), [ROWS[name].title for name in names], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0)
        axis.set_xlabel(
            f"cgF1 on {rows[names[0]][0]['pairs']} held-out pairs; lines: 95 % of bootstrap draws" if names else ""
        )
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a merged run of smoke/tiny_concept_teacher")
    parser.add_argument("data", type=Path, help="the folder that it drew its images into (data.path)")
    parser.add_argument("--to", type=Path, default=Path("runs/concept-table"), help="where the rows' runs go")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), metavar="ROW", help=f"teacher, {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1], metavar="N")
    parser.add_argument("--steps", type=int, default=400, help="steps of what goes through the heads")
    parser.add_argument("--pairs", type=int, default=240, help="held-out pairs to measure on")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - {"teacher", *ROWS}:
        parser.error(f"--rows: there is no {min(unknown)}; expected teacher, {', '.join(ROWS)}")
    torch.set_num_threads(1)
    bench = Bench(asked.teacher, asked.data, asked.to, asked.steps, asked.pairs)
    teacher = bench.prepare()
    for seed in asked.seeds:
        for name in ROWS:
            if name in asked.rows:
                bench.result(name, seed)
    print(f"\n{report(bench, teacher, list(ROWS), sorted({0, 1, *asked.seeds}))}\n{bench.to}/table.md, .json, .png")


if __name__ == "__main__":
    main()
