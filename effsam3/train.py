# SPDX-License-Identifier: Apache-2.0
"""The verb `train`: one explicit loop for every stage, on any hardware.

accelerate launch --config_file accelerate_configs/zero2.yaml scripts/train.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from effsam3 import stages
from effsam3.data.loader import worker_failures_explained
from effsam3.errors import RecipeError
from effsam3.files import refuse_unwritable, write_text
from effsam3.hardware.accelerate_configs import read_config
from effsam3.hardware.accelerator import (
    describe_hardware,
    launched_processes,
    make_accelerator,
    on_main,
    refuse_missing_gpu,
    set_batch,
)
from effsam3.hardware.budget import find_micro_batch
from effsam3.hardware.budget.estimates import (
    Sizes,
    attempt,
    header_lines,
    measure,
    out_of_memory_explained,
    running_hardware,
)
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.derived import accumulation, total_steps, warmup_steps
from effsam3.recipe.reader import dump_recipe, flat
from effsam3.stages.protocol import Stage
from effsam3.stopping import STOP, STOPPED
from effsam3.training import checkpoint, optimizer_state
from effsam3.training.batchnorm import share_batchnorm, share_buffers
from effsam3.training.compiling import compiling_explained
from effsam3.training.debug_run import Detail, debug_recipe, replace_folder
from effsam3.training.loggers import Loggers
from effsam3.training.loss_scale import LossScale
from effsam3.training.meters import Unreadable, Window, line_of, step_line
from effsam3.training.monitor import Monitor
from effsam3.training.not_finite import NotFinite
from effsam3.training.optim import adamw, lr_at
from effsam3.training.progress import Progress
from effsam3.training.report import Report, provenance
from effsam3.training.resume import AUTO, NEVER, resumable, resume_weights, resumed_state
from effsam3.training.validation import validate

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


def run(recipe: StageRecipe, resume: str = AUTO, debug: bool = False) -> None:
    """Train the recipe's student; `resume` decides where it starts, see `resume.resumable`; `debug`: `debug_run`.

    Raises:
        UserError: the run folder holds a run of another recipe, a batch cannot be divided over the processes, the
            loss is not finite, or too many images are unreadable.
        SystemExit: code 75 after SIGTERM or SIGUSR1, with everything saved.
    """
    refuse_missing_gpu(recipe.hardware)
    if debug:
        recipe, resume = debug_recipe(recipe, resume), NEVER
    folder = recipe.folder
    # A search of an earlier start decides: another micro-batch would change what BatchNorm learns.
    recipe = recipe if debug else find_micro_batch.kept(recipe, folder)
    micros = accumulation(recipe, launched_processes())
    accelerator = make_accelerator(
        recipe.hardware,
        recipe.train.precision,
        micros,
        recipe.train.micro_batch_size,
        recipe.optim.clip_grad_norm,
        recipe.train.loggers,
        str(folder),
    )
    if recipe.train.compile and accelerator.state.deepspeed_plugin is not None:
        # Its steps learn the same; then validation meets what DeepSpeed has put into the student, and fails.
        raise RecipeError(f"train.compile does not go with DeepSpeed ({recipe.hardware}); set it to false, or use DDP")
    # Before the expensive part: a folder without write access should not cost a model's loading.
    on_main(accelerator, partial(refuse_unwritable, folder, "train.runs"))
    if debug:
        on_main(accelerator, partial(replace_folder, folder))
    report = Report(folder, accelerator.is_main_process)
    hardware = describe_hardware(accelerator)
    progress = Progress(folder, accelerator.is_main_process, hardware, recipe.train.global_batch_size)
    compiling = compiling_explained(recipe.train.compile)
    with progress, worker_failures_explained(), out_of_memory_explained(recipe), compiling:
        learn(recipe, resume, accelerator, micros, report, progress, debug)


def learn(
    recipe: StageRecipe,
    resume: str,
    accelerator: Accelerator,
    micros: int,
    report: Report,
    progress: Progress,
    debug: bool,
) -> None:
    """The body of `run`: set-up, loop and end."""
    # ---- model and data: the stage builds them from the recipe
    folder = report.folder
    # Decide first where to start: the answer must not depend on files that this start writes.
    last = resumable(recipe, folder, resume)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    stage = stages.training(recipe.stage).STAGE.from_recipe(recipe, report, accelerator)
    from effsam3.stages import needs  # with transformers' models, which take as long to import as torch: not before

    on_main(accelerator, partial(needs.room_for_checkpoints, recipe, stage.student_parameters))
    # Only a fresh run may search: a resumed one must keep the size that it has learned with.
    if recipe.train.find_micro_batch and last is None:
        recipe = find_micro_batch.run(recipe, stage, accelerator, report)
        micros = accumulation(recipe, accelerator.num_processes)
        set_batch(accelerator, recipe.train.micro_batch_size, micros)

    # ---- length, optimizer, averaged weights
    steps, warmup = (count(recipe, stage.train_size) for count in (total_steps, warmup_steps))
    optim = recipe.optim
    # Built on the bare student: accelerate and DeepSpeed wrap both together in `prepare`.
    bare = stage.student
    optimizer = adamw(bare, optim.lr, optim.weight_decay, optim.betas, optim.eps, stage.lr_scales)
    if recipe.train.sync_batchnorm:
        bare = share_batchnorm(bare, accelerator)
    ema = make_ema(recipe, accelerator, bare)

    # ---- resume; `prepare` lets the hardware divide what it divides
    state: dict[str, Any] = {"step": 0, "best": None, "untrained": None, "worse": 0, "ended": False}
    monitor = Monitor.of(recipe)
    if last is not None:
        state |= resumed_state(last, folder, steps)
        moments = resume_weights(last, bare, ema)
    if recipe.train.compile:
        stage.compile(bare)
    student, optimizer = accelerator.prepare(bare.train(), optimizer)
    scale = LossScale(accelerator, student, optimizer, recipe.train.precision)
    detail = Detail(accelerator, student, optimizer) if debug else None
    if last is not None:
        scale.restore(state)
        # After `prepare`, because only then does each rank know which part of the state is its own.
        optimizer_state.scatter(accelerator, student, optimizer, moments, state["step"] - scale.skipped)
    # Steps after the checkpoint will be taken again; their old lines would appear twice.
    report.forget_metrics_after(state["step"] if last is not None else -1)
    # Recompute: train.patience may have been raised.
    state["ended"] = state["step"] == steps or 0 < recipe.train.patience <= state["worse"]

    # ---- header, and the student as it begins
    progress.update("running", state["step"], steps)
    loggers = Loggers(accelerator, recipe.train.loggers, folder, report.say)
    # Once, on one rank, and not on a CPU: measuring takes some seconds.
    measured = accelerator.is_main_process and accelerator.device.type == "cuda"
    sizes = attempt(measure, recipe, None) if measured else None
    announce(recipe, stage, accelerator, report, loggers, steps, micros, state, sizes)
    average = None if ema is None else ema.module
    unreadable = Unreadable(folder)
    held_out = partial(validate, recipe, stage, accelerator, average or student, unreadable, loggers)
    if state["ended"]:
        report.say(f"this run is complete: {state['step']} steps, nothing to do")
    elif any_asked(accelerator):
        end_stopped(progress, report, loggers, state["step"], steps)
    # The untrained student's numbers show how much of the final ones is due to training.
    if state["step"] == 0:
        state["untrained"] = held_out(0)
        report.metrics(state["untrained"], 0)
        report.say(f"step {0:>6}/{steps}  held out: {line_of(state['untrained'])}  (at the start)")
        if any_asked(accelerator):
            end_stopped(progress, report, loggers, 0, steps)

    # ---- loop
    batches = iter(stage.train_batches(state["step"], steps, recipe.train.micro_batch_size))
    bar = progress_bar(accelerator, steps, state["step"])
    flops = None if sizes is None else sizes.flops
    window = Window(accelerator, recipe.train.global_batch_size, flops, recipe.train.per_rank)
    if recipe.train.precision == "fp32":
        window.peak = None  # the peak table is for half precision
    started, first = time.monotonic(), state["step"]
    finite = NotFinite(stage, accelerator, folder, recipe.train.not_finite == "skip")
    for step in range(state["step"], state["step"] if state["ended"] else steps):
        # ---- step
        lr = lr_at(step, steps, warmup, optim.lr, optim.min_lr, optim.warmup_lr)
        # Set, not scheduled: the rate is a function of the step, so resuming and accumulation cannot shift it.
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Losses are only collected here; without `skip`, one exchange per step decides whether all were finite.
        finite.begin(step + 1)
        for micro in range(micros):
            batch = window.wait_for(batches)
            unreadable.note(batch, step + 1)
            # Dropout and drop path depend on where in the run they are drawn, not on what ran before.
            seed_torch(accelerator.device, sample_seed(recipe.train.seed, step, micro, accelerator.process_index))
            with accelerator.accumulate(student):
                terms = finite.loss(student, batch)
                accelerator.backward(terms["loss"])
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(student.parameters(), optim.clip_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            # Kept on the device: reading a loss here would make the CPU wait for the GPU in every micro-batch.
            window.add(terms)
        if ema is not None:
            # ZeRO-3 must gather the weights, because averaging needs them whole. Without it this costs nothing.
            with optimizer_state.whole(accelerator, student) as weights:
                ema.update(weights, step=step + 1)
        bar.update()

        # ---- agree: all ranks go the same way
        state["step"] = done = step + 1
        # One exchange a step decides for all ranks. If ranks decided on their own, one would stop while the others
        # wait for it.
        judged = None if scale.skipped_step() else grad_norm  # fp16 excuses a gradient that overflowed
        asked, missing, bad = agree(accelerator, STOP.asked, len(unreadable.keys), finite.count(judged))
        # Before anything is saved: the last checkpoint must not hold weights that NaN has reached.
        finite.refuse(bad)
        unreadable.refuse(missing, stage.max_unreadable, stage.files)
        # The last step always validates and saves, whatever the intervals.
        final, improved, kept = done == steps, False, False
        due = {name: final or done % getattr(recipe.train, name) == 0 for name in ("eval_every", "save_every")}

        # ---- log
        if final or done % recipe.train.log_every == 0:
            values = window.close(lr, grad_norm) | scale.metrics()
            # Of all that there was since this start, validations and checkpoints among it.
            left_s = (time.monotonic() - started) / (done - first) * (steps - done)
            record(report, loggers, values, done, step_line(done, steps, values, left_s))
            if detail is not None:
                report.say(detail.line(grad_norm))
            progress.update("running", done, steps, values["perf/samples_per_s"])

        # ---- validate
        # Ranks have seen different samples, so their BatchNorm statistics differ; what is measured and saved must
        # agree.
        if any(due.values()) or asked:
            share_buffers(accelerator, student, average)
        if due["eval_every"]:
            with window.paused():
                values = held_out(done)
            improved, kept = monitor.enter(state, done, values, recipe.train.keep_best)
            line = f"step {done:>6}/{steps}  held out: {line_of(values)}{'  best' if improved else ''}"
            record(report, loggers, values, done, line)
            progress.update("running", done, steps)
            asked = asked or any_asked(accelerator)  # it may have taken long

        # ---- save
        enough = 0 < recipe.train.patience <= state["worse"]
        state["ended"] = final or enough
        # Best weights are saved at once: a crash later must not lose the only good ones.
        if kept or asked or enough or due["save_every"]:
            keep, home, state = recipe.train.keep_checkpoints, folder / "checkpoints", state | scale.state()
            with window.paused():
                checkpoint.save(accelerator, student, optimizer, average, home, state, keep, kept)
                if accelerator.is_main_process:
                    stage.saved(folder)
        # After saving. A run that was asked to stop at its last step is complete instead.
        if asked and not final:
            end_stopped(progress, report, loggers, done, steps)
        if enough:
            report.say(f"no better for {state['worse']} validations in a row: stopping at step {done}")
            break

    # ---- finish
    bar.close()
    progress.update("complete", state["step"], steps)
    loggers.finish()
    report.say("\n" + stage.conclude(state["untrained"], state["best"]))
    if unreadable.path.is_file():
        report.say(f"some {stage.files} were unreadable and skipped, {unreadable.path} names them")
    report.say(f"\nnext: effsam3 merge {folder}")


def make_ema(recipe: StageRecipe, accelerator: Accelerator, student: nn.Module) -> ModelEmaV3 | None:
    """Return the moving average of the weights that the recipe asks for, None without one."""
    if not recipe.train.ema:
        return None
    from timm.utils import ModelEmaV3  # a second of imports, all of timm and wandb, that other runs do without

    return ModelEmaV3(student, decay=recipe.train.ema, device=accelerator.device)


def progress_bar(accelerator: Accelerator, steps: int, done: int) -> tqdm:
    """A bar on rank 0's terminal; a log file gets plain lines only."""
    shown = accelerator.is_main_process and sys.stderr.isatty()
    return tqdm(total=steps, initial=done, unit="step", disable=not shown)


