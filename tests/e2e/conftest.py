"""Runs the commands that the documentation shows, in a workspace of their own, with everything made small."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
VARIABLE = re.compile(r"\$\{?(\w+)\}?")
SMALL_PRETRAIN = {
    "SOLVER.BATCH_SIZE_TOTAL": "4",
    "SOLVER.EPOCHS": "1",
    "SOLVER.PRECISION": "fp32",
    "METHOD.QUEUE_SIZE": "8",
    "METHOD.BN_GROUP": "2",
    "VIEWS.GLOBAL_SIZE": "32",
    "DATA.NUM_WORKERS": "0",
}
SMALL_PATCHES = {"VIEWS.LOCAL_SIZE": "96", "VIEWS.PATCH_SIZE": "32"}
SMALL_TRANSFER = {
    "SOLVER.MAX_ITER": "2",
    "SOLVER.STEPS": "(1,)",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.WARMUP_ITERS": "1",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MAX_SIZE_TRAIN": "96",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "96",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "16",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "8",
    "TEST.PRECISE_BN.NUM_ITER": "1",
    "DATALOADER.NUM_WORKERS": "0",
}


def commands_of(markdown: Path) -> list[list[str]]:
    """The commands of all ```bash blocks, continued lines joined, comments removed."""
    text = markdown.read_text(encoding="utf-8")
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def small_suite(path: Path, target: Path) -> Path:
    """A copy of a suite file whose jobs take a few steps."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for task in content["tasks"]:
        task["config"] = str(path.parent / task["config"])
    content["overrides"] = [word for pair in SMALL_TRANSFER.items() for word in pair]
    target.write_text(yaml.safe_dump(content), encoding="utf-8")
    return target


def made_small(words: list[str], workspace: Path) -> list[str]:
    """The same command on the CPU, with a few images and steps."""
    program, arguments = words[0], list(words[1:])
    if "--num-gpus" in arguments:
        arguments[arguments.index("--num-gpus") + 1] = "0"
    arguments = [word for word in arguments if word != "--auto-scale"]
    small: Mapping[str, str] = {}
    if program == "detco-pretrain":
        small = SMALL_PRETRAIN | (SMALL_PATCHES if any("/detco" in word for word in arguments) else {})
    elif program == "detco-transfer":
        small = SMALL_TRANSFER
    elif program == "detco-suite" and arguments[0] == "run":
        arguments += ["--only", "*retinanet*__detco__seed0"]
        arguments[1] = str(small_suite(workspace / arguments[1], workspace / "small_suite.yaml"))
    return [program, *arguments, *(word for pair in small.items() for word in pair)]


@pytest.fixture
def run_documented() -> Callable[[Path, Path, Mapping[str, str]], list[str]]:
    """`run_documented(markdown, workspace, variables)` runs its commands in order and returns their outputs.

    `$NAME` in a command becomes `variables["NAME"]`; `NAME=value` and `export` lines are skipped. A command that fails
    fails the test with what it printed.
    """

    def run(markdown: Path, workspace: Path, variables: Mapping[str, str]) -> list[str]:
        for folder in ("configs", "tools"):
            (workspace / folder).symlink_to(ROOT / folder)
        programs = Path(sys.executable).parent
        environment = dict(os.environ, PATH=f"{programs}:{os.environ['PATH']}", OMP_NUM_THREADS="2")
        outputs = []
        for words in commands_of(markdown):
            if words[0] in ("export", "make", "source", "git") or "=" in words[0]:
                continue
            words = [VARIABLE.sub(lambda match: variables[match[1]], word) for word in words]
            command = made_small(words, workspace)
            done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            outputs.append(done.stdout)
        return outputs

    return run
