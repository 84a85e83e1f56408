"""Whose checkpoint is this, and which of its networks to take: the one layout that fits, or the one ResNet in it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transfer.naming import from_detectron2
from transfer.sources.inputs import contradiction
from transfer.sources.layouts import Form, Layout, load_layouts
from transfer.sources.nesting import describe, dicts_in, tensors_in, value_at, without_module
from transfer.sources.resnet50 import looks_like_a_resnet

BACKBONE = "backbone/"
ANY = "resnet50"
"""Name of what has no layout of its own: one ResNet-50 under torchvision's names, wherever it lies."""
SECOND = ("key", "momentum", "EMA", "target", "teacher", "student")
"""The networks beside the one that is usually used: moving averages, except that of a teacher and its student."""
NETWORKS = {"q": "query", "query": "query", "k": "key"} | {network.lower(): network for network in SECOND}
"""Word in the place of a network to what it is, as in "encoder_k" or "teacher_backbone"."""


class SourceError(ValueError):
    """A file that is readable, but in which no ResNet-50 of known naming is found; the message says why."""


@dataclass(frozen=True)
class Found:
    """The network in a file's content.

    Attributes:
        layout: Whose checkpoint it is; None for a ResNet-50 that nothing in the file names.
        network: Which of the file's networks was taken.
        tensors: "role/library name" to tensor.
        left_out: Name in the file to the reason, for what is known to lie beside the network.
        unexplained: Names in the file that are neither.
        settings: What the file and the layout say of the pretraining: `method`, `epochs` and so on.
        caution: What the network's place in the file says against using it; empty if nothing.
    """

    layout: Layout | None
    network: str
    tensors: Mapping[str, Tensor]
    left_out: Mapping[str, str]
    unexplained: tuple[str, ...]
    settings: Mapping[str, Any]
    caution: str = ""


def recognise(content: Mapping[str, Any], wanted: str | None = None) -> Found:
    """Find the network in the content of a checkpoint.

    Args:
        content: What the file holds.
        wanted: Name of the layout to take; None to recognise it. Forms in which nothing names the project count only
            if they are wanted.

    Raises:
        SourceError: If no layout fits or several do, if there is not exactly one ResNet in a file that no layout
            fits, or if the layout is known and refused.
    """
    layouts = load_layouts()
    if wanted is not None and wanted not in layouts:
        raise SourceError(f"there is no source {wanted!r}; the known ones are {', '.join(layouts)}")
    if wanted is not None:
        layout = layouts[wanted]
        form = _fitting_form(content, layout, forced=True)
        if form is None:
            forms = "; ".join(form.describe() for form in layout.forms)
            raise SourceError(f"it is not as {layout.title} saves it ({forms}). It holds\n{describe(content)}")
        return _take(content, layout, form)
    fitting = [
        (layout, form)
        for layout in layouts.values()
        if (form := _fitting_form(content, layout, forced=False)) is not None
    ]
    if len(fitting) > 1:
        names = ", ".join(layout.name for layout, _ in fitting)
        raise SourceError(f"it fits several layouts: {names}; say which one with --source")
    return _take(content, *fitting[0]) if fitting else _only_resnet(content)


def _fitting_form(content: Mapping[str, Any], layout: Layout, *, forced: bool) -> Form | None:
    """Return the first form of a layout that the content has."""
    for form in layout.forms:
        if form.anonymous and not forced:
            continue
        tensors = tensors_in(value_at(content, form.outer))
        if tensors and _fits(content, without_module(tensors), tensors, form):
            is_there = f"{BACKBONE}conv1.weight" in _targets(without_module(tensors), form).values()
            if is_there or layout.refuse:
                return form
    return None


