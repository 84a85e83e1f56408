"""Package metadata. Imports no torch, so that it can be installed first and tell you what is missing."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "detco/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="detco",
    version=VERSION,
    description="DetCo, MoCo v2, SoCo: pretraining for detection, and its evaluation with Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["detco*", "pretrain*", "transfer*"]),
    package_data={"transfer": ["tasks.yaml", "results/*.yaml", "sources/*.yaml", "suite/*.yaml"]},
    # Detectron2 is not on PyPI in an installable form: `python tools/install_detectron2.py` adds it.
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "numpy",
        "Pillow",
        "opencv-python-headless",  # the module cv2, without libGL
        "fvcore",  # CfgNode, precise BN, checkpoint habits
        "safetensors",  # the weights file: no pickle
        "PyYAML",
        "tensorboard",
    ],
    extras_require={
        # What Detectron2 imports when it comes from the PyPI route, which has no dependency list of its own, and what
        # its evaluators and our Sparse R-CNN need. (LVIS's evaluator is installed by tools/install_detectron2.py.)
        "transfer": [
            "pycocotools",
            "tabulate",
            "cloudpickle",
            "matplotlib",
            "tqdm",
            "termcolor",
            "omegaconf",
            "hydra-core",
            "black",
            "iopath<0.1.10",
            "packaging",
            "cityscapesscripts",
            "shapely",
            "scipy",
        ],
        # Object proposals: tools/generate_proposals.py. OpenCV's own selective search is in the contrib wheels,
        # of which only one may be installed at a time, so none of them is asked for here.
        "proposals": ["scikit-image"],
        # JPEG decoding at the speed of libjpeg-turbo; without it Pillow decodes, to the same pixels.
        "fast": ["simplejpeg"],
        # What tools/benchmark_step.py compares with.
        "bench": ["lightly"],
        "slurm": ["submitit"],
        "dev": ["pytest", "pytest-xdist", "mypy", "ruff", "pre-commit", "types-PyYAML", "submitit"],
    },
    entry_points={
        "console_scripts": [
            "detco-pretrain = pretrain.__main__:main",
            "convert-to-d2 = transfer.convert:main",
            "detco-transfer = transfer.train_net:main",
            "detco-suite = transfer.suite.cli:main",
            "detco-results = transfer.results.cli:main",
            "detco-doctor = transfer.doctor:main",
        ]
    },
)
