# SPDX-License-Identifier: Apache-2.0
"""JSONs of videos next to frames, opened and compared with the masks that are in them."""

from own_videos import moving, square, write_frames, write_json

from effsam3.data.videos.vos import open_vos

MASKS = moving()
NAMES = [f"{k:05d}.jpg" for k in range(5)]


def opened(folder, content, frames="walk", names=NAMES, file="videos.json"):
    write_frames(folder / frames, names)
    return open_vos(write_json(folder / file, content))


def reasons(video):
    return sorted(note.reason for note in video.notes)


def check(video, masks_TNHW=MASKS, objects=(1, 2)):
    assert video.objects == sorted(objects) and video.annotated == list(range(len(masks_TNHW)))
    for k, masks_NHW in enumerate(masks_TNHW):
        assert all((video.masks(k)[name] == mask_HW).all() for name, mask_HW in zip(objects, masks_NHW, strict=True))
        seen = {name: mask_HW for name, mask_HW in zip(objects, masks_NHW, strict=True) if mask_HW.any()}
        shown = video.shown(k)
        assert shown.masks.keys() == seen.keys() and not shown.unknown
        assert all((shown.masks[name] == mask_HW).all() for name, mask_HW in seen.items())
        assert abs(video.read([k]).mean() - (10 + 20 * k)) < 4


def ring():
    mask = square(4, 5, 10)
    mask[7:10, 8:12] = False
    return mask