def _fits(content: Mapping[str, Any], names: Mapping[str, str], tensors: Mapping[str, Tensor], form: Form) -> bool:
    """Whether a form's conditions hold; `names` are those of the tensors without and with the wrapper's prefix."""

    def some(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    def has_size(name: str, size: list[int]) -> bool:
        return name in names and list(tensors[names[name]].shape) == size

    return (
        all(some(pattern) for pattern in form.needs)
        and not any(some(pattern) for pattern in form.lacks)
        and all(has_size(name, size) for name, size in (form.sizes or {}).items())
        and not any(has_size(name, size) for name, size in (form.not_sizes or {}).items())
        and all(value_at(content, path) is not None for path in form.has)
        and all(value_at(content, path) is None for path in form.without)
        and all(value_at(content, path) == value for path, value in (form.equals or {}).items())
    )


def _targets(names: Mapping[str, str], form: Form) -> dict[str, str]:
    """Return "role/library name" for every name that the form takes."""
    if form.names == "detectron2":
        known = {name: from_detectron2(name) for name in names}
        return {name: target for name, target in known.items() if target is not None}
    targets: dict[str, str] = {}
    starts = sorted(form.take or {}, key=len, reverse=True)
    for name in names:
        start = next((start for start in starts if name.startswith(start)), None)
        if start is not None and form.take is not None and _reason(name, form) is None:
            targets[name] = form.take[start] + name[len(start) :]
    return targets


def _reason(name: str, form: Form) -> str | None:
    beside = (form.beside or {}).items()
    return next((reason for pattern, reason in beside if re.fullmatch(pattern, name)), None)


def _take(content: Mapping[str, Any], layout: Layout, form: Form) -> Found:
    """Sort a file's names into the network, what is known beside it, and the rest."""
    if layout.refuse:
        raise SourceError(f"it is {layout.title}, which is not converted: {layout.refuse}")
    tensors = tensors_in(value_at(content, form.outer))
    names = without_module(tensors)
    targets = _targets(names, form)
    if len(set(targets.values())) < len(targets):
        raise SourceError(f"several of its names mean the same tensor of {layout.title}; it holds\n{describe(content)}")
    if "preprocess" not in content:
        inner = {name: tensors[full] for name, full in names.items()}
        if difference := contradiction(inner, form, layout.preprocess):
            raise SourceError(f"it is of {layout.title}, and {difference}; weights of another input are not converted")
    reasons = {full: reason for name, full in names.items() if (reason := _reason(name, form)) is not None}
    beside = value_at(content, form.outer.rpartition(".")[0]) if form.outer else {}
    siblings = {name: reason for name, reason in (form.siblings or {}).items() if name in beside}
    taken = {names[name] for name in targets}
    settings = {key: value_at(content, path) for key, path in (form.settings or {}).items()}
    return Found(
        layout=layout,
        network=form.network,
        tensors={target: tensors[names[name]] for name, target in targets.items()},
        left_out=reasons | siblings,
        unexplained=tuple(name for name in tensors if name not in taken and name not in reasons),
        settings={"method": form.method, **settings} if form.method else settings,
    )


def _only_resnet(content: Mapping[str, Any]) -> Found:
    """Take the one ResNet under torchvision's names, wherever it lies and whatever precedes its names."""
    found = list(_resnets(content))
    if len(found) > 1:
        places = ", ".join(repr(f"{path}: {start}".strip(": ")) for path, start, _ in found)
        raise SourceError(
            f"it holds {len(found)} ResNets, at {places}, and fits no known layout: save the one to take in its own "
            f"file, or say whose checkpoint it is with --source. It holds\n{describe(content)}"
        )
    if not found:
        raise SourceError(
            f"it holds no ResNet-50 under torchvision's names{_guess(content)}. It holds\n{describe(content)}"
        )
    path, start, tensors = found[0]
    words = re.split(r"[^a-z0-9]+", f"{path}.{start}".lower())
    network = next((NETWORKS[word] for word in words if word in NETWORKS), "backbone")
    return Found(
        layout=None,
        network=network,
        tensors={BACKBONE + name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)},
        left_out={},
        unexplained=tuple(name for name in tensors if not name.startswith(start)),
        settings={},
        caution=(
            f"the only ResNet-50 in the file lies at {f'{path}: {start}'.strip(': ')!r}, so by its name it is the "
            f"{network} network, one of a pair, of which published results are usually the other's. Take the file "
            f"that holds both, or be sure that this one is meant"
            if network in SECOND
            else ""
        ),
    )


def _resnets(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Tensor]]]:
    """Yield path of the dict, start of the names and the dict's tensors of every ResNet."""
    stem = "conv1.weight"
    for path, value in dicts_in(content):
        tensors = tensors_in(value)
        for start in [name[: -len(stem)] for name in tensors if name == stem or name.endswith(f".{stem}")]:
            if looks_like_a_resnet(tensors, start):
                yield path, start, tensors


def _guess(content: Mapping[str, Any]) -> str:
    """Say what a file without a ResNet-50 is instead, as far as its names tell."""
    names = [name for _, value in dicts_in(content) for name in tensors_in(value)]
    if any(name.endswith("conv1.0.weight") for name in names):
        return ": its stem is several convolutions (conv1.0), as in ResNet-50-D; only the 7x7 stem is supported"
    if any(name.endswith("layer1.0.conv2.weight") for name in names):
        return ": it is another ResNet (another depth, or a stem that is not 64x3x7x7)"
    if any("res2_0_branch2a" in name for name in names):
        return ": these are Caffe2's names, as in Detectron2's model zoo; give the file to MODEL.WEIGHTS as it is"
    if any("embedder" in name for name in names):
        return ": these are Hugging Face's names; convert its timm or torchvision counterpart"
    return "" if names else ", nor any tensor"
