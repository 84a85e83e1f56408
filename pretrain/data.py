"""From a list of images to collated batches: sampling, decoding, workers, and what happens to unreadable files.

Which samples make up a step, and every random parameter of a sample, are functions of (seed, epoch, index) alone, so
neither the number of workers, nor the number of processes, nor an interruption changes what the network sees.
"""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from detco.views.base import ProposalRecipe, ViewRecipe
from detco.views.host import sample_generator
from detco.views.photo import Photo, UnreadableImage
from pretrain import fork_server
from pretrain.bad_samples import BadSample, BadSampleLog, TooManyBadSamples
from pretrain.images import ImageList, ImagesLost
from pretrain.proposals.store import ProposalsError, ProposalStore

__all__ = [
    "ENDS_THE_RUN",
    "BadSample",
    "BadSampleLog",
    "Batch",
    "BatchSampler",
    "PretrainDataset",
    "PretrainLoader",
    "TooManyBadSamples",
    "WorkerDied",
    "build_loader",
]

MAX_UNREADABLE_IN_A_ROW = 2000
"""How many files are tried for one sample: more than a folder of ImageNet holds, so that one lost folder is survived,
and few enough that a lost disk is noticed at once."""

SampleT = TypeVar("SampleT")


class Item(NamedTuple):
    """One sample as a worker makes it.

    Attributes:
        sample: What the recipe drew, without a batch dimension.
        asked_index: Position in the image list that was asked for, whether or not that file could be read.
        bad: Set if that file could not be read.
    """

    sample: Any
    asked_index: int
    bad: BadSample | None


class Batch(NamedTuple):
    """B collated samples of this process.

    Attributes:
        sample: The recipe's (nested) NamedTuple with a leading B.
        indices: Positions in the image list that were asked for, int64, shape (B,).
        bad: One entry per sample that had to be replaced.
    """

    sample: Any
    indices: Tensor
    bad: list[BadSample]


class WorkerDied(RuntimeError):
    """A loader worker ended without an exception of its own: killed, out of memory, or crashed in a decoder."""


ENDS_THE_RUN = (TooManyBadSamples, WorkerDied, ImagesLost, ProposalsError)
"""What a loader raises when the run cannot go on; the message is all the user needs."""


class _Failure(NamedTuple):
    """In the place of a batch that cannot be made: torch would pass a worker's error on as the text of a traceback."""

    error: Exception


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) pairs of each step of this process, from `start_step` to `total_steps`.

    The global batch of a step is a stretch of the epoch's permutation, the same for every world size; this process
    gets its contiguous slice. What does not fill a batch at the end of an epoch is dropped.

    Attributes:
        steps_per_epoch: Optimiser steps in one pass over the images.
    """

    def __init__(
        self,
        num_images: int,
        batch_size_total: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int,
        total_steps: int,
    ) -> None:
        """Raise ValueError if no step can be made, or the batch does not divide among the processes."""
        if batch_size_total < 1 or batch_size_total % world_size:
            raise ValueError(
                f"SOLVER.BATCH_SIZE_TOTAL {batch_size_total} does not divide among {world_size} processes; "
                f"make it a multiple of {world_size}"
            )
        if num_images < batch_size_total:
            raise ValueError(
                f"{num_images} images do not fill one batch of SOLVER.BATCH_SIZE_TOTAL {batch_size_total}; "
                f"use more images or a smaller batch"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step {start_step} is not in [0, total_steps {total_steps}]")
        self.num_images = num_images
        self.steps_per_epoch = num_images // batch_size_total
        self._batch_size_total = batch_size_total
        self._batch_size_per_process = batch_size_total // world_size
        self._rank = rank
        self._seed = seed
        self._steps = range(start_step, total_steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch = -1
        order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        for step in self._steps:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, self._order(epoch)
            start = step_in_epoch * self._batch_size_total + self._rank * self._batch_size_per_process
            yield [(epoch, index) for index in order[start : start + self._batch_size_per_process].tolist()]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        # numpy pads seeds with zeros: (seed, epoch) would be the stream of sample 0. No sample has index num_images.
        return np.random.default_rng((self._seed, epoch, self.num_images)).permutation(self.num_images)


class PretrainDataset(Dataset[Item], Generic[SampleT]):
    """Reads, decodes and cuts one image per (epoch, index).

    An unreadable file is replaced by the next readable one in the list (wrapping at its end) with its own proposals,
    drawn with the random numbers of the sample that was asked for.
    """

    def __init__(
        self, images: ImageList, recipe: ViewRecipe[SampleT, Any], seed: int, proposals: ProposalStore | None
    ) -> None:
        """Read `images` for `recipe`, with `proposals` of the same list if and only if it is a ProposalRecipe."""
        assert isinstance(recipe, ProposalRecipe) == (proposals is not None)
        self._images = images
        self._recipe = recipe
        self._seed = seed
        self._proposals = proposals

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> Item:
        """The sample of (epoch, index).

        Raises:
            TooManyBadSamples: If the next `MAX_UNREADABLE_IN_A_ROW` files cannot be read either.
            ProposalsError: If the proposals are of another version of the image.
        """
        epoch, asked = epoch_and_index
        reason = ""
        num_tries = min(MAX_UNREADABLE_IN_A_ROW, len(self))
        for offset in range(num_tries):
            index = (asked + offset) % len(self)
            try:
                photo = self._open(index)
                # What a photo that proves to be damaged has drawn before does not count.
                sample = self._draw(photo, index, sample_generator(seed=self._seed, epoch=epoch, index=asked))
            except UnreadableImage as error:
                reason = reason or str(error)
            else:
                bad = BadSample(self._images.name(asked), reason, self._images.name(index)) if offset else None
                return Item(sample, asked, bad)
        raise TooManyBadSamples(
            f"{num_tries} images in a row cannot be read, the first is {self._images.name(asked)} ({reason}); "
            f"check that {self._images.root} holds whole image files and is reachable from this machine"
        )

    def __getitems__(self, epochs_and_indices: Sequence[tuple[int, int]]) -> list[Item] | _Failure:
        """The samples of a batch, as torch's loader asks for them."""
        try:
            return [self[pair] for pair in epochs_and_indices]
        except ENDS_THE_RUN as error:
            return _Failure(error)

    def _open(self, index: int) -> Photo:
        try:
            data = self._images.read(index)
        except OSError as error:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error
        return Photo.open(data)

    def _draw(self, photo: Photo, index: int, rng: np.random.Generator) -> SampleT:
        if self._proposals is None:
            return self._recipe.draw(photo, rng)
        assert isinstance(self._recipe, ProposalRecipe)
        try:
            proposals = self._proposals.of(index, photo.width, photo.height)
        except ProposalsError as error:
            raise ProposalsError(f"{self._images.name(index)}: {error}") from error
        sample: SampleT = self._recipe.draw_with_proposals(photo, proposals, rng)
        return sample


