"""`detco-doctor`: what is installed, whether it works, what is missing and the command that repairs it.

Everything is tried rather than looked up: operators run on tiny tensors, Detectron2 is imported with its bridges. The
checks run in a child process, because a broken torch may end the process that imports it.
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from transfer import d2

OK, LIMITED, BROKEN = "[ok]", "[--]", "[!!]"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 8)
# A matching pair: torchvision's operators are compiled for one torch.
REINSTALL_TORCH = "pip install --upgrade --force-reinstall torch torchvision"
LIBRARIES = {  # module: package
    "numpy": "numpy",
    "PIL": "Pillow",
    "yaml": "PyYAML",
    "fvcore": "fvcore",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "tabulate": "tabulate",
}
OPTIONAL = {  # module: (what pip installs, what it is for)
    "cityscapesscripts": ("cityscapesscripts", "Cityscapes"),
    "shapely": ("shapely", "Cityscapes instances"),
    "lvis": ("--no-deps lvis", "LVIS"),
    "scipy": ("scipy", "Sparse R-CNN"),
    "submitit": ("submitit", "detco-suite --launcher slurm"),
    "skimage": ("scikit-image", "object proposals"),
    "simplejpeg": ("simplejpeg", "decoding JPEGs 1.6 times as fast"),
}
SMALL_DISK_GB = 5.0
SMALL_SHM_GB = 1.0

EPILOG = """\
examples:
  detco-doctor                        the report
  detco-doctor --json | jq .ok        for scripts

marks: [ok] works; [--] works, with something missing that some tasks need; [!!] must be repaired first.
exit status: 0 if pretraining, conversion and transfer can run; 1 if not; 2 for wrong arguments.
"""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        mark: OK, LIMITED or BROKEN.
        text: What was found.
        fix: Command that repairs it; "" if there is nothing to do.
    """

    name: str
    mark: str
    text: str
    fix: str = ""


def check_python() -> Check:
    """The interpreter's version and place."""
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("Python", BROKEN, f"{text}: too old", "make a virtual environment with Python 3.10 or newer")
    return Check("Python", OK, text)


def check_torch() -> Check:
    """Version, CUDA build, GPUs; a small product on each device."""
    torch = importlib.import_module("torch")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    gpus = [torch.cuda.get_device_name(index) for index in range(len(devices) - 1)]
    text = f"{torch.__version__}, {build}, {len(gpus)} GPUs" + "".join(f"; {name}" for name in dict.fromkeys(gpus))
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return Check("torch", BROKEN, f"{text}: too old, 2.8 or newer is needed", REINSTALL_TORCH)
    if not gpus and shutil.which("nvidia-smi"):
        fix = "nvidia-smi  # does it list the GPUs? then the driver may be too old, or torch a CPU build"
        return Check("torch", LIMITED, f"{text}, though this machine has a driver", fix)
    return Check("torch", OK, text)


def check_torchvision() -> Check:
    """Whether nms and roi_align run on the CPU and on a GPU if there is one; Detectron2 takes them from here."""
    torch, torchvision = importlib.import_module("torch"), importlib.import_module("torchvision")
    where = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in where:
        boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]], device=device)
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.5)
        pooled = torchvision.ops.roi_align(torch.ones(1, 1, 4, 4, device=device), [boxes], output_size=2)
        if kept.tolist() != [0] or not bool((pooled == 1).all()):
            return Check(
                "torchvision", BROKEN, f"{torchvision.__version__}: wrong results on {device}", REINSTALL_TORCH
            )
    return Check("torchvision", OK, f"{torchvision.__version__}, nms and roi_align run on {' and '.join(where)}")


def check_detectron2() -> Check:
    """Which one, where, compiled or not and what that costs."""
    try:
        found = d2.require()
    except d2.Detectron2Missing as error:
        return Check("Detectron2", BROKEN, str(error), d2.INSTALL_COMMAND)
    name = found.distribution or f"{found.version}, not installed by pip,"
    commit = f" (commit {found.commit[:8]})" if found.commit else ""
    cost = "compiled" if found.compiled else f"not compiled, so without {d2.LOST_WITHOUT_COMPILED}"
    bridges = f"; bridged: {', '.join(found.bridges)}" if found.bridges else "; no bridge needed"
    # Nothing of this suite needs the extension: evaluation is slower, not different.
    return Check("Detectron2", OK if found.compiled else LIMITED, f"{name}{commit} in {found.path}, {cost}{bridges}")


def check_cv2() -> Check:
    """Whether OpenCV loads (the package with a display needs libGL, which servers lack)."""
    cv2 = importlib.import_module("cv2")
    return Check("cv2", OK, str(cv2.__version__))


