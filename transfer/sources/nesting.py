"""What a checkpoint holds where: values at dotted paths, dicts of tensors, and a picture of the rest for messages."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer.safe_read import Inert

DEPTH = 5
"""How many dicts deep tensors are looked for; VISSL's lie four deep."""


def value_at(content: Any, path: str) -> Any:
    """Return the value at a dotted path of keys and attributes, None if there is none; "" is the content itself."""
    for key in path.split(".") if path else ():
        inner = content.attributes if isinstance(content, Inert) else content
        if not isinstance(inner, Mapping) or key not in inner:
            return None
        content = inner[key]
    return content


def as_tensor(value: Any) -> Tensor | None:
    """Return a tensor or an array of numbers as a tensor, None if it is neither, or a tensor without plain content."""
    if isinstance(value, Tensor):
        is_plain = value.layout == torch.strided and value.device.type == "cpu"
        return value if is_plain else None
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # Copied only where torch needs it: if the array cannot be written or is not in this machine's byte order.
        is_usable = value.flags.writeable and value.dtype.isnative
        return torch.from_numpy(value if is_usable else np.array(value, dtype=value.dtype.newbyteorder("=")))
    return None


def tensors_in(content: Any) -> dict[str, Tensor]:
    """Return the tensors that lie directly in a dict, by name; none if it is no dict."""
    if not isinstance(content, Mapping):
        return {}
    found = {str(name): as_tensor(value) for name, value in content.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def without_module(names: Mapping[str, Tensor]) -> dict[str, str]:
    """Return each name without a leading "module." to the name itself; unchanged names if two would become one."""
    inner = {name.removeprefix("module."): name for name in names}
    return inner if len(inner) == len(names) else {name: name for name in names}


def dicts_in(content: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield every dict with its dotted path, the outermost first, each once even if it lies in several places."""
    seen: set[int] = set()
    level = [("", content)]
    for _ in range(DEPTH):
        inner: list[tuple[str, Any]] = []
        for path, value in level:
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                yield path, value
                inner += [(f"{path}.{key}" if path else str(key), below) for key, below in value.items()]
        level = inner


def describe(content: Any) -> str:
    """Say what a file holds: its dicts with the number of their tensors, and the ten most frequent starts of names."""
    lines, names = [], Counter[str]()
    for path, value in dicts_in(content):
        tensors = tensors_in(value)
        names.update(".".join(name.split(".")[:2]) for name in tensors)
        others = Counter(_type_of(below) for key, below in value.items() if str(key) not in tensors)
        counts = [f"{len(tensors)} tensors"] if tensors else []
        counts += [f"{count} {name}" for name, count in others.most_common(4)]
        lines.append(f"  {path or '(top level)'}: {', '.join(counts) or 'empty'}")
    if len(lines) > 20:
        lines = [*lines[:20], f"  and {len(lines) - 20} more dicts"]
    frequent = ", ".join(f"{start} ({count})" for start, count in names.most_common(10))
    total = sum(names.values())
    return "\n".join([*lines, f"  most frequent starts of the {total} names: {frequent or 'none'}"])


def _type_of(value: Any) -> str:
    return value.name if isinstance(value, Inert) else type(value).__name__
