"""--auto-scale: Detectron2's own rule for another number of GPUs than the published 8, shown as a table."""

from typing import Any

from transfer import d2
from transfer.preflight import PUBLISHED_GPUS
from transfer.tasks import pairs, show

d2.require()

from detectron2.engine import DefaultTrainer  # noqa: E402


def auto_scale(cfg: Any, processes: int) -> tuple[Any, str]:
    """Scale a config that was written for 8 GPUs to `processes`, with the images per GPU unchanged.

    Detectron2 multiplies the total batch and lr by processes / 8 and divides iterations, steps, warm-up and periods by
    it. PreciseBN's number of iterations stays.

    Returns:
        The scaled copy (the same values if `processes` is 8), and a table of what changed.

    Raises:
        ValueError: If the batch is not divisible by 8, as Detectron2's rule needs.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or PUBLISHED_GPUS
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ValueError(
            f"--auto-scale is for configs of {reference} GPUs, but SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is "
            f"not a multiple of {reference}; leave it out"
        )
    before = cfg.clone()
    before.defrost()
    before.SOLVER.REFERENCE_WORLD_SIZE = reference
    after = DefaultTrainer.auto_scale_workers(before, processes)
    old, new = dict(pairs(before)), dict(pairs(after))
    rows = [(key, show(old[key]), show(new[key])) for key in new if old[key] != new[key]]
    if not rows:
        return after, f"--auto-scale: {processes} GPUs are the published number; nothing changed."
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    table = [f"  {key:<{widths[0]}}  {was:>{widths[1]}}  ->  {becomes}" for key, was, becomes in rows]
    return after, "\n".join([f"--auto-scale from {reference} to {processes} GPUs:", *table])


def refuse_silent_scaling(cfg: Any, processes: int) -> None:
    """Refuse a config that Detectron2 would scale without being asked to by --auto-scale.

    Raises:
        ValueError: If SOLVER.REFERENCE_WORLD_SIZE is set to another number than `processes`.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference not in (0, processes):
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, but this run has {processes} GPUs: Detectron2 would change "
            "batch, lr and iterations without a word. Add --auto-scale if that is wanted, or set the key to 0"
        )
