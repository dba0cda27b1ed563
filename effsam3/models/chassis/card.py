# SPDX-License-Identifier: Apache-2.0
"""The card next to a merged model's config.json: who fills which slot, who changed which tensors; its form."""

CARD = "effsam3.json"
# Of a teacher everything is known, all but its fingerprint, or nothing.
TEACHER_FORM: tuple[dict, ...] = ({"checkpoint": str, "revision": (str, None), "fingerprint?": str}, {})
CARD_FORM = {
    "slots": {str: {"student": str, "from": str, "teacher?": TEACHER_FORM, "also?": [str]}},
    "adapted?": [{"name": str, "from": str, "made_on": str, "tensors": [str]}],
    "chassis?": str,
    "revision?": (str, None),
    "imported?": str,
    "provenance?": {"started": str},
}
