# SPDX-License-Identifier: Apache-2.0
"""Stage 1, text: the benchmarks of a merged text encoder, and their tables."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch

from effsam3.benchmarks.concepts.report import concept_tables
from effsam3.benchmarks.results import Results
from effsam3.benchmarks.tables import Column, millions, result_table, speed_table
from effsam3.benchmarks.text import load_text_features, plot_similarity, text_similarity, text_speed
from effsam3.data.captions.text_files import read_texts
from effsam3.errors import UserError
from effsam3.models.text.student import TextTeacher, fold_repmixer
from effsam3.stages import concept_pairs
from effsam3.stages.text.facts import TextRecipe
from effsam3.stages.text.training import captions_of, encoder


def phrase_list(recipe: TextRecipe) -> None:
    """The phrases to measure on, which are read to their end."""
    asked = recipe.evaluate
    if asked.phrases is not None:
        if not Path(asked.phrases).is_file():
            raise UserError(f"evaluate.phrases: there is no file {asked.phrases}")
        deque(read_texts(asked.phrases, asked.phrase_column, "evaluate.phrase_column").values, maxlen=0)


def annotated_concepts(recipe: TextRecipe) -> str:
    """Annotated pairs of images and noun phrases, where they are to be measured on."""
    return concept_pairs.annotated_concepts(recipe.evaluate)


NEEDS = (phrase_list, annotated_concepts)


def measure(
    recipe: TextRecipe, folder: Path, chassis: Path, teacher_name: str, device: torch.device, results: Results
) -> None:
    """Run the recipe's benchmarks on `folder`/merged and on its teacher, a folder that is called `teacher_name`."""
    teacher = TextTeacher.from_folder(chassis).to(device)
    student = load_text_features(folder / "merged").to(device)
    asked = recipe.evaluate
    if "similarity" in asked.benchmarks:
        own = {} if asked.phrases is None else {"phrases": (asked.phrases,), "phrase_column": asked.phrase_column}
        captions, encode, result = captions_of(recipe.data, **own), encoder(recipe), {}
        for source in ("captions", "phrases"):
            part = captions.only("val", source)
            if len(part) > 1:
                texts = part.texts(range(min(len(part), asked.max_captions)))
                result[source] = text_similarity(teacher, student, encode, texts)
        results.add("similarity", result)
        picture = folder / "pictures" / "similarity.png"
        picture.parent.mkdir(exist_ok=True)
        plot_similarity(result, picture)
        results.pictures.append(picture)
    if "concepts" in asked.benchmarks:
        concept_pairs.measure(asked, folder, concept_pairs.models_of(recipe, folder, chassis), device, results)
    if "speed" in asked.benchmarks:
        results.add("speed", text_speed(teacher, fold_repmixer(student)))


SIMILARITY: list[Column] = [
    ("texts", "texts", str),
    ("cosine", "cosine", "{:.4f}".format),
    ("centred cosine", "cosine_centred", "{:.4f}".format),
    ("pooled", "pooled_cosine", "{:.4f}".format),
    ("retrieval", "retrieval", "{:.4f}".format),
    ("same neighbour", "neighbour_agreement", "{:.4f}".format),
]
SPEED: list[Column] = [
    ("parameters", "parameters", millions),
    ("ms, 8 tokens", "8_tokens_ms", "{:.1f}".format),
    ("32 tokens", "32_tokens_ms", "{:.1f}".format),
    ("texts/s, 8 tokens", "8_tokens_captions_per_s", "{:.1f}".format),
    ("32 tokens", "32_tokens_captions_per_s", "{:.1f}".format),
]


def tables(results: dict[str, dict]) -> list[str]:
    """Return the text benchmarks' results as Markdown."""
    parts = []
    if (similarity := results.get("similarity")) is not None:
        parts.append(result_table("held-out texts", similarity, SIMILARITY))
    if (timing := results.get("speed")) is not None:
        labels = {"teacher": "teacher", "student": "student"}
        parts.append(speed_table(f"text on {timing['device']}", timing, labels, SPEED))
    if (concepts := results.get("concepts")) is not None:
        parts += concept_tables(concepts)
    return parts
