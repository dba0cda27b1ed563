# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with data for training: reasons, whether they hurt, and what they mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from effsam3.data.unreadable import Unreadable
from effsam3.errors import UserError

FEWEST_PIXELS = 16  # of a mask that is more than a slip of the mouse
LARGEST_SHARE = 0.95  # of an image that a mask covers before it looks inverted


class Note(NamedTuple):
    """Something that is wrong with data, or that a reader left out, repaired or took for granted."""

    reason: str  # one word, to count them by: a key of HURT or NOTES, or the reason of a reader's error
    where: str  # the file, frame or annotation
    detail: str = ""

    @property
    def hurts(self) -> bool:
        """Whether training leaves data out because of it, or learns what is wrong."""
        return self.reason not in NOTES


HURT = {
    "missing_frame": "frames that are not there",
    "gap": "frames left out between others: tracked as if no time had passed",
    "order": "frames whose names count in another order than the file lists them",
    "size_mismatch": "frames or masks of another size than the others",
    "jumping_id": "objects that seem to change their ids: training learns to lose them",
    "no_object": "no object is shown: nothing to learn from",
    "merged_objects": "several objects became one: annotations have no track_id, and share a category on one frame",
    "guessed_objects": "which object is which is a guess: annotations have neither track_id nor category_id",
    "not_checked": "videos whose masks can only be looked at when the above is mended",
    "not_opened": "files that contradict themselves, or lead to nothing",
    "no_masks": "frames without masks",
    "missing_image": "images that are not there",
    "no_png": "masks that are not read: they are no PNGs",
    "names": "names from which the order of frames is not clear",
    "no_phrase": "phrases that are empty, and left out",
    "bad_phrase": "phrases of more tokens than SAM 3 reads: left out",
    "other_phrase": "pairs whose annotators were asked for different phrases: left out",
    "many_objects": "phrases with more instances than can be found: not learned from",
    "bad_name": "images whose names are no paths below the folder: left out",
    "id_twice": "entries with the id of another: left out",
    "bad_entry": "entries without what they must have: left out",
}
NOTES = {
    "never_visible": "objects that no annotated frame shows",
    "seen_once": "objects that one annotated frame alone shows",
    "one_frame": "videos with one annotated frame: nothing to track",
    "tiny_mask": "masks of a few pixels",
    "whole_frame": "masks of nearly the whole frame: inverted ones look so",
    "empty_mask": "annotations without a pixel: taken as absent",
    "no_mask": "annotations with a box only: the object counts as not annotated on that frame",
    "two_points": "polygons of fewer than three points: left out",
    "outside": "annotations marked as outside: taken as absent",
    "union": "several annotations of one object on a frame: their union is taken",
    "crowd": "crowds without a track: left out",
    "category_as_track": "videos without track_id: the category says which object it is",
    "place_as_track": "videos without track_id and category_id: the place in the frame's list says which object it is",
    "no_image": "annotations of images that are not listed: left out",
    "no_objects": "images without a mask: all of it is background",
    "no_size": "images without a size in the file: taken from the frames",
    "binary": "masks of 0 and 255 only: one object",
    "synthetic": "shapes drawn over the frames",
    "no_box": "instances without a box: it is made from the mask",
    "bad_box": "boxes outside of their image, or elsewhere than their mask: the mask's own are taken",
    "annotator_missing": "pairs without all three annotators: those that are there count",
    "no_pairs": "images without a phrase that can be asked",
    "no_annotations": "categories that are never marked: not asked for",
    "no_such_pair": "annotations of pairs that are not listed: left out",
    "no_such_image": "annotations of images that are not listed: left out",
    "no_such_category": "annotations of categories that are not listed: left out",
    "no_such_annotation": "expressions of annotations that are not listed: left out",
    "held_out": "images that are held out, too: not learned from",
    "void": "masks with a value for void: taken as background",
}


def problems_of(error: UserError, where: str, reason: str = "names") -> list[Note]:
    """Return what a reader refused as problems; `reason` is for an error that has none."""
    if isinstance(error, Unreadable):
        return [Note(fault.reason, where, fault.detail) for fault in (error, *error.others)]
    return [Note(reason, where, str(error))]


def amount(count: int, noun: str) -> str:
    """Return a number with what it counts: 1 video, 2 videos."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def meaning(reason: str) -> str:
    """Return what a reason means; readers' errors explain themselves."""
    return (HURT | NOTES).get(reason, "cannot be read, and is left out")


def mask_problems(mask_HW: np.ndarray, where: str) -> list[Note]:
    """Return what is strange about a mask (H, W) that is not empty."""
    pixels = int(mask_HW.sum())
    if pixels < FEWEST_PIXELS:
        return [Note("tiny_mask", where, f"{pixels} pixels")]
    if pixels > LARGEST_SHARE * mask_HW.size:
        return [Note("whole_frame", where, f"{pixels / mask_HW.size:.0%} of it")]
    return []
