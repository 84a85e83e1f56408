"""The proposals of one image file, and the pool of processes that finds those of many, in order.

A worker has one thread: the workers are the parallelism. It ends with the process that started it, however that ends.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess

import cv2
import numpy as np
import torch

from detco.views.photo import UnreadableImage, decode
from pretrain.image_list import ImageList
from pretrain.launch import StopRequest
from pretrain.proposals.backends import SearchParams, propose
from pretrain.proposals.columns import MAX_SIDE_PX, ImageProposals, no_proposals
from pretrain.proposals.filters import FilterParams, filter_boxes

PRELOADED_MODULES = ["torch", "pretrain.proposals.search", "skimage.feature", "skimage.segmentation"]
"""What the fork server imports once, so that a worker starts in milliseconds; it passes over what is not installed."""

IMAGES_AHEAD_PER_WORKER = 32
"""How far the others may run ahead of one slow image before they wait for it."""

POLL_S = 0.2
SIGNAL_GRACE_S = 1.0
"""A scheduler signals all processes of a job at once; a worker may be dead before the parent has heard."""

END_GRACE_S = 1.0
"""For a worker to send the image that it has just finished: ended in the middle, it would leave half a message."""


class SearchError(RuntimeError):
    """The search cannot go on; what is finished is kept. The message says what to do."""


class Stopped(Exception):
    """A signal asked for the end.

    Attributes:
        signal_number: Which.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; what is finished is kept: the same command goes on")
        self.signal_number = signal_number


def find_proposals(images: ImageList, index: int, search: SearchParams, filters: FilterParams) -> ImageProposals:
    """The filtered proposals of one of the images, as training decodes it; none if it cannot be read or is too long."""
    try:
        image = decode(images.read(index))
    except (OSError, UnreadableImage):
        return no_proposals(0, 0)
    height, width = image.shape[1:]
    if max(height, width) > MAX_SIDE_PX:
        return no_proposals(width, height)
    raw = propose(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), search)
    kept = filter_boxes(raw, width, height, filters)
    return ImageProposals(width, height, kept.boxes.astype(np.uint16), kept.multiplicity.astype(np.int32), kept.stage)


def find_all(
    images: ImageList,
    indices: Iterable[int],
    search: SearchParams,
    filters: FilterParams,
    *,
    num_workers: int,
    stop: StopRequest,
) -> Generator[ImageProposals, None, None]:
    """`find_proposals` of each index, in order, by `num_workers` processes.

    Raises:
        Stopped: Soon after `stop` was set.
        SearchError: If a worker was killed, or the search failed on an image, which is named.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    forkserver.ensure_running()
    children_before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(images,))
    waiting: deque[tuple[str, Future[ImageProposals]]] = deque()
    try:
        for index in indices:
            waiting.append((images.name(index), pool.submit(_find_in_worker, index, search, filters)))
            if len(waiting) > IMAGES_AHEAD_PER_WORKER * num_workers:
                yield _result(*waiting.popleft(), stop)
        while waiting:
            yield _result(*waiting.popleft(), stop)
    except BrokenProcessPool as error:
        _raise_if_stopped(stop, patience_s=SIGNAL_GRACE_S)
        raise SearchError(
            f"a worker process was killed ({error}), usually for want of memory: use fewer --workers, now "
            f"{num_workers}, or --max-side. What is finished is kept: the same command goes on"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _end(set(multiprocessing.active_children()) - children_before)


def _result(name: str, future: "Future[ImageProposals]", stop: StopRequest) -> ImageProposals:
    _raise_if_stopped(stop)
    while not wait([future], timeout=POLL_S).done:
        _raise_if_stopped(stop)
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise SearchError(f"the search fails on {name}: {type(error).__name__}: {error}") from error


def _raise_if_stopped(stop: StopRequest, patience_s: float = 0.0) -> None:
    deadline_s = time.monotonic() + patience_s
    while not stop.number and time.monotonic() < deadline_s:
        time.sleep(POLL_S / 10)
    if stop.number:
        raise Stopped(stop.number)


def _end(workers: Iterable[BaseProcess]) -> None:
    """See idle workers off, and end those that are long in an image, or wait for a disk that does not answer."""
    deadline_s = time.monotonic() + END_GRACE_S
    for worker in workers:
        worker.join(max(0.0, deadline_s - time.monotonic()))
        worker.terminate()


class _OfWorker:
    """What a worker knows from its start: sent with every task, a list would be sent millions of times.

    Attributes:
        images: Those that indices count.
    """

    images: ImageList


def _find_in_worker(index: int, search: SearchParams, filters: FilterParams) -> ImageProposals:
    return find_proposals(_OfWorker.images, index, search, filters)


def _start_worker(images: ImageList) -> None:
    _OfWorker.images = images
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    # Ctrl-C is for the parent, which ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # A pool waits for work on a pipe whose other end the workers hold too, so a killed parent would leave all behind.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
