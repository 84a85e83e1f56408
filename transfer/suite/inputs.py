"""The files that decide on a job's result, config, bases and weights: their digests say when one has changed."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from transfer.digest import sha256_of

BASE = "_BASE_"


def config_files(config: Path) -> list[Path]:
    """A config and the local files that it inherits from, directly or not, each once.

    What is missing or not YAML is left to the check of the jobs, which says so. The paths are found as fvcore's
    CfgNode.load_yaml_with_base finds them.
    """
    found: dict[Path, None] = {}  # an ordered set
    left = [config]
    while left:
        path = left.pop()
        if path.is_file() and path.resolve() not in found:
            found[path.resolve()] = None
            left += [path.parent / Path(base).expanduser() for base in _bases(path)]
    return list(found)


def _bases(path: Path) -> list[str]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # makes nothing but text of tags
    except (yaml.YAMLError, UnicodeDecodeError):
        return []
    named = content.get(BASE, []) if isinstance(content, dict) else []
    return [base for base in ([named] if isinstance(named, str) else named) if isinstance(base, str)]


def changed_files(inputs: Mapping[str, str]) -> list[str]:
    """Paths whose content is not what it was, or that are gone.

    Args:
        inputs: Digest by path.
    """
    return [path for path, digest in inputs.items() if not Path(path).is_file() or sha256_of(Path(path)) != digest]
