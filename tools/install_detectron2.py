"""Install Detectron2, which PyPI lacks in an installable form: keep what works, else upstream, else a pure-Python v0.5.

Routes, tried in this order:
1. keep: whatever imports through transfer/d2.py, with its bridges, stays as it is.
2. git: upstream at a commit known to work, compiled by pip. Needs git, a C++ compiler and the upstream repository.
3. pypi: the sdist of `detectron2-cdo` 0.5, whose Python files are upstream v0.5 byte for byte, but which pip cannot
   install, for it lacks the C++ sources. Its sha256 is checked and its package folder becomes a pure-Python wheel.
"""

import argparse
import base64
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent

UPSTREAM = "https://github.com/facebookresearch/detectron2.git"
UPSTREAM_COMMIT = "c69939aa85460e8135f40bce908a6cddaa73065f"  # 2024-11-21, the last one whose Cityscapes code imports
REACHABLE_SECONDS = 15

SDIST = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
WHEEL_VERSION = "0.5+pypi.cdo"  # the local part says where it came from, in `pip list` too
WHEEL_METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {WHEEL_VERSION}
Summary: Detectron2 v0.5 without its C++ extension, from the sdist {SDIST}
License: Apache-2.0
"""
WHEEL_TAGS = """\
Wheel-Version: 1.0
Generator: install_detectron2
Root-Is-Purelib: true
Tag: py3-none-any
"""
# What Detectron2 imports: setup.py's extra [transfer] and the part of install_requires that it shares.
RUNTIME_DEPENDENCIES = (
    "numpy",
    "Pillow",
    "opencv-python-headless",
    "fvcore",
    "tensorboard",
    "tabulate",
    "pycocotools",
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
)
LVIS = "lvis==0.5.3"  # the last on PyPI; transfer/d2.py bridges what it needs of old numpy

EPILOG = """\
examples:
  python tools/install_detectron2.py              keep what is there, else the best route that works here
  python tools/install_detectron2.py --dry-run    say what would be done

exit status: 0 Detectron2 imports; 1 it does not, and the last lines say why; 2 wrong arguments.
"""


class RouteError(RuntimeError):
    """This route does not work on this machine; the message says why."""


def say(message: str) -> None:
    """Print progress at once, also into a pipe."""
    print(f"[detectron2] {message}", flush=True)


def run(command: Sequence[str], *, dry_run: bool) -> None:
    """Show and run one command.

    Raises:
        RouteError: If it fails.
    """
    say("$ " + shlex.join(command))
    if dry_run:
        return
    if subprocess.run(command, check=False).returncode:
        raise RouteError(f"this command failed: {shlex.join(command)}")


def pip(*arguments: str) -> list[str]:
    """The command line of this Python's pip."""
    return [sys.executable, "-m", "pip", *arguments]


PROBE = """\
import json
from transfer import d2
try:
    found = d2.require()
    print(json.dumps({"version": found.version, "path": str(found.path), "commit": found.commit, "error": None,
        "compiled": found.compiled, "bridges": found.bridges, "distribution": found.distribution}))
except d2.Detectron2Missing as error:
    print(json.dumps({"error": str(error)}))
"""


def probe() -> dict[str, Any]:
    """What Detectron2 a fresh process finds through transfer/d2.py: {"error": reason} or the fields of D2Info."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    path = [str(PROJECT_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def describe(found: dict[str, Any]) -> str:
    """One line about a Detectron2 that imports."""
    compiled = "compiled" if found["compiled"] else "not compiled (evaluates with pycocotools)"
    bridges = "; bridged: " + ", ".join(found["bridges"]) if found["bridges"] else ""
    return f"{found['distribution'] or found['version']} in {found['path']}, {compiled}{bridges}"


def is_from(found: dict[str, Any], source: str) -> bool:
    """Whether what is installed already came by the route that was asked for."""
    if source == "git":
        return bool(found["commit"] == UPSTREAM_COMMIT)
    return source == "auto" or str(found["distribution"]).endswith(WHEEL_VERSION)


def install_from_git(*, dry_run: bool) -> None:
    """Compile upstream at the pinned commit.

    Raises:
        RouteError: If git, a compiler or the repository is missing, or the build fails.
    """
    if shutil.which("git") is None:
        raise RouteError("git is not installed")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise RouteError("no C++ compiler (c++, g++, clang++)")
    say(f"is {UPSTREAM} reachable? (at most {REACHABLE_SECONDS} s)")
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # a proxy's password prompt would wait for ever
    try:
        subprocess.run(
            ["git", "ls-remote", UPSTREAM, "HEAD"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=REACHABLE_SECONDS,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise RouteError(f"{UPSTREAM} is not reachable") from error
    say("compiling; this takes one to five minutes")
    # Without isolation, because its setup.py imports the torch that it is compiled for.
    run(pip("install", "--no-build-isolation", f"git+{UPSTREAM}@{UPSTREAM_COMMIT}"), dry_run=dry_run)


def download_sdist(folder: Path) -> Path:
    """Fetch the sdist by pip's own settings (indexes, mirrors, find-links, proxies, certificates), building nothing.

    `pip download` would run the sdist's setup.py for its metadata, which fails. The parts of pip behind that command
    are not a public interface, but have kept their form for years (tried: 22.0, 23.2, 24.0, 25.3, 26.2).

    Raises:
        RouteError: If no index has the file, or its sha256 is another one.
    """
    name, version = SDIST.split("==")
    try:
        from pip._internal.commands import create_command  # lazy: only this route needs pip's insides
        from pip._vendor.packaging.specifiers import SpecifierSet

        command: Any = create_command("download")
        options, _ = command.parse_args(["--quiet", SDIST, "--no-deps", "--no-binary", ":all:"])
        with command.main_context():
            session = command.get_default_session(options)
            finder = command._build_package_finder(options, session)
            best = finder.find_best_candidate(name, SpecifierSet(f"=={version}")).best_candidate
            if best is None:
                raise RouteError(f"{SDIST} is not on any index or find-links folder that pip is set up to use")
            say(f"downloading {best.link.filename} from {best.link.comes_from or best.link.url_without_fragment}")
            response = session.get(best.link.url_without_fragment, headers={"Accept-Encoding": "identity"})
            response.raise_for_status()
            content = response.content
    except (ImportError, AttributeError, TypeError) as error:
        raise RouteError(f"this pip works differently inside ({error}); try: pip install 'pip<27'") from error
    except OSError as error:  # requests' exceptions are OSErrors
        raise RouteError(f"downloading {SDIST} failed: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SDIST_SHA256:
        raise RouteError(f"{best.link.filename} has sha256 {found}, expected {SDIST_SHA256}: not installed")
    path = folder / str(best.link.filename)
    path.write_bytes(content)
    return path


def write_wheel(sdist: Path, folder: Path) -> Path:
    """Pack the sdist's package folder as a wheel: a zip of the same files and three of ours. Needs no build tools."""
    contents: dict[str, bytes] = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith("detectron2/"):
                file = archive.extractfile(member)
                assert file is not None  # true of every regular file
                contents[name] = file.read()
    record = f"detectron2-{WHEEL_VERSION}.dist-info"
    contents[f"{record}/METADATA"] = WHEEL_METADATA.encode()
    contents[f"{record}/WHEEL"] = WHEEL_TAGS.encode()
    lines = [f"{name},{wheel_digest(content)},{len(content)}" for name, content in contents.items()]
    contents[f"{record}/RECORD"] = "\n".join([*lines, f"{record}/RECORD,,", ""]).encode()

    path = folder / f"detectron2-{WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in contents.items():
            wheel.writestr(name, content)
    return path


