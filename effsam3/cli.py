# SPDX-License-Identifier: Apache-2.0
"""The command `effsam3 VERB ...`: finds the verb in the table of effsam3/verbs.py, runs it and answers with a code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from effsam3 import __version__
from effsam3.errors import RecipeError, UserError, did_you_mean
from effsam3.stopping import STOP, STOPPED, Stopped, stopped_at_once
from effsam3.verbs import VERBS

SAVING = ("embed", "train")  # verbs that finish and keep what they are at when they are asked to stop
FULL_DISK = "; make room, the same command resumes from what is saved"


def main(argv: Sequence[str] | None = None, verb: str | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 (a check failed), 2 (something for the user to fix) or 75 (asked to
    stop, and the same command resumes).

    `argv` defaults to the process's own arguments; `verb` is given by scripts that are one verb each.
    """
    argv = [*([] if verb is None else verb.split()), *(sys.argv[1:] if argv is None else argv)]
    try:
        if argv and argv[0] == "--version":
            print(f"effsam3 {__version__}", flush=True)
            return 0
        verb, rest = split(argv)
        if verb not in VERBS:
            if not rest or rest[0] in ("-h", "--help"):
                print(usage(verb), flush=True)
                return 0 if rest else 2
            raise UserError(_unknown(verb, rest[0]))
        with STOP.noted() if verb in SAVING else stopped_at_once():
            return _run(verb, rest)
    except RecipeError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank has the same recipe: print it once
            print(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("interrupted; the same command resumes from what is saved", file=sys.stderr)
        return STOPPED if isinstance(interrupt, Stopped) else 130
    except BrokenPipeError:  # `effsam3 show ... | head`
        sys.stdout = None
        return 0
    except OSError as error:  # a full disk, a folder that cannot be written: the message names it
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"error: {error}{FULL_DISK if full else ''}", file=sys.stderr)
        return 2


def split(argv: list[str]) -> tuple[str, list[str]]:
    """Divide a command line into its verb and the rest. The verb may have two words (`index sa1b`); what is not in
    `VERBS` is the first of two, or "" for no verb at all.
    """
    for words in (2, 1):
        if (verb := " ".join(argv[:words])) in VERBS:
            return verb, argv[words:]
    return (argv[0], argv[1:]) if argv and below(argv[0]) else ("", argv)


def below(word: str) -> dict[str, str]:
    """Return the verbs that begin with a word, "" for all of them, and what they do."""
    return {verb: row.does for verb, row in VERBS.items() if not word or verb.startswith(f"{word} ")}


def usage(word: str) -> str:
    """Return the help for all verbs, or for those that begin with a word."""
    verbs = "\n".join(f"  {verb:<14} {does}" for verb, does in below(word).items())
    if word:
        return f"usage: effsam3 {word} ...\n\n{verbs}\n\nMore of one:   effsam3 {next(iter(below(word)))} --help"
    return (
        f"usage: effsam3 VERB ...\n\nDistil SAM 3 into a small student.\n\n{verbs}\n\n"
        "A whole run:   effsam3 launch smoke/image\n"
        "More of one:   effsam3 VERB --help"
    )


def _unknown(first: str, word: str) -> str:
    choices = [verb.removeprefix(f"{first} ") for verb in below(first)]
    choices += [] if first else sorted({verb.split()[0] for verb in choices} - set(choices))
    return f"no verb is called {f'{first} {word}'.strip()!r}{did_you_mean(word, choices)}"


def _run(verb: str, argv: list[str]) -> int:
    row = VERBS[verb]
    parser = row.parser(verb)
    if not row.recipe:
        return _answer(row.function()(**vars(parser.parse_args(argv))))
    refuse_dashes(argv)
    options = vars(parser.parse_intermixed_args(argv))
    if row.recipe == "path":
        return _answer(row.function()(**options))

    from effsam3.extras import refuse_missing_extras
    from effsam3.recipe.reader import load_recipe, refuse_verb

    by_option = options.pop("overrides_by_option", None) or []
    recipe = load_recipe(options.pop("recipe"), [*options.pop("overrides"), *by_option])
    refuse_verb(recipe, verb)
    refuse_missing_extras(recipe, [verb])
    row.function()(recipe, **options)
    return 0


def _answer(result: object) -> int:
    """Print a text; return the exit code."""
    if isinstance(result, str):
        print(result)
    return result if isinstance(result, int) else 0


def refuse_dashes(argv: Sequence[str]) -> None:
    """Refuse keys of a recipe that are spelled as options.

    Raises:
        UserError: naming the right spelling.
    """
    if not any(word.startswith("-") for word in argv):
        return  # every stage would be imported for nothing

    from effsam3 import stages

    sections = {field for stage in stages.STAGES for field in stages.recipe_class(stage).__dataclass_fields__}
    for place, word in enumerate(argv):
        key, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and key.split(".")[0] in sections:
            following = argv[place + 1 : place + 2]
            if not equals and following and "=" not in following[0]:
                word, value = f"{word} {following[0]}", following[0]
            raise UserError(f"{word}: keys of a recipe are given as {key}={value or 'VALUE'}, without dashes")


if __name__ == "__main__":
    sys.exit(main())
