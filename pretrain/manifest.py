"""Where a run comes from: `manifest.json`, and the provenance that goes with its weights."""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision

import detco
from detco.artifact import open_atomically


def versions() -> dict[str, str]:
    """Return the versions that can change numbers."""
    return {
        "detco": detco.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which weights_only loading refuses
        "torchvision": str(torchvision.__version__),
        "numpy": str(numpy.__version__),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what computes: the GPU of this process, or the processor."""
    machine: dict[str, Any] = {"platform": platform.platform(), "cpu_cores": os.cpu_count(), "cpu": _cpu_name()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def git_commit() -> str | None:
    """Return the commit of this code (with "-dirty" if files were changed), None if it does not run from a checkout."""
    package = Path(detco.__file__).parent
    try:
        # An installed package may lie in somebody else's repository: only a tracked file proves that it is ours.
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=package, capture_output=True, check=True
        )
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=package,
            capture_output=True,
            check=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def write_manifest(file: Path, record: dict[str, Any], *, step: int) -> None:
    """Write the manifest of a run; one that is there already keeps its list of starts, with this one added.

    Args:
        file: manifest.json.
        record: What holds for the run as a whole.
        step: Steps done before this start.
    """
    starts = json.loads(file.read_text(encoding="utf-8"))["starts"] if step and file.exists() else []
    starts.append({"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "step": step})
    with open_atomically(file) as stream:
        stream.write(json.dumps({**record, "starts": starts}, indent=2).encode())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
