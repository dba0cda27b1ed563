# SPDX-License-Identifier: Apache-2.0
"""The verb `train`: one explicit loop for every stage and every layout.

accelerate launch --config_file accelerate_configs/zero2.yaml scripts/train.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from effsam3 import checkpoint
from effsam3.accelerator import launched_processes, layout, make_accelerator
from effsam3.data.loader import loader
from effsam3.data.sampler import StepSampler, sequential_batches
from effsam3.errors import UserError
from effsam3.layouts import layout_file, layout_processes
from effsam3.optim import adamw, lr_at
from effsam3.recipe import accumulation, differing_keys, dump_recipe, load_recipe, total_steps, warmup_steps
from effsam3.report import Report, provenance, write_text
from effsam3.stages import make_stage
from effsam3.trackers import start_trackers

STOPPED = 75  # exit code after SIGTERM or SIGUSR1: the run is saved and the same command goes on (EX_TEMPFAIL)
# What may differ between a run and its continuation: nothing here changes what is learned.
FREE_KEYS = ("hardware", "data.workers", "data.max_unreadable", "export.batch_size", "evaluate.", "merge.") + tuple(
    f"train.{key}"
    for key in (
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "patience",
        "trackers",
        "wandb_project",
        "runs",
    )
)


class Stop:
    """Remembers a request to stop, so that it is obeyed between two steps."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        self.asked = True


