"""The settings of a run on one screen: what --check prints and the log begins with."""

from collections.abc import Mapping, Sequence
from typing import Any

from transfer.checks.findings import WARNING
from transfer.checks.heads import class_node
from transfer.checks.protocol import grouped
from transfer.tasks import load_tasks, show
from transfer.weights import WeightsRecord

STEM_AND_STAGES = ("the stem", "res2", "res3", "res4", "res5")


def describe_settings(
    cfg: Any, weights: WeightsRecord, *, based_on: str, processes: int, evaluators: Mapping[str, str]
) -> str:
    """A line per setting that decides about comparability.

    Args:
        cfg: The resolved config.
        weights: Record of MODEL.WEIGHTS.
        based_on: Name of the protocol whose recipe the user's own data are trained with; "" otherwise.
        processes: GPUs of all machines together, at least 1.
        evaluators: Test set -> evaluator_type of its metadata.
    """
    task = load_tasks().get(cfg.TRANSFER.TASK or based_on)
    title = f"{task.name}: {task.title}" if task else "a task of your own"
    rows = {
        "recipe": f"{task.recipe if task else 'none published'}, {cfg.TRANSFER.INIT} weights"
        + (", on data of your own" if based_on else ""),
        "weights": _weights(weights),
        "input": _input(cfg, weights),
        "trunk": _trunk(cfg),
        **({"FPN": f"norm {cfg.MODEL.FPN.NORM or 'none'}"} if "fpn" in cfg.MODEL.BACKBONE.NAME else {}),
        "heads": _heads(cfg),
        "batch": _batch(cfg, processes),
        "schedule": _schedule(cfg),
        "images": _images(cfg),
        "precise BN": f"{cfg.TEST.PRECISE_BN.NUM_ITER} iterations" if cfg.TEST.PRECISE_BN.ENABLED else "off",
        "train": ", ".join(cfg.DATASETS.TRAIN),
        "test": ", ".join(f"{name} (evaluator {kind})" for name, kind in evaluators.items()),
        "seed": str(cfg.SEED),
    }
    return "\n".join([f"Settings of {title}", *(f"  {name:<11}{value}" for name, value in rows.items())])


def describe_findings(task: str, departures: Sequence[str], notes: Sequence[str], errors: Sequence[str]) -> str:
    """Departures by group, warnings, notes, and a last line that says whether the run may start.

    Args:
        task: Name of the protocol that the departures are from; "" for a task of the user's own.
        departures: Sentences of `departures_of`.
        notes: For the log; those that begin with WARNING are warnings.
        errors: Why the run is refused.
    """
    lines = []
    for group, members in grouped(departures).items():
        lines += [f"departures from the published recipe, {group}:", *(f"  {sentence}" for sentence in members)]
    lines += [f"warning: {note.removeprefix(WARNING)}" for note in notes if note.startswith(WARNING)]
    lines += [f"note: {note}" for note in notes if not note.startswith(WARNING)]
    end = f"refused: {_count(len(errors), 'error')}" if errors else "ready"
    if departures:
        end += f"; {_count(len(departures), 'departure')}: results.json and tables mark such a run"
    else:
        end += "; no departures from the published recipe" if task else "; no published task to compare with"
    return "\n".join([*lines, end])


def _weights(record: WeightsRecord) -> str:
    if not record.path:
        return "none (random)"
    parts = [record.path + (f" (sha256 {record.sha256[:12]})" if record.sha256 else "")]
    method, epochs = record.provenance.get("method"), record.provenance.get("epochs")
    if method:
        parts.append(f"{method} {epochs:g} epochs" if isinstance(epochs, int | float) else str(method))
    source = record.provenance.get("source")
    if isinstance(source, dict) and source.get("file"):
        parts.append(f"made of {source['file']}")
    return ", ".join(parts)


def _input(cfg: Any, record: WeightsRecord) -> str:
    known = "the weights have no record of theirs" if record.preprocess is None else "compared with the weights' record"
    mean, std = show(cfg.MODEL.PIXEL_MEAN), show(cfg.MODEL.PIXEL_STD)
    return f"{cfg.INPUT.FORMAT}, mean {mean}, std {std}" + (f"; {known}" if record.path else "")


def _trunk(cfg: Any) -> str:
    nets, frozen = cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.FREEZE_AT
    parts = [
        f"ResNet-{nets.DEPTH}",
        f"norm {nets.NORM or 'none'}",
        f"stride in the {'1x1' if nets.STRIDE_IN_1X1 else '3x3'}",
        f"{' and '.join(STEM_AND_STAGES[:frozen])} frozen" if frozen else "nothing frozen",
    ]
    return ", ".join(parts)


def _heads(cfg: Any) -> str:
    model = cfg.MODEL
    if model.META_ARCHITECTURE == "RetinaNet":
        head = model.RETINANET
        return f"{head.NUM_CONVS} conv per subnet, norm {head.NORM or 'none'}, {head.NUM_CLASSES} classes"
    node = class_node(cfg)
    if node != "ROI_HEADS":
        return f"{model.META_ARCHITECTURE}, {model[node].NUM_CLASSES} classes"
    roi, box = model.ROI_HEADS, model.ROI_BOX_HEAD
    parts = [f"{roi.NAME}, {roi.NUM_CLASSES} classes"]
    if not roi.NAME.startswith("Res5"):
        parts.append(f"box {box.NUM_CONV} conv + {box.NUM_FC} fc, norm {box.NORM or 'none'}")
    if model.MASK_ON:
        parts.append(f"mask {model.ROI_MASK_HEAD.NUM_CONV} conv, norm {model.ROI_MASK_HEAD.NORM or 'none'}")
    if model.KEYPOINT_ON:
        parts.append(f"keypoint {model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS}")
    return "; ".join(parts)


def _batch(cfg: Any, processes: int) -> str:
    solver = cfg.SOLVER
    share = f"{solver.IMS_PER_BATCH / processes:g} on each" if processes > 1 else "in one process"
    return (
        f"{solver.IMS_PER_BATCH} images on {_count(processes, 'GPU')} ({share}), {cfg.TRANSFER.OPTIMIZER} lr "
        f"{solver.BASE_LR:g}, weight decay {solver.WEIGHT_DECAY:g}"
    )


def _schedule(cfg: Any) -> str:
    solver = cfg.SOLVER
    steps = ", ".join(map(str, solver.STEPS)) or "never"
    return f"{solver.MAX_ITER} iterations, lr x {solver.GAMMA:g} at {steps}, warm-up {solver.WARMUP_ITERS}"


def _images(cfg: Any) -> str:
    sizes = cfg.INPUT
    short = sorted(sizes.MIN_SIZE_TRAIN)
    span = f"{short[0]} to {short[-1]}" if len(short) > 1 else str(short[0])
    return (
        f"short side {span}, at most {sizes.MAX_SIZE_TRAIN}; test {sizes.MIN_SIZE_TEST}, at most {sizes.MAX_SIZE_TEST}"
        + (f"; mapper {cfg.TRANSFER.MAPPER}" if cfg.TRANSFER.MAPPER else "")
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