def record(report: Report, loggers: Loggers, values: dict[str, float], step: int, line: str) -> None:
    """Send numbers to metrics.jsonl, the loggers and the console."""
    report.metrics(values, step)
    report.say(line)
    loggers.log(values, step)


def agree(accelerator: Accelerator, asked: bool, unreadable: int, not_finite: Tensor) -> tuple[bool, int, int]:
    """Let all ranks take the same decision: whether any was asked to stop, and how many images were unreadable and
    losses not finite on all of them."""
    own = torch.tensor([int(asked), unreadable], device=accelerator.device)
    counts = accelerator.reduce(torch.cat([own, not_finite.reshape(1)])).tolist()
    return counts[0] > 0, counts[1], counts[2]


def any_asked(accelerator: Accelerator) -> bool:
    """Return whether any rank was asked to stop; all of them ask at the same time."""
    return accelerator.reduce(torch.tensor(int(STOP.asked), device=accelerator.device)).item() > 0


def end_stopped(progress: Progress, report: Report, loggers: Loggers, step: int, steps: int) -> NoReturn:
    """End a run that is saved at a step because it was asked to."""
    progress.update("stopped", step, steps)
    where = f"saved at step {step}; the same command resumes from there" if step else "nothing was learned yet"
    report.say(f"asked to stop: {where}")
    loggers.finish()
    sys.exit(STOPPED)


