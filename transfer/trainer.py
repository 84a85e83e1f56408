"""Detectron2's DefaultTrainer with our evaluators, a strict first load, and equal BN statistics on all ranks."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detco.distributed import broadcast_from_first
from transfer import d2, densepose
from transfer.evaluation import build_evaluator
from transfer.mappers import build_mapper
from transfer.optimizer import build_optimizer
from transfer.preflight import WeightsDoNotFit, check_backbone_loaded
from transfer.resuming import continue_loader, continued_seed, mend_last_checkpoint
from transfer.run_record import is_result
from transfer.weights import WeightsRecord, read_record

d2.require()

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import build_detection_train_loader  # noqa: E402
from detectron2.engine import DefaultTrainer, HookBase, hooks  # noqa: E402
from detectron2.evaluation import DatasetEvaluator  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.env import seed_all_rng  # noqa: E402
from detectron2.utils.events import EventWriter  # noqa: E402

logger = logging.getLogger(__name__)

LOG_EVERY = 20  # iterations, as in Detectron2


class FolderNotShared(ValueError):
    """OUTPUT_DIR is not the same folder on all machines."""


class LoadingAccount(DetectionCheckpointer):  # type: ignore[misc]  # Detectron2 is not followed
    """Detectron2's loader, which also remembers what the file did not provide.

    Attributes:
        missing: Names of the model's tensors that the last file lacked, or had in another shape.
        match_suffixes: Whether names are matched by their ends even if the file does not ask for it, as
            "?matching_heuristics=True" wants.
    """

    missing: list[str]
    match_suffixes = False

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded: dict[str, Any] = super()._load_file(filename)
        if self.match_suffixes:  # Detectron2 itself understands the query only since 2022
            loaded["matching_heuristics"] = True
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        # fvcore only logs what it could not place; this method is its extension point (Detectron2 uses it as well).
        incompatible = super()._load_model(checkpoint)
        wrong_shape = [name for name, _, _ in incompatible.incorrect_shapes]
        self.missing = sorted({*incompatible.missing_keys, *wrong_shape})
        return incompatible


def load_backbone(model: nn.Module, record: WeightsRecord, weights: str) -> None:
    """Load the weights that fine-tuning starts from; nothing happens if there are none.

    Args:
        model: A detector, maybe wrapped by DistributedDataParallel.
        record: Of the weights.
        weights: The value of MODEL.WEIGHTS.

    Raises:
        WeightsDoNotFit: If a tensor of the backbone is not in the file.
    """
    if not weights:
        return
    account = LoadingAccount(model)
    path, _, query = weights.partition("?")
    account.match_suffixes = query == "matching_heuristics=True"
    account.load(path, checkpointables=[])
    names = [name.removeprefix("module.") for name in model.state_dict()]
    logger.info(check_backbone_loaded(names, account.missing, record))


def last_checkpoint(checkpointer: DetectionCheckpointer) -> str:
    """The last checkpoint of the folder as rank 0 sees it; "" if there is none. Collective.

    Raises:
        FolderNotShared: If another rank does not see that file: it would start over while rank 0 goes on.
    """
    named = checkpointer.get_checkpoint_file() if comm.is_main_process() and checkpointer.has_checkpoint() else ""
    path: str = comm.all_gather(named if Path(named).is_file() else "")[0]
    blind = [rank for rank, sees in enumerate(comm.all_gather(not path or Path(path).is_file())) if not sees]
    if blind:
        raise FolderNotShared(
            f"OUTPUT_DIR must be shared by all machines: rank 0 resumes from {path}, which is no file on rank "
            f"{', '.join(map(str, blind))}"
        )
    return path


def load_detector(model: nn.Module, cfg: CfgNode, *, run_dir: Path | None) -> None:
    """Load a whole trained detector for evaluation: the last checkpoint of `run_dir`, else MODEL.WEIGHTS. Collective.

    Raises:
        WeightsDoNotFit: If there is none, or it is not a complete detector of this architecture.
        FolderNotShared: As `last_checkpoint`.
    """
    account = LoadingAccount(model, save_dir=str(run_dir or ""))
    path = (run_dir and last_checkpoint(account)) or cfg.MODEL.WEIGHTS
    if not path:
        raise WeightsDoNotFit(
            "--eval-only needs a trained detector: append MODEL.WEIGHTS RUN/model_final.pth, or --resume with the "
            "--output-dir of a run"
        )
    account.load(path, checkpointables=[])
    missing = [name for name in account.missing if not name.endswith(".num_batches_tracked")]
    if missing:
        raise WeightsDoNotFit(
            f"{path} is not a trained detector of this config: {len(missing)} of the model's tensors are not in it "
            f"(first: {', '.join(missing[:3])})"
        )


class EqualBuffers(HookBase):  # type: ignore[misc]
    """Gives every rank the BN statistics of rank 0 before evaluation.

    PreciseBN computes them on each rank from its own images; the checkpoint holds rank 0's. So that the network that is
    evaluated is the one that is saved, all ranks take rank 0's (detectron2 issue 5398).
    """

    def __init__(self, period: int) -> None:
        self.period = period

    def after_step(self) -> None:
        """Broadcast after the iterations that PreciseBN follows. Collective."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period > 0 and done % self.period == 0):
            for buffer in self.trainer.model.buffers():
                broadcast_from_first(buffer)


