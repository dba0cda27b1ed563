# SPDX-License-Identifier: Apache-2.0
"""Stage adapt: what a run's adapters make of the weights of a whole SAM 3."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from effsam3.models.chassis.classes import empty_model
from effsam3.models.chassis.tensors import fingerprint, read_config, read_tensors
from effsam3.models.lora.adapter import fold, kept_line
from effsam3.models.lora.targets import view_biases
from effsam3.models.merging.adapt import Adapted
from effsam3.models.merging.slots import MergeError, refuse_other_student
from effsam3.stages.adapt.facts import AdaptRecipe
from effsam3.stages.adapt.training import ADAPTER, VIEWS, changed_tensors, make_student

TEACHER = {"checkpoint": str, "revision": (str, None), "fingerprint": str}
FEATURES_FORM = {"teacher": TEACHER, "views": [str]}  # what a run must record of what it was trained on


def adapted_of_run(
    trained: AdaptRecipe, features: dict, weights: dict[str, Tensor], chassis: Path, about: dict
) -> Adapted:
    """Return the tensors of a whole SAM 3 with a run's adapters folded in, in float32.

    The embedding of a view becomes part of the biases with which the necks end: that is exact, for this one view.

    Raises:
        MergeError: the tensors are not those of the recipe's adapters, the SAM 3 is not the one that they were trained
            on, or the run has views and `merge.view` names none of them.
    """
    views = features["views"]
    student = make_student(trained, empty_model(read_config(chassis)), len(views))
    refuse_other_student(student.state_dict(), weights, f"the adapters of {about['origin']}")
    own = read_tensors(chassis)
    changed = changed_tensors(trained, student.modules_adapted, bool(views))
    if (found := fingerprint({name: own[name] for name in changed})) != features["teacher"]["fingerprint"]:
        raise MergeError(
            f"{about['origin']} was trained on other weights (fingerprint {features['teacher']['fingerprint']}) than "
            f"{chassis} has now ({found}); name what it was trained on (sam3.checkpoint, sam3.revision)"
        )
    tensors, kept = fold(own, weights, trained.adapters.alpha, trained.adapters.rank)
    facts = about["facts"] | {"bf16_keeps": round(kept, 3)}
    if views:
        if trained.merge.view not in views:
            raise MergeError(
                f"merge.view: {about['origin']} has learned an embedding for each of its views ({', '.join(views)}), "
                f"and a SAM 3 has a place for one; name it, such as merge.view={views[0]}, and merge once for each. "
                f"{ADAPTER}/ next to the checkpoints keeps all of them"
            )
        view_C = weights[VIEWS][views.index(trained.merge.view)]
        biases = view_biases(tracker=trained.shows_objects, detector=trained.asks_phrases)
        tensors |= {name: own[name] + view_C for name in biases}
        facts["view"] = trained.merge.view
    return Adapted(
        name=about["name"],
        origin=about["origin"],
        tensors=tensors,
        made_on=features["teacher"]["fingerprint"],
        facts=facts,
        notes=(kept_line(kept),),
    )