def run(recipe) -> None:
    """Train the recipe's student; go on from the newest checkpoint in its run folder if there is one.

    Raises:
        UserError: the run folder holds a run of another recipe, a batch cannot be divided over the layout, the loss is
            not finite, or too many images are unreadable.
        SystemExit: code 75 after SIGTERM or SIGUSR1, with everything saved.
    """
    # ---- setup
    stop = Stop()
    micros = accumulation(recipe, launched_processes())
    folder = Path(recipe.train.runs) / recipe.name
    accelerator = make_accelerator(
        recipe.train.precision,
        micros,
        recipe.train.micro_batch_size,
        recipe.optim.clip_grad_norm,
        recipe.train.trackers,
        str(folder),
    )
    report = Report(folder, accelerator.is_main_process)
    last = resumable(recipe, folder)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    stage = make_stage(recipe, report, accelerator)
    steps, warmup = (count(recipe, len(stage.train_data)) for count in (total_steps, warmup_steps))
    optim = recipe.optim
    optimizer = adamw(stage.student, optim.lr, optim.weight_decay, optim.betas, optim.eps)
    ema = make_ema(recipe, accelerator, stage.student)
    student, optimizer = accelerator.prepare(stage.student.train(), optimizer)

    # ---- resume
    state = {"step": 0, "best": None, "untrained": None, "worse": 0, "unreadable": 0}
    if last is not None:
        accelerator.load_state(str(last / "state"))
        state |= json.loads((last / "trainer.json").read_text())
        if ema is not None:
            ema.module.load_state_dict(load_file(last / checkpoint.WEIGHTS))
        report.forget_metrics_after(state["step"])
    announce(recipe, stage, accelerator, report, steps, micros, state)
    average = None if ema is None else ema.module
    if state["step"] == 0:
        state["untrained"] = validate(recipe, stage, accelerator, average or student)
        report.metrics(state["untrained"], 0)
        report.say(f"step {0:>6}/{steps}  held out: {line_of(state['untrained'])}  (untrained)")

    # ---- loop
    batches = iter(train_loader(recipe, stage, accelerator, state["step"], steps))
    bar = progress_bar(accelerator, steps, state["step"])
    window = Window(accelerator, recipe.train.global_batch_size)
    for step in range(state["step"], steps):
        lr = lr_at(step, steps, warmup, optim.lr, optim.min_lr, optim.warmup_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        unreadable = 0
        for micro in range(micros):
            batch = window.wait_for(batches)
            unreadable += name_unreadable(batch, folder, step)
            # Dropout and drop path depend on where in the run they are drawn, not on what ran before.
            torch.manual_seed(sample_seed(recipe.train.seed, step, micro, accelerator.process_index))
            with accelerator.accumulate(student):
                parts = stage.loss(student, batch)
                accelerator.backward(parts["loss"])
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(student.parameters(), optim.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            window.add(parts)
        if ema is not None:
            ema.update(accelerator.unwrap_model(student), step=step + 1)
        bar.update()

        state["step"] = done = step + 1
        asked, unreadable = agree(accelerator, stop.asked, unreadable)
        state["unreadable"] += unreadable
        if state["unreadable"] > recipe.data.max_unreadable:
            raise UserError(
                f"{state['unreadable']} images could not be read, more than data.max_unreadable="
                f"{recipe.data.max_unreadable}; {folder}/unreadable.jsonl names them. Repair them or build the index "
                "again"
            )
        final, improved = done == steps, False
        if final or done % recipe.train.log_every == 0:
            values = window.close(lr, grad_norm)
            if not math.isfinite(values["train/loss"]):
                raise UserError(
                    f"the loss is {values['train/loss']} by step {done}; the last checkpoint is intact. Lower "
                    "optim.lr, lengthen the warm-up, or set train.precision=fp32"
                )
            record(accelerator, report, values, done, step_line(done, steps, values))
        if final or done % recipe.train.eval_every == 0:
            values = validate(recipe, stage, accelerator, average or student)
            improved = state["best"] is None or values[stage.metric] > state["best"][stage.metric]
            state["worse"] = 0 if improved else state["worse"] + 1
            if improved:
                state["best"] = {"step": done, **values}
            line = f"step {done:>6}/{steps}  held out: {line_of(values)}{'  best' if improved else ''}"
            record(accelerator, report, values, done, line)
        enough = 0 < recipe.train.patience <= state["worse"]
        if improved or asked or final or enough or done % recipe.train.save_every == 0:
            checkpoint.save(
                accelerator, student, average, folder / "checkpoints", state, recipe.train.keep_checkpoints, improved
            )
        if asked and not final:
            report.say(f"asked to stop: saved at step {done}; the same command goes on from there")
            accelerator.end_training()
            sys.exit(STOPPED)
        if enough:
            report.say(f"no better for {state['worse']} validations in a row: stopping at step {done}")
            break

    # ---- finish
    bar.close()
    accelerator.end_training()
    report.say("\n" + stage.conclude(state["untrained"], state["best"]))
    if state["unreadable"]:
        report.say(f"{state['unreadable']} samples were unreadable and left out: {folder}/unreadable.jsonl")
    report.say(f"\nnext: effsam3 merge {folder}/recipe.yaml")


def resumable(recipe, folder: Path) -> Path | None:
    """Return the checkpoint to go on from, None for a fresh run.

    Raises:
        UserError: the folder holds a run of a recipe that would learn something else.
    """
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        return None
    differing = [
        key for key in differing_keys(load_recipe(folder / "recipe.yaml"), recipe) if not key.startswith(FREE_KEYS)
    ]
    if differing:
        raise UserError(
            f"{folder} holds a run of another recipe ({'; '.join(differing)}); choose another name, or delete the "
            "folder"
        )
    return last


def make_ema(recipe, accelerator, student):
    """The moving average of the weights that the recipe asks for, None without one."""
    if not recipe.train.ema:
        return None
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise UserError(
            "train.ema needs whole weights on every rank, ZeRO-3 divides them; set train.ema=0 or another layout"
        )
    from timm.utils import ModelEmaV3

    return ModelEmaV3(student, decay=recipe.train.ema, device=accelerator.device)


def validate(recipe, stage, accelerator, model) -> dict[str, float]:
    """The stage's numbers on the held-out images, over all ranks; leaves the model in the mode it was in."""
    training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    batches = sequential_batches(
        len(stage.val_data), recipe.train.micro_batch_size, accelerator.process_index, accelerator.num_processes
    )
    for batch in loader(stage.val_data, batches, recipe.data.workers, pin=False):
        for name, value in stage.validate(model, batch).items():
            sums[name] = sums.get(name, 0) + value
    model.train(training)
    return stage.summarise({name: accelerator.reduce(value) for name, value in sums.items()})


def train_loader(recipe, stage, accelerator, start: int, steps: int):
    """This rank's micro-batches from step `start` on."""
    sampler = StepSampler(
        len(stage.train_data),
        recipe.train.seed,
        recipe.train.global_batch_size,
        recipe.train.micro_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    pin = accelerator.device.type == "cuda"
    return loader(stage.train_data, sampler.micro_batches(start, steps), recipe.data.workers, pin)


def progress_bar(accelerator, steps: int, done: int) -> tqdm:
    """A bar on rank 0's terminal; a log file gets plain lines only."""
    shown = accelerator.is_main_process and sys.stderr.isatty()
    return tqdm(total=steps, initial=done, unit="step", disable=not shown)


def record(accelerator, report: Report, values: dict[str, float], step: int, line: str) -> None:
    """Send numbers to metrics.jsonl, the trackers and the console."""
    report.metrics(values, step)
    accelerator.log(values, step)
    report.say(line)


def agree(accelerator, asked: bool, unreadable: int) -> tuple[bool, int]:
    """Let all ranks take the same decision: whether any was asked to stop, and the sum of unreadable images."""
    counts = accelerator.reduce(torch.tensor([int(asked), unreadable], device=accelerator.device)).tolist()
    return counts[0] > 0, counts[1]


def name_unreadable(batch: dict, folder: Path, step: int) -> int:
    """Write the batch's unreadable images to unreadable.jsonl; returns their number."""
    for key, reason in batch["unreadable"]:
        with open(folder / "unreadable.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "key": key, "reason": reason}) + "\n")
    return len(batch["unreadable"])


def sample_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """One random stream for every (seed, step, micro-batch, rank)."""
    return hash((seed, step, micro, rank)) & 0x7FFF_FFFF_FFFF_FFFF


class Window:
    """Sums up the steps since the last report."""

    def __init__(self, accelerator, global_batch: int):
        self.accelerator, self.global_batch = accelerator, global_batch
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.micros, self.waited, self.started = 0, 0.0, time.perf_counter()

    def wait_for(self, batches) -> dict:
        """Take the next batch and count how long that takes."""
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def add(self, parts: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's losses, without waiting for the device."""
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.micros += 1

    def close(self, lr: float, grad_norm) -> dict[str, float]:
        """Return the window's means over all ranks and its speed, and begin the next window."""
        names = list(self.sums)
        means = self.accelerator.reduce(
            torch.stack([self.sums[name] for name in names]) / self.micros, "mean"
        ).tolist()
        seconds = time.perf_counter() - self.started
        images = self.micros / self.accelerator.gradient_accumulation_steps * self.global_batch
        values = {f"train/{name}": value for name, value in zip(names, means, strict=True)}
        values |= {"train/lr": lr, "perf/images_per_s": images / seconds, "perf/data_wait": self.waited / seconds}
        if grad_norm is not None:  # DeepSpeed keeps it to itself at stage 0
            values["train/grad_norm"] = float(grad_norm)
        if self.accelerator.device.type == "cuda":
            values["perf/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._reset()
        return values


def announce(recipe, stage, accelerator, report: Report, steps: int, micros: int, state: dict) -> None:
    """Print what the run is and what it will take, keep its recipe and provenance, start the trackers."""
    epochs = steps * recipe.train.global_batch_size / len(stage.train_data)
    batch = (
        f"{recipe.train.global_batch_size} = {recipe.train.micro_batch_size} per device x {accelerator.num_processes} "
        f"x {micros} accumulated; {steps:,} steps = {epochs:.1f} epochs"
    )
    resumed = f"   (going on from step {state['step']:,})" if state["step"] else ""
    report.header(
        f"train    {recipe.name}   {layout(accelerator)}   {recipe.train.precision}",
        stage.describe() | {"batch": batch, "run": f"{report.folder}{resumed}"},
    )
    declared = layout_processes(layout_file(recipe.hardware))
    if declared != accelerator.num_processes:
        report.say(
            f"the recipe names hardware: {recipe.hardware} ({declared} processes); on {accelerator.num_processes} it "
            "learns the same, only BatchNorm's batch is the micro-batch either way"
        )
    if accelerator.is_main_process:
        write_text(report.folder / "recipe.yaml", dump_recipe(recipe))
    facts = {"layout": layout(accelerator), "data": recipe.data.index, "features": stage.facts}
    report.write_json("provenance.json", provenance() | facts)
    note = start_trackers(
        accelerator, recipe.train.trackers, recipe.train.wandb_project, recipe.name, report.folder, asdict(recipe)
    )
    if note:
        report.say(note)


def step_line(step: int, steps: int, values: dict[str, float]) -> str:
    """One fixed-width console line."""
    shown = {name.removeprefix("train/"): value for name, value in values.items() if name.startswith("train/")}
    lr, grad_norm = shown.pop("lr"), shown.pop("grad_norm", math.nan)
    losses = "  ".join(f"{name} {value:8.4f}" for name, value in shown.items())
    speed, waited = values["perf/images_per_s"], values["perf/data_wait"]
    return (
        f"step {step:>6}/{steps}  {losses}  lr {lr:.1e}  grad {grad_norm:7.3f}  {speed:7.1f} img/s  wait {waited:4.0%}"
    )


def line_of(values: dict[str, float]) -> str:
    """Validation numbers in one line."""
    return "  ".join(f"{name.split('/')[-1]} {value:.4f}" for name, value in values.items())
