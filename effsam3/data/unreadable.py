# SPDX-License-Identifier: Apache-2.0
"""Files of a data set that cannot be used, each with the reason that reports name."""

from __future__ import annotations

from collections.abc import Sequence

from effsam3.errors import UserError


class Unreadable(UserError):
    """One file that cannot be used: `reason` is one word for reports, `detail` the full explanation.

    `others` are the same for other files, where a reader looks at several before it gives up.
    """

    what = ""

    def __init__(self, key: str, reason: str, detail: str = "", others: Sequence[Unreadable] = ()):
        super().__init__(key, reason, detail)
        self.key, self.reason, self.detail, self.others = key, reason, detail, tuple(others)

    def __str__(self) -> str:
        more = f"; {len(self.others)} more are unreadable" if self.others else ""
        return f"{self.what} {self.key!r}: {self.reason}" + (f" ({self.detail}{more})" if self.detail else "")


class UnreadableImage(Unreadable):
    """Reasons: empty, corrupt, truncated, huge, too_small, unsupported_mode, unreadable, changed."""

    what = "image"


class UnreadableAnnotations(Unreadable):
    """Reasons: bad_json, not_sa1b or not_sav, bad_mask, bad_box, bad_point, object_ids, size_mismatch, frame_count,
    unreadable, changed; of PNGs those that `mask_pngs` gives."""

    what = "annotations of"
