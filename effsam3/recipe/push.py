# SPDX-License-Identifier: Apache-2.0
"""The section `push`: where on the Hub a merged model goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from effsam3.recipe.rules import Section


def repository(value: str) -> str:
    name = r"\w([\w.-]{0,94}\w)?"  # the Hub's own rule
    if not re.fullmatch(f"{name}/{name}", value, re.ASCII):
        return (
            f"{value!r} is not OWNER/NAME, such as my-team/es-rv-m, of letters, digits, '_' and, inside, '-' and '.'"
        )
    if "--" in value or ".." in value or value.endswith(".git"):
        return f"{value!r} has '--' or '..' in it or ends in '.git', which the Hub refuses"
    return ""


@dataclass(frozen=True, kw_only=True)
class Push(Section):
    """Where the merged model goes. The token is never here: `hf auth login` keeps it, or HF_TOKEN holds it."""

    repo: Annotated[str, repository] | None = None  # OWNER/NAME on the Hub; made when it is not there
    private: bool = True  # false: a repository that is made is public, and one that is public already is accepted
    revision: str = "main"  # branch to commit to; made when it is not there
    license: str | None = None  # file with the full text of the SAM License; null: the LICENSE next to the chassis