def wheel_digest(content: bytes) -> str:
    """Sha256 in the form that a wheel's RECORD wants."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def install_from_pypi(*, dry_run: bool) -> None:
    """Make a pure-Python wheel of the sdist's package folder and install it and what it imports.

    Raises:
        RouteError: If a download or an installation fails, or the sha256 differs.
    """
    say("installing what Detectron2 imports")
    run(pip("install", "--quiet", *RUNTIME_DEPENDENCIES), dry_run=dry_run)
    if dry_run:
        say(f"would download the sdist {SDIST}, check its sha256 and install its package folder as {WHEEL_VERSION}")
        return
    with tempfile.TemporaryDirectory(prefix="detectron2_") as name:
        folder = Path(name)
        wheel = write_wheel(download_sdist(folder), folder)
        # --no-index: the file is here, and nothing that an index offers under this name is wanted.
        run(pip("install", "--quiet", "--no-index", "--no-deps", "--force-reinstall", str(wheel)), dry_run=False)


def install_lvis(*, dry_run: bool) -> None:
    """Add LVIS's evaluator if it is absent; without it everything else works.

    Without its dependencies: it asks for opencv-python, which must not lie beside opencv-python-headless.
    """
    if list(importlib.metadata.distributions(name="lvis")):
        return
    try:
        run(pip("install", "--quiet", "--no-deps", LVIS), dry_run=dry_run)
    except RouteError as error:
        say(f"{error}; LVIS cannot be evaluated, all other tasks can")


ROUTES: dict[str, Callable[..., None]] = {"git": install_from_git, "pypi": install_from_pypi}


def install(source: str, *, dry_run: bool) -> bool:
    """Walk the routes of `source` until one leaves a Detectron2 that imports. Returns whether one did."""
    for route in ROUTES if source == "auto" else [source]:
        say(f"route {route}")
        try:
            ROUTES[route](dry_run=dry_run)
        except RouteError as error:
            say(f"route {route} does not work here: {error}")
            continue
        if dry_run:
            return True
        found = probe()
        if found["error"] is None:
            say(f"installed: {describe(found)}")
            return True
        say(f"route {route} installed something that does not import: {found['error']}")
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Install Detectron2 into this Python, by whichever route works here.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=("auto", *ROUTES),
        default="auto",
        help="auto: keep whatever imports, else git, else pypi; git or pypi: that route only (default: auto)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    arguments = parser.parse_args(argv)

    for module, remedy in (("torch", "pip install torch torchvision"), ("pip", "python -m ensurepip")):
        # Not find_spec: to look for the module pip makes setuptools hand out the standard library's distutils for good.
        if not list(importlib.metadata.distributions(name=module)):
            say(f"{module} is not installed in {sys.executable}; first: {remedy}")
            return 1
    say(f"looking for a Detectron2 that works in {sys.executable}")
    found = probe()
    if found["error"] is None and is_from(found, arguments.source):
        say(f"kept: {describe(found)}")
        install_lvis(dry_run=arguments.dry_run)
        return 0
    say(found["error"] or f"found {describe(found)}, but --from {arguments.source} asks for another")
    if install(arguments.source, dry_run=arguments.dry_run):
        install_lvis(dry_run=arguments.dry_run)
        return 0
    say("not installed. The lines above say what each route lacks; see upstream's INSTALL.md for other ways.")
    return 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