def check_pycocotools() -> Check:
    """Whether its C extension works with this numpy."""
    masks, numpy = importlib.import_module("pycocotools.mask"), importlib.import_module("numpy")
    encoded = masks.encode(numpy.asfortranarray(numpy.ones((2, 3), dtype=numpy.uint8)))
    if int(masks.area(encoded)) != 6:
        return Check("pycocotools", BROKEN, "wrong results", "pip install --force-reinstall pycocotools")
    return Check("pycocotools", OK, importlib.metadata.version("pycocotools"))


def check_libraries() -> Check:
    """The other libraries that the main job imports."""
    broken = [package for module, package in LIBRARIES.items() if not _imports(module)]
    if broken:
        return Check("libraries", BROKEN, f"missing or broken: {', '.join(broken)}", f"pip install {' '.join(broken)}")
    return Check(
        "libraries", OK, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES.values())
    )


def check_optional() -> Check:
    """Libraries that single tasks need."""
    missing = [module for module in OPTIONAL if not _imports(module)]
    if missing:
        text = "missing: " + ", ".join(f"{module} (for {OPTIONAL[module][1]})" for module in missing)
        return Check("optional", LIMITED, text, " && ".join(f"pip install {OPTIONAL[module][0]}" for module in missing))
    return Check("optional", OK, ", ".join(OPTIONAL))


def check_machine() -> Check:
    """Cores, memory, disk space here, and the shared memory that loader workers need."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    text = f"{cores} cores, {memory:.0f} GB memory, {disk:.0f} GB free here"
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free / 1e9
        text += f", {shared:.1f} GB shared memory"
        if shared < SMALL_SHM_GB:
            return Check("machine", LIMITED, f"{text}: little for loader workers", "docker run --shm-size 8g ...")
    if disk < SMALL_DISK_GB:
        return Check("machine", LIMITED, f"{text}: little for checkpoints", "write elsewhere: --output-dir DIR")
    return Check("machine", OK, text)


# In this order: what fails first is the likely cause of what follows. Last, the command that repairs a failed import.
CHECKS: tuple[tuple[str, Callable[[], Check], str], ...] = (
    ("Python", check_python, ""),
    ("torch", check_torch, "pip install torch torchvision"),
    ("torchvision", check_torchvision, REINSTALL_TORCH),
    ("Detectron2", check_detectron2, d2.INSTALL_COMMAND),
    ("cv2", check_cv2, "pip uninstall -y opencv-python && pip install --force-reinstall opencv-python-headless"),
    ("pycocotools", check_pycocotools, "pip install --force-reinstall pycocotools"),
    ("libraries", check_libraries, "pip install -e ."),
    ("optional", check_optional, ""),
    ("machine", check_machine, ""),
)


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # a broken installation may raise anything
        return False
    return True


def run_check(name: str, check: Callable[[], Check], fix: str) -> Check:
    """Run one check; whatever it raises is its finding."""
    try:
        return check()
    except ModuleNotFoundError as error:
        return Check(name, BROKEN, f"{error.name} is not installed", fix)
    except Exception as error:  # the finding of a doctor
        text = (str(error).strip().splitlines() or ["no message"])[0]
        return Check(name, BROKEN, f"{type(error).__name__}: {text}", fix)


def _run_all(answers: Connection) -> None:
    warnings.simplefilter("ignore")  # of other people's code; what matters here is what works
    for name, check, fix in CHECKS:
        answers.send(run_check(name, check, fix))
    answers.close()


def examine() -> list[Check]:
    """Run all checks in a child process. If it dies, the check that killed it is the last one."""
    context = multiprocessing.get_context("fork")  # nothing heavy is imported here yet
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_all, args=(sender,))
    child.start()
    sender.close()
    found: list[Check] = []
    while len(found) < len(CHECKS):
        try:
            found.append(receiver.recv())
        except EOFError:
            break
    child.join()
    if len(found) < len(CHECKS):
        name, _, fix = CHECKS[len(found)]
        code = child.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        found.append(Check(name, BROKEN, f"ends the process ({how}); the checks after it were not made", fix))
    return found


def report(checks: Sequence[Check]) -> str:
    """The report as text: a line for each check, then what to repair."""
    lines = [f"{check.mark} {check.name:<12} {check.text}" for check in checks]
    broken = [check for check in checks if check.mark == BROKEN]
    if broken:
        lines.append("The main job (pretrain, convert, transfer) cannot run. Repair in this order:")
        lines += [f"    {check.fix}" for check in broken if check.fix]
    else:
        lines.append("The main job (pretrain, convert, transfer) can run.")
        hints = [check.fix for check in checks if check.fix]
        lines += ["If you need what is missing:", *(f"    {fix}" for fix in hints)] if hints else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="detco-doctor",
        description="Say what is installed, whether it works, and how to repair what does not.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text (default: text)")
    arguments = parser.parse_args(argv)

    checks = examine()
    is_fit = all(check.mark != BROKEN for check in checks)
    if arguments.json:
        print(json.dumps({"ok": is_fit, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(report(checks))
    return 0 if is_fit else 1


if __name__ == "__main__":
    sys.exit(main())
