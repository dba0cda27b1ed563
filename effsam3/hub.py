# SPDX-License-Identifier: Apache-2.0
"""What goes wrong between here and the Hugging Face Hub, in words that tell what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from effsam3.errors import UserError

# HTTP status of a refusal -> what it means
REFUSALS = {
    401: "this token is not accepted, or there is none; `hf auth login`, or set HF_TOKEN",
    403: "this token may not do that; use one that may, or ask for access on the repository's page",
    404: "it is not there, or hidden from this token; check the name, and log in (`hf auth login`, or HF_TOKEN)",
}


@contextmanager
def hub_errors(what: str, remedy: str, error: type[UserError]) -> Iterator[None]:
    """Turn what huggingface_hub raises into an `error` that begins with `what` and ends with `remedy`."""
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (HTTPError, HFValidationError, OSError, RuntimeError) as problem:
        # An upload's RuntimeError names the file, its cause the reason.
        cause = problem.__cause__ if isinstance(problem, RuntimeError) and problem.__cause__ else problem
        named = "" if cause is problem else f"{problem} "
        raise error(f"{what}: {named}{_explain(cause)}; {remedy}") from problem


def _explain(problem: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(problem, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub may not be asked; unset it"
    if isinstance(problem, HfHubHTTPError):
        status = problem.response.status_code
        meaning = REFUSALS.get(status, "run the same command again later, what has arrived is kept")
        said = problem.server_message or problem.response.reason_phrase
        return f"{constants.ENDPOINT} answers {status} ({said}): {meaning}"
    text = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    if isinstance(problem, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
        return (
            f"{constants.ENDPOINT} cannot be reached ({text}); it takes network access (a proxy goes into "
            "HTTPS_PROXY) or a mirror in HF_ENDPOINT, and the same command again"
        )
    return text