def sample_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """One random stream for every (seed, step, micro-batch, rank), the same in every version of Python and numpy."""
    return int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)[0])


def seed_torch(device: torch.device, seed: int) -> None:
    """Seed the random streams that training draws from.

    As `torch.manual_seed` does it, which also formats the call stack for each kind of device that is not there, and
    keeps it.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def announce(
    recipe: StageRecipe,
    stage: Stage,
    accelerator: Accelerator,
    report: Report,
    loggers: Loggers,
    steps: int,
    micros: int,
    state: dict[str, Any],
    sizes: Sizes | None,
) -> None:
    """Print what the run is and what it will take, keep its recipe and provenance, start the loggers."""
    epochs = f" = {steps * recipe.train.global_batch_size / stage.train_size:.1f} epochs"
    batch = (
        f"{recipe.train.global_batch_size} = {recipe.train.micro_batch_size} per device x {accelerator.num_processes} "
        f"x {micros} accumulated; {steps:,} steps{epochs}"
    )
    resumed = f"   (resuming from step {state['step']:,})" if state["step"] else ""
    lines = stage.describe() | {"batch": batch, "run": f"{report.folder}{resumed}"}
    if sizes is not None:
        lines |= header_lines(recipe, running_hardware(accelerator, recipe.hardware), sizes)
    if accelerator.is_main_process and not state["ended"]:
        from effsam3.stages import needs

        lines |= needs.header_lines(recipe, ("merge", "evaluate", "push"))
    report.header(f"train    {recipe.name}   {describe_hardware(accelerator)}   {recipe.train.precision}", lines)
    declared = read_config(recipe.hardware).processes
    if declared != accelerator.num_processes:
        report.say(
            f"the recipe names hardware: {recipe.hardware} ({declared} processes); on {accelerator.num_processes} it "
            "learns the same; BatchNorm's batch is the micro-batch either way"
        )
    if accelerator.is_main_process:
        write_text(report.folder / "recipe.yaml", dump_recipe(recipe))
    facts = {"hardware": describe_hardware(accelerator), "recipe": recipe.name, "features": stage.facts}
    made_by = provenance() | facts
    report.write_json("provenance.json", made_by)
    config = flat(recipe) | {f"provenance.{key}": value for key, value in made_by.items()}
    loggers.start(recipe.train.wandb_project, recipe.name, config, state["step"])