class TransferTrainer(DefaultTrainer):  # type: ignore[misc]
    """Fine-tunes and evaluates as Detectron2 does; see the module for what differs.

    Attributes:
        writers: Where metrics go; on the first rank only.
        seconds: Time spent in `train`, including the parts before a resume and the evaluation.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._seconds_before = 0.0
        self._started = time.monotonic()
        super().__init__(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """The evaluator that the dataset's metadata ask for; predictions go to OUTPUT_DIR/inference."""
        return build_evaluator(cfg, dataset_name, output_folder or f"{cfg.OUTPUT_DIR}/inference")

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's loader with the mapper of the config."""
        if cfg.TRANSFER.MAPPER == densepose.MAPPER:
            return densepose.build_train_loader(cfg)
        return build_detection_train_loader(cfg, mapper=build_mapper(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's loader for one dataset."""
        if cfg.TRANSFER.MAPPER == densepose.MAPPER:
            return densepose.build_test_loader(cfg, dataset_name)
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of the config."""
        return build_optimizer(cfg, model)

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, and EqualBuffers right after PreciseBN, hence before the checkpoint and evaluation.

        Short runs are logged more often than every 20 iterations.
        """
        built: list[HookBase | None] = super().build_hooks()
        period = max(1, min(LOG_EVERY, self.cfg.SOLVER.MAX_ITER // 8))
        built[:] = [
            hooks.PeriodicWriter(self.writers, period=period) if isinstance(hook, hooks.PeriodicWriter) else hook
            for hook in built
        ]
        after = [index for index, hook in enumerate(built) if isinstance(hook, hooks.PreciseBN)]
        for index in after:
            built.insert(index + 1, EqualBuffers(self.cfg.TEST.EVAL_PERIOD))
        return built

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's console, JSON and TensorBoard writers."""
        built: list[EventWriter] = super().build_writers()
        self.writers = built
        return built

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from OUTPUT_DIR's last checkpoint, or load MODEL.WEIGHTS and insist on the whole backbone.

        A last checkpoint that a kill has cut short is passed over for the newest whole one. Rank 0 decides. Collective.

        Raises:
            WeightsDoNotFit: If a tensor of the backbone is not in MODEL.WEIGHTS.
            FolderNotShared: As `last_checkpoint`.
        """
        if resume and comm.is_main_process():
            for note in mend_last_checkpoint(Path(self.cfg.OUTPUT_DIR)):
                logger.warning(note)
        path = last_checkpoint(self.checkpointer) if resume else ""
        if not path:
            load_backbone(self.model, read_record(self.cfg.MODEL.WEIGHTS), self.cfg.MODEL.WEIGHTS)
            return
        self.checkpointer.load(path)
        self.start_iter = self.iter + 1  # the checkpoint has the iteration that it was saved after
        self._continue_data()
        logger.info("Resuming after iteration %d of %d.", self.start_iter, self.max_iter)

    def _continue_data(self) -> None:
        """Train on the images that come next, instead of the first ones again.

        With a SEED, the order of the images is that of a run that was not interrupted, on any number of processes, and
        so are the batches, unless they are grouped by aspect ratio: images then wait for others of their shape, and
        around the resume up to 2 (B - 1) images of each process, B its batch, are left out and as many come twice; with
        W workers up to B (W - 1) more. Not as before: flips, sizes and crops, and which boxes are sampled, for which
        the random numbers are seeded anew from SEED, iteration and rank; and PreciseBN's own images, which start with
        the first. Without a SEED each start has its own order.
        """
        if self.cfg.SEED >= 0:
            seed_all_rng(continued_seed(self.cfg.SEED, self.start_iter, comm.get_rank()))
        loop = self._trainer
        continue_loader(loop.data_loader, self.start_iter * self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
        if "_data_loader_iter" in vars(loop):  # Detectron2 0.5 begins to iterate in its constructor, later ones do not
            loop._data_loader_iter = iter(loop.data_loader)

    @property
    def seconds(self) -> float:
        """Time spent on this run so far."""
        return self._seconds_before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's state and the time spent."""
        return {**super().state_dict(), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._seconds_before = state_dict.pop("seconds", 0.0)
        super().load_state_dict(state_dict)

    def last_metrics(self) -> Mapping[str, float]:
        """Every scalar of the last evaluation, by Detectron2's names ("bbox/AP50"); empty on ranks but the first."""
        latest: dict[str, tuple[float, int]] = self.storage.latest()
        return {name: value for name, (value, _) in latest.items() if is_result(name)}


def device_of(cfg: CfgNode, *, num_gpus: int) -> str:
    """MODEL.DEVICE for this machine: the config's, or the CPU if there is no CUDA or --num-gpus is 0."""
    if str(cfg.MODEL.DEVICE).startswith("cuda") and (num_gpus == 0 or not torch.cuda.is_available()):
        return "cpu"
    return str(cfg.MODEL.DEVICE)
