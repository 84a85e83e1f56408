"""Runs the commands that the documentation shows, in a workspace of their own, with everything made small."""

import importlib
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
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
    "DATA.NUM_WORKERS": "0",
}
SMALL_METHODS = {
    "/moco_v2": {"METHOD.QUEUE_SIZE": "8", "METHOD.BN_GROUP": "2", "VIEWS.GLOBAL_SIZE": "32"},
    "/detco": {
        **{"METHOD.QUEUE_SIZE": "8", "METHOD.BN_GROUP": "2", "VIEWS.GLOBAL_SIZE": "32"},
        **{"VIEWS.LOCAL_SIZE": "96", "VIEWS.PATCH_SIZE": "32"},
    },
    "/soco_c4": {"METHOD.HIDDEN": "64", "SOLVER.WARMUP_EPOCHS": "0", "VIEWS.VIEW_SIZE": "32"},
    "/soco_fpn": {
        **{"METHOD.HIDDEN": "64", "SOLVER.WARMUP_EPOCHS": "0", "METHOD.LEVEL_ROUTING": "own"},
        **{"VIEWS.VIEW_SIZE": "64", "VIEWS.SMALL_SIZE": "32"},
    },
}
MODULES = {
    "detco-pretrain": "pretrain.__main__",
    "convert-to-d2": "transfer.convert",
    "detco-transfer": "transfer.train_net",
}
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
        config = arguments[arguments.index("--config-file") + 1]
        small = SMALL_PRETRAIN | next(values for name, values in SMALL_METHODS.items() if name in config)
    elif program == "detco-transfer":
        small = SMALL_TRANSFER
    elif program == "detco-suite" and arguments[0] == "run":
        arguments += ["--only", "*retinanet*__detco__seed0"]
        arguments[1] = str(small_suite(workspace / arguments[1], workspace / "small_suite.yaml"))
    return [program, *arguments, *(word for pair in small.items() for word in pair)]


@pytest.fixture
def run_small(tmp_path: Path) -> Callable[..., str]:
    """`run_small(*words)` runs one command, made small, in `tmp_path` beside `configs` and `tools`; its output.

    A command that fails fails the test with what it printed.
    """
    for folder in ("configs", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    programs = Path(sys.executable).parent
    environment = dict(os.environ, PATH=f"{programs}:{os.environ['PATH']}", OMP_NUM_THREADS="1")

    def run(*words: str) -> str:
        command = made_small(list(words), tmp_path)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


@pytest.fixture
def run_small_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """As `run_small`, in this process: starting one, importing torch and Detectron2, takes longer than what it does."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: None)  # files that are thrown away need not reach the disk
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*words: str) -> str:
        program, *arguments = made_small(list(words), tmp_path)
        code = importlib.import_module(MODULES[program]).main(arguments)
        written = capsys.readouterr()
        assert code == 0, f"{program} {shlex.join(arguments)}\n{written.out[-3000:]}\n{written.err[-3000:]}"
        return written.out

    yield run
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def run_documented(run_small: Callable[..., str]) -> Callable[[Path, Mapping[str, str]], list[str]]:
    """`run_documented(markdown, variables)` runs its commands in order and returns their outputs.

    `$NAME` in a command becomes `variables["NAME"]`; `NAME=value` and `export` lines are skipped.
    """

    def run(markdown: Path, variables: Mapping[str, str]) -> list[str]:
        outputs = []
        for words in commands_of(markdown):
            if words[0] in ("export", "make", "source", "git") or "=" in words[0]:
                continue
            outputs.append(run_small(*(VARIABLE.sub(lambda match: variables[match[1]], word) for word in words)))
        return outputs

    return run
