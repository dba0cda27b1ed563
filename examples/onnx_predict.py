# SPDX-License-Identifier: Apache-2.0
"""Masks by click, box or text from a folder that `effsam3 export MODEL --to onnx` wrote. No PyTorch.

    pip install numpy onnxruntime pillow tokenizers
    python onnx_predict.py exports/MODEL-onnx photo.jpg --text "a dog"
    python onnx_predict.py exports/MODEL-onnx photo.jpg --box 80,40,210,300 --box 10,20,60,90
    python onnx_predict.py exports/MODEL-onnx photo.jpg --point 140,200 --point 20,30,0

A label 0 behind a point tells that it lies next to the object. Coordinates are in pixels of the image. Writes
mask_001.png and so on, and predictions.json, into --out.
"""

import argparse
import json
import os
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before it is imported: else it tells Microsoft of each session

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

NO_BOX = -10  # label of an example box that is none
UPPER_LEFT, LOWER_RIGHT = 2, 3  # labels of a box's corners, which are points to the mask decoder


class Model:
    """The files of an export. An image is encoded once, for any number of prompts."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.side = json.loads((self.folder / "export.json").read_text())["image_size"]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.part = lru_cache(maxsize=None)(self._load)  # only what the prompts need is read

    def _load(self, name):
        return onnxruntime.InferenceSession(self.folder / f"{name}.onnx", providers=["CPUExecutionProvider"])

    def run(self, name, known):
        """Run a part on what is known by its inputs' names; returns its outputs by their names."""
        session = self.part(name)
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        feed = {one.name: np.asarray(known[one.name], types[one.type]) for one in session.get_inputs()}
        return dict(zip([one.name for one in session.get_outputs()], session.run(None, feed), strict=True))

    def look(self, image):
        """Encode an image."""
        square = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        pixels = (np.asarray(square, np.float32) - 127.5) / 127.5
        return self.run("trunk", {"pixels": pixels.transpose(2, 0, 1)[None]})

    def by_points(self, seen, size, objects):
        """Segment objects, each a list of (x, y, label), all of one length; returns masks and predicted IoU."""
        prompts = np.array(objects, np.float32)  # objects, points, 3
        points = prompts[None, :, :, :2] * self.side / np.array(size)
        seen = self.run("tracker_neck", seen)
        found = self.run("mask_decoder", seen | {"points": points, "labels": prompts[None, :, :, 2]})
        each, best = np.arange(len(objects)), found["best"][0]
        return full_size(found["masks"][0][each, best], size), found["scores"][0][each, best]

    def by_text(self, seen, size, text, threshold):
        """Find all instances of a text, best first; returns masks, scores and boxes in pixels."""
        tokens = self.tokenizer.encode(text)
        if len(tokens.ids) > 32:
            raise SystemExit(f"{text!r} is too long: {len(tokens.ids) - 2} tokens of at most 30")
        known = {"input_ids": [tokens.ids], "attention_mask": [tokens.attention_mask]}
        known |= self.run("detector_neck", seen) | self.run("text_encoder", known)
        found = self.run("detector", known | {"boxes": np.zeros((1, 1, 4)), "box_labels": [[NO_BOX]]})
        scores = found["concept_scores"][0].astype(np.float32)
        kept = [query for query in np.argsort(-scores) if scores[query] > threshold]
        boxes = found["concept_boxes"][0][kept] * np.array([*size, *size])
        return full_size(found["concept_masks"][0][kept], size), scores[kept], boxes


def full_size(logits, size):
    """Turn logits into bool masks of the image's (width, height)."""
    images = [Image.fromarray(one.astype(np.float32)).resize(size, Image.Resampling.BILINEAR) for one in logits]
    return np.array([np.asarray(one) > 0 for one in images]).reshape(-1, size[1], size[0])


def numbers(text):
    return [float(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the folder of the export")
    parser.add_argument("image")
    parser.add_argument("--text", help="find all instances of this")
    parser.add_argument("--box", type=numbers, action="append", default=[], metavar="X1,Y1,X2,Y2", help="an object")
    parser.add_argument("--point", type=numbers, action="append", default=[], metavar="X,Y[,0]", help="of one object")
    parser.add_argument("--threshold", type=float, default=0.5, help="of --text")
    parser.add_argument("--out", type=Path, default=Path("predictions"))
    asked = parser.parse_args()
    image = Image.open(asked.image).convert("RGB")
    model = Model(asked.model)
    seen = model.look(image)
    if asked.text:
        masks, scores, boxes = model.by_text(seen, image.size, asked.text, asked.threshold)
    else:
        corners = [[(x1, y1, UPPER_LEFT), (x2, y2, LOWER_RIGHT)] for x1, y1, x2, y2 in asked.box]
        points = [(x, y, label[0] if label else 1) for x, y, *label in asked.point]
        objects = [points + (corners[0] if corners else [])] if points else corners
        if not objects:
            parser.error("give --text, --box or --point")
        masks, scores = model.by_points(seen, image.size, objects)
        boxes = [None] * len(masks)
    asked.out.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (mask, score, box) in enumerate(zip(masks, scores, boxes, strict=True), 1):
        name = f"mask_{number:03}.png"
        Image.fromarray(mask).save(asked.out / name)
        found.append({"mask": name, "score": float(score), "box": None if box is None else box.tolist()})
    (asked.out / "predictions.json").write_text(json.dumps(found, indent=1))
    print(f"{len(found)} found; see {asked.out}")


if __name__ == "__main__":
    main()