def _collate(items: Sequence[Item] | _Failure) -> Batch | _Failure:
    if isinstance(items, _Failure):
        return items
    return Batch(
        sample=default_collate([item.sample for item in items]),
        indices=torch.tensor([item.asked_index for item in items], dtype=torch.int64),
        bad=[item.bad for item in items if item.bad is not None],
    )


def _start_worker(worker_id: int) -> None:
    # One thread per worker: the workers are the parallelism. Ctrl-C is for the trainer, which ends its workers itself.
    torch.set_num_threads(1)
    # A collection of garbage writes to every object it looks at, and would copy what the fork server has imported.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # PyTorch's own watch looks at the parent, which is the fork server here; a killed trainer would leave all behind.
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


class PretrainLoader(DataLoader[Batch]):
    """A DataLoader that yields `Batch`es, or raises one of ENDS_THE_RUN as it was raised in the worker."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator around the loader's own iterator
        try:
            for batch in cast(Iterator[Batch | _Failure], super().__iter__()):
                if isinstance(batch, _Failure):
                    raise batch.error
                yield batch
        except RuntimeError as error:
            # Exceptions raised inside a worker begin otherwise ("Caught ... in DataLoader worker process").
            if not str(error).startswith("DataLoader worker"):
                raise
            raise WorkerDied(
                f"a data worker ended unexpectedly ({error}). Usual reasons: not enough memory (lower "
                f"DATA.NUM_WORKERS, now {self.num_workers}), shared memory too small (enlarge /dev/shm, in Docker "
                f"--shm-size), or an image that crashes the decoder (DATA.NUM_WORKERS 0 shows where)"
            ) from error


def build_loader(
    images: ImageList,
    recipe: ViewRecipe[SampleT, Any],
    *,
    proposals: ProposalStore | None = None,
    batch_size_total: int,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    num_workers: int,
) -> DataLoader[Batch]:
    """All batches of this process from `start_step` to `total_steps`, across epochs, in one iteration.

    Workers are forked from a server process that has imported torch and nothing else: the training process has CUDA,
    NCCL and TensorBoard threads by then, whose locks a plain fork would copy in whatever state they are, and starting
    each worker from scratch would import torch once per worker. The script that calls this must guard its main part
    with `if __name__ == "__main__"`.

    Args:
        images: The images; their number and order define the epochs.
        recipe: Makes the samples. It is sent to the workers, so it must pickle.
        proposals: Of `images`, for a ProposalRecipe and for no other.
        batch_size_total: Images per step over all processes.
        rank: Of this process, in [0, world_size).
        world_size: Number of processes.
        seed: Of the order and of every sample.
        start_step: Steps already made, in [0, total_steps]; any step, not only the first of an epoch.
        total_steps: Where to stop.
        num_workers: Per process; 0 loads in this process.

    Raises:
        ValueError: If the images do not fill one batch, or the batch does not divide among the processes.
    """
    if len(images) < batch_size_total:
        raise ValueError(
            f"{images.root} has {len(images)} images, fewer than one batch of SOLVER.BATCH_SIZE_TOTAL "
            f"{batch_size_total}; add images or lower the batch size (and METHOD.QUEUE_SIZE with it)"
        )
    sampler = BatchSampler(len(images), batch_size_total, rank, world_size, seed, start_step, total_steps)
    context = None
    if num_workers:
        context = torch.multiprocessing.get_context("forkserver")
        fork_server.start()  # its imports take seconds; meanwhile the caller builds the model
    dataset = PretrainDataset(images, recipe, seed, proposals)
    return PretrainLoader(
        cast(Dataset[Batch], dataset),  # DataLoader has no type for what collate returns
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        multiprocessing_context=context,
        # The loader draws a seed for its workers; from here, so that the trainer's random numbers are not touched.
        generator=torch.Generator().manual_seed(seed),
    )
