# SPDX-License-Identifier: Apache-2.0
"""The package and what it needs. `pip install -e .[dev]` in a clone.

Lower bounds are the first versions with what is used here, not the newest ones.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).parent / "effsam3"
VERSION = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"))[1]
# Folders next to the package in a clone and inside it in a wheel; effsam3/shipped.py finds them in both.
DATA = {"effsam3.recipes": "recipes", "effsam3.accelerate_configs": "accelerate_configs"}
ONNX = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]
# What a run needs only if its recipe asks for it; effsam3/extras.py says so where it is missing.
EXTRAS = {
    "demo": ["gradio>=6.0"],
    "deepspeed": ["deepspeed>=0.17.2"],  # torch_autocast
    "lora": ["peft>=0.18"],
    "onnx": ONNX,
    "openvino": [*ONNX, "openvino>=2025.2"],
    "tensorboard": ["tensorboard>=2.16.2"],  # older 2.16 ask for TensorFlow, the first for its nightly builds
    "wandb": ["wandb>=0.18"],
}
ALL = [requirement for extra in EXTRAS.values() for requirement in extra]
# setuptools: the tests build the wheel
DEV = [
    "jsonschema>=4.18",
    "mypy>=1.18",
    "playwright>=1.50",  # drives the browser in tests of the page
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "setuptools>=70.1",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="effsam3",
    version=VERSION,
    description="Distil SAM 3 into small students: recipes, training, merging, evaluation",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["effsam3", "effsam3.*"]), *DATA],
    package_dir=DATA,
    package_data={name: ["**/*.yaml"] for name in DATA} | {"effsam3": ["*.html"]},
    entry_points={"console_scripts": ["effsam3=effsam3.cli:main"]},
    install_requires=[
        "accelerate>=1.10",
        "av>=17.1",  # its wheels bundle FFmpeg; with older ones some files end the whole process
        "datasets>=4.0",
        "filelock>=3.10",
        "ftfy>=6.1",
        "huggingface_hub>=1.31",  # as transformers 5.20 asks
        "jinja2>=3.1",
        "markdown-it-py>=3.0",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "open_clip_torch>=3.2",  # MobileCLIP2
        "pillow>=11",
        "pyarrow>=15",
        "pycocotools>=2.0.8",
        "pyyaml>=6.0",
        "regex>=2025.10.22",  # as transformers 5.20 asks, like safetensors and tokenizers
        "safetensors>=0.8",
        "scipy>=1.11",
        "timm>=1.0.23",  # init_non_persistent_buffers, without which TinyViT cannot be loaded
        "tokenizers>=0.23.1",
        "torch>=2.6",
        "torchvision>=0.21",
        "tqdm>=4.66",
        "transformers>=5.20",  # sub_configs_defaults, by which a text student keeps its padding rule
        "xxhash>=3.4",
    ],
    extras_require=EXTRAS | {"all": ALL, "dev": [*ALL, *DEV]},
)
