# SPDX-License-Identifier: Apache-2.0
"""One's own videos: chosen modules of a tracker learn from clips of them, in place.

Letters: B clips, T frames of a clip, O objects of all clips, S image side in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from effsam3.data.synthetic.drawn_masks import synthetic_masks
from effsam3.data.synthetic.videos import make_synthetic_sav
from effsam3.data.unreadable import Unreadable
from effsam3.data.videos.held_out import describe_split, split_videos
from effsam3.data.videos.own_clips import OwnClips
from effsam3.data.videos.vos import named_by, open_frames, open_vos, recognise
from effsam3.data.videos.vos_video import VosVideo
from effsam3.errors import UserError
from effsam3.files import stamp
from effsam3.hardware.accelerator import on_main
from effsam3.losses.masks import frame_weights
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.tensors import fingerprint, load_part, read_config, read_tensors
from effsam3.models.memory.attention import memory_tokens
from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.prompts import PromptStyle, draw_kind, draw_prompt
from effsam3.models.memory.slot import in_whole_model
from effsam3.models.memory.student import Scoring, TrackerStudent
from effsam3.models.memory.tracker import EfficientTracker, efficient_tracker_tensors
from effsam3.models.memory.trainable import find_trainable, unused_of
from effsam3.models.memory.training import Prompts, read_tracker_tensors
from effsam3.models.trainable import count_parameters, outermost
from effsam3.stages.protocol import Batch, Place, Stage
from effsam3.stages.tracking import ClipInputs, TrackerStage, refuse_zero3
from effsam3.stages.video.facts import TERMS, VideoData, VideoPrompts, VideoRecipe
from effsam3.training.report import Report, table

SHOWN = 3  # places of a module in the header; the others are counted
MIB = 2**20

# ---- videos


def open_videos(data: VideoData, path: str, split: str | None) -> list[VosVideo]:
    """Return the videos of a path; where `data.masks` is synthetic, with drawn masks instead of their own.

    Raises:
        UserError: as `open_vos`.
    """
    if data.masks == "given":
        return open_vos(path, split)
    return synthetic_masks(open_frames(path), seed=0, objects=data.objects)


def val_source(data: VideoData) -> tuple[str, str]:
    """Return the key that names where held-out videos are, and that path."""
    return ("data.path", data.path) if data.val_path is None else ("data.val_path", data.val_path)


def videos_of(data: VideoData) -> tuple[list[VosVideo], list[VosVideo]]:
    """Return the videos to learn from and those that are held out.

    Raises:
        UserError: there are none, or in no known format, or all of them are held out; it names the key.
    """
    with named_by("data.path", "data.split"):
        videos = open_videos(data, data.path, data.split)
    if data.val_path is None and data.val_split is None:
        try:
            train, val = split_videos(videos, data.held_out)
        except Unreadable as fault:
            raise UserError(
                f"data.path: its only video cannot be read ({fault}); run effsam3 data check {data.path}"
            ) from fault
    else:
        key, path = val_source(data)
        with named_by(key, "data.val_split"):
            train, val = videos, open_videos(data, path, data.val_split)
    if data.val_path is None:
        # Without data.split, `videos` are all of them, those on the list of held-out ones as well.
        held_out = {video.name for video in val}
        train = [video for video in train if video.name not in held_out]
        if not train:
            raise UserError(f"data.val_split: {data.val_split!r} leaves no video of {data.path} to learn from")
    return train[: data.limit], val[: data.limit]


def draw_videos(data: VideoData) -> None:
    """Draw the videos of `data.source: synthetic`, once.

    Raises:
        UserError: others are there.
    """
    folder = Path(data.path)
    videos, frames, side_px = data.synthetic_videos, data.synthetic_frames, data.synthetic_side_px
    made = {"videos": videos, "frames": frames, "side_px": side_px, "look": data.look}
    stamp(folder / "synthetic.json", made, "synthetic videos", "data.path", real=folder)
    make_synthetic_sav(folder, videos, frames, side_px, look=data.look)


def clips_of(recipe: VideoRecipe, image_size: int) -> tuple[OwnClips, OwnClips]:
    """Return clips to learn from and held-out ones, S = `image_size`.

    Raises:
        UserError: as `videos_of`, or the videos of one of them cannot be read.
    """
    data, train = recipe.data, recipe.train
    videos, held_out = videos_of(data)
    shape = dict(
        image_size=image_size,
        frames=data.frames,
        objects=data.objects,
        seed=train.seed,
        stride=data.stride,
        cache_bytes=data.mask_cache_mib * MIB,
    )
    clips = OwnClips(videos, **shape, reverse=data.reverse, augment=data.augment)
    val_clips = OwnClips(held_out[: train.eval_samples], **shape, reverse=0.0, augment=False)
    clips.refuse_unreadable("training", "data.path", data.path)
    val_clips.refuse_unreadable("held-out", *val_source(data))
    return clips, val_clips


def videos_to_learn_from(recipe: VideoRecipe) -> None:
    """Videos with masks that can be read, some of them to hold out."""
    if recipe.data.source != "synthetic":
        clips_of(recipe, config_at_hand(recipe.sam3.checkpoint).tracker_config.image_size)


NEEDS = (videos_to_learn_from,)


# ---- the tracker


def make_tracker(own: PreTrainedConfig) -> EfficientTracker:
    """Build the chassis' tracker, whose config is `own`; SAM 3's own memory is the mode `dense` of ours."""
    if not isinstance(own, EfficientTrackerConfig):
        inherited = {name: value for name, value in own.to_dict().items() if name != "model_type"}
        own = EfficientTrackerConfig(**inherited, memory_mode="dense")
    return EfficientTracker(own)


def load_tracker(folder: Path) -> EfficientTracker:
    """Build it with the weights of a chassis folder."""
    own, tensors = read_config(folder).tracker_config, read_tracker_tensors(folder)
    tracker = make_tracker(own)
    if not isinstance(own, EfficientTrackerConfig):
        tensors = efficient_tracker_tensors(tensors, tracker.config)
    return load_part(tracker, tensors).float()


def make_student(recipe: VideoRecipe, tracker: EfficientTracker) -> TrackerStudent:
    """Take out of a tracker what the recipe trains.

    Raises:
        UserError: the tracker has no such module.
    """
    train, loss = recipe.train, recipe.loss
    found = find_trainable(tracker, recipe.model.trainable)
    scoring = Scoring(
        {name: getattr(loss, name) for name in TERMS},
        loss.side_px or tracker.image_size,
        loss.iou_error == "squared",
        loss.smooth,
        loss.temporal_of == "logits",
        held_out=True,
    )
    trained = outermost([place for places in found.values() for place in places])
    return TrackerStudent(tracker, trained, None, scoring, train.trunk_batch, train.objects_at_once, train.recompute)


def untrained(recipe: VideoRecipe, own: PreTrainedConfig | None = None) -> TrackerStudent:
    """Build the recipe's student without the values of its tensors; `own` is the config of the chassis' tracker."""
    own = own or config_at_hand(recipe.sam3.checkpoint).tracker_config
    with torch.device("meta"):
        return make_student(recipe, make_tracker(own))


def prompt_style(asked: VideoPrompts) -> PromptStyle:
    """Return how the recipe draws points and boxes."""
    return PromptStyle(asked.points, asked.centre, asked.negatives, asked.jitter, asked.jitter_px)


class VideoStage(TrackerStage):
    """A tracker that goes on learning, clips and prompts."""

    recipe: VideoRecipe
    train_data: OwnClips
    val_data: OwnClips

    def __init__(self, recipe: VideoRecipe, place: Place, tracker: EfficientTracker):
        self.found = find_trainable(tracker, recipe.model.trainable)
        parameters = dict(tracker.named_parameters())
        counts = {name: count_parameters(parameters, places) for name, places in self.found.items()}
        super().__init__(recipe, place, make_student(recipe, tracker))
        self.counts, self.config = counts, tracker.config
        self.lr_scales = {"": 1.0, "vision_encoder.": recipe.optim.vision_scale}
        self.facts = {"image_size": tracker.image_size, "trainable": self.found}

    @classmethod
    def from_recipe(cls, recipe: VideoRecipe, report: Report, accelerator: Accelerator) -> VideoStage:
        data = recipe.data
        # Objects that appear on other frames are tracked in a pass of their own.
        refuse_zero3(accelerator, "the modules of a tracker", "model.trainable")
        folder = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
        # Before anything is made: a module that is not there fails here.
        stage = cls(recipe, accelerator, load_tracker(folder).to(accelerator.device))
        if data.source == "synthetic":
            on_main(accelerator, partial(draw_videos, data))
        stage.train_data, stage.val_data = clips_of(recipe, stage.facts["image_size"])
        # What `merge` compares with the model that the changes go into: they only fit what they started from.
        names = {in_whole_model(name) for name in stage.student.state_dict()}
        before = {name: tensor for name, tensor in read_tensors(folder).items() if name in names}
        stage.facts["teacher"] = {
            "checkpoint": recipe.sam3.checkpoint,
            "revision": recipe.sam3.revision,
            "fingerprint": fingerprint(before),
        }
        return stage

    @classmethod
    def from_shapes(cls, recipe: VideoRecipe, place: Place) -> VideoStage:
        return cls(recipe, place, make_tracker(config_at_hand(recipe.sam3.checkpoint).tracker_config))

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.student.tracker]

    def describe(self) -> dict[str, str]:
        data, tracker = self.recipe.data, self.student.tracker
        used = [tensor for name, tensor in tracker.named_parameters() if not name.startswith(unused_of(tracker))]
        whole = sum(tensor.numel() for tensor in used)
        share = self.student_parameters / whole
        learns = [f"{self.student_parameters / 1e6:.2f} M of {whole / 1e6:.2f} M parameters ({share:.1%})"]
        for name, places in self.found.items():
            where = "" if places == [name] else f": {len(places)} x, {', '.join(places[:SHOWN])}"
            where += " ..." if len(places) > SHOWN else ""
            learns.append(f"{name} {self.counts[name] / 1e6:.2f} M ({self.counts[name] / whole:.1%}){where}")
        about = f"{data.path}, drawn ({data.look})" if data.source == "synthetic" else recognise(data.path).about
        train, val = self.train_data, self.val_data
        lines = [
            f"{about}; {describe_split(train.videos, val.videos)}; clips of {data.frames} frames, at most "
            f"{data.objects} objects, {self.facts['image_size']} px"
        ]
        # One line a reason: what readers repair is no secret, but there may be thousands of it.
        noted = Counter(note.reason for video in (*train.videos, *val.videos) for note in video.notes)
        lines += [f"{count:,} x {reason} (see effsam3 data check)" for reason, count in noted.items()]
        break_ = "\n         "
        trunk = any(name.startswith("vision_encoder.backbone.") for name, _ in self.student.named_parameters())
        note = {"note": "the trunk is the detector's, too: texts are not trained along; measure them"} if trunk else {}
        return note | {
            "learns": break_.join(learns),
            "tracker": f"{self.config.memory_mode} memory, {memory_tokens(self.config):,} tokens for a frame to read",
            "data": break_.join(lines),
        }

    def inputs(self, batch: Batch) -> ClipInputs:
        """Return what the student's forward takes."""
        asked, objects = self.recipe.prompts, self.objects(batch)
        style, visible_OT = prompt_style(asked), objects.masks_OTSS.flatten(2).any(2)
        inside_OT = batch["inside"][objects.clip_O]
        counts_OT = torch.zeros_like(inside_OT)
        drawn = []
        for place, (shown_T, rng) in enumerate(zip(visible_OT & inside_OT, objects.generators, strict=True)):
            shown = shown_T.nonzero()[:, 0].tolist()
            given = {}
            for frame in [frame for frame in asked.frames if frame in shown] or shown[:1]:
                kind = draw_kind(asked.shares(), rng)
                points, labels = draw_prompt(objects.masks_OTSS[place, frame], kind, rng, style)
                given[frame] = (points, labels, kind == "mask")
            if given:
                # Before its first prompt nobody has asked for it; after the video's end nothing is known.
                counts_OT[place, min(given) :] = inside_OT[place, min(given) :]
            # What no frame shows is tracked all the same, as an empty mask: every rank runs every module.
            drawn.append(given or {0: (*draw_prompt(objects.masks_OTSS[place, 0], "mask", rng), True)})
        weight_OT = frame_weights(counts_OT, objects.clip_O, len(batch["valid"]))
        return self.inputs_of(batch, objects, weight_OT, Prompts.of(drawn))

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs = self.inputs(batch)
        with self.place.autocast():
            return student(*inputs)

    def held_out_inputs(self, batch: Batch) -> ClipInputs:
        return self.inputs(batch)

    @torch.no_grad()
    def validate(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums of a batch for `summarise`: J on frames that were not given, and the loss of clips.

        Prompts are those of the recipe, the same ones in every validation.
        """
        inputs = self.held_out_inputs(batch)
        with self.place.autocast():
            found = student(*inputs)
        j_OT, counts_OT = found.pop("j").double(), inputs.weight_OT > 0
        by_mask_OF = inputs.prompts.by_mask_OF
        counts_OT[:, : by_mask_OF.shape[1]] &= ~by_mask_OF
        # The loss is a mean over the batch's clips, the empty ones among them.
        clips = inputs.weight_OT.new_tensor(len(batch["valid"]), dtype=torch.double)
        sums = {name: value.double() * clips for name, value in named(found).items()}
        return sums | {
            "j": j_OT[counts_OT].sum(),
            "positions": counts_OT.sum().double(),
            "clips": torch.tensor(sum(key != "" for key in batch["keys"]), device=self.device).double(),
        }

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Turn the sums of `validate` into means.

        Raises:
            UserError: they are sums of nothing.
        """
        if not sums["positions"]:
            key, path = val_source(self.recipe.data)
            raise UserError(
                f"{key}: nothing was measured in the {len(self.val_data):,} held-out videos: they cannot be read "
                f"({self.recipe.folder}/unreadable.jsonl names those), or have no frame beyond the one whose mask is "
                f"given; run effsam3 data check {path}, or hold out others"
            )
        clips = float(sums.pop("clips"))
        j = super().summarise({name: sums.pop(name) for name in ("j", "positions")})
        return j | {f"val/{name}": float(value) / clips for name, value in sums.items()}

    def conclude(self, start: Mapping[str, float], best: Mapping[str, float]) -> str:
        rows = [
            [what, f"{values['val/j']:.4f}", f"{values['val/loss']:.4f}"]
            for what, values in (("tracker at the start", start), (f"trained, step {best['step']}", best))
        ]
        return table(rows, ["held-out clips, prompted as in training", "J", "loss"])


def named(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a student's terms by the names that are logged: `loss`, and `loss_<term>`."""
    return {name if name in ("loss", "j") else f"loss_{name}": value for name, value in terms.items()}


STAGE: type[Stage] = VideoStage  # what `train` builds
