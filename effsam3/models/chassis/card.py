# SPDX-License-Identifier: Apache-2.0
"""The card next to a merged model's config.json: who fills which slot, who changed which tensors; its form.

`encoder_layers` is how many layers the detector's fusion encoder has, where some of SAM 3's were taken out.
"""

CARD = "effsam3.json"
# Of a teacher everything is known, all but its fingerprint, or nothing.
TEACHER_FORM: tuple[dict, ...] = ({"checkpoint": str, "revision": (str, None), "fingerprint?": str}, {})
CARD_FORM = {
    "slots": {str: {"student": str, "from": str, "teacher?": TEACHER_FORM, "also?": [str]}},
    "adapted?": [{"name": str, "from": str, "made_on": str, "tensors": [str]}],
    "encoder_layers?": int,
    "chassis?": str,
    "revision?": (str, None),
    "imported?": str,
    "provenance?": {"started": str},
}
