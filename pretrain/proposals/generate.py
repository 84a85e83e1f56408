"""Finding the proposals of a list of images: over cores, over machines, over interruptions, always the same bytes.

Source: SoCo, arXiv:2106.02637, Sec. 3.2; search and filters say what they take from its code.
"""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from pretrain.images import ImageList
from pretrain.launch import StopRequest
from pretrain.proposals.backends import SearchParams, versions
from pretrain.proposals.columns import ImageProposals
from pretrain.proposals.filters import FilterParams
from pretrain.proposals.folder import ProposalFolder
from pretrain.proposals.progress import Progress
from pretrain.proposals.search import SearchError, find_all
from pretrain.proposals.store import ProposalsError, ProposalStore

logger = logging.getLogger(__name__)

MIN_IMAGES_TO_DOUBT = 20
"""As many unreadable images in a row as this, and nothing else in their part, are a lost disk rather than bad files."""


class Shard(NamedTuple):
    """Which share of the work is this process's.

    Attributes:
        number: In [0, num_shards); those parts are its own whose number leaves this when divided by `num_shards`.
        num_shards: Into how many the work is divided.
    """

    number: int
    num_shards: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "0/4" (the first of four).

        Raises:
            ValueError: If it is anything else, or not in 0/n to n-1/n.
        """
        number, _, num_shards = text.partition("/")
        if not (number.isdecimal() and num_shards.isdecimal() and int(number) < int(num_shards)):
            raise ValueError(f"shard {text!r} is not i/n with 0 <= i < n, as in 0/4, 1/4, 2/4, 3/4 for four machines")
        return cls(int(number), int(num_shards))

    def __str__(self) -> str:
        return f"{self.number}/{self.num_shards}"


def record_of(images: ImageList, search: SearchParams, filters: FilterParams) -> dict[str, Any]:
    """Everything that determines the proposals, as JSON types: images, parameters and library versions.

    Raises:
        ValueError: If the library that `search` asks for is not installed.
    """
    return {
        "images": {"digest": images.digest, "count": len(images)},
        "search": search.as_dict(),
        "filters": filters.as_dict(),
        "versions": versions(search) | {"Pillow": PIL.__version__},  # Pillow makes the pixels
    }


def generate(
    images: ImageList, path: Path, search: SearchParams, filters: FilterParams, *, shard: Shard, num_workers: int
) -> ProposalStore | None:
    """Make the parts of a shard in the folder `path`, and the store if they were the last; go on if it was begun.

    SIGINT, SIGTERM and SIGUSR1 end it soon; parts that are finished are kept, also if it is killed at once.

    Returns:
        The store; None if parts of other shards are still missing.

    Raises:
        ValueError: Before any work: the library is not installed, the folder holds other proposals, cannot be written
            to, or has too little room.
        Stopped: By a signal.
        SearchError: If the work cannot go on.
    """
    folder = ProposalFolder(path, record_of(images, search, filters))
    store = folder.finished_store()
    if store:
        return store
    folder.claim()
    missing = folder.missing_parts(shard.number, shard.num_shards)
    try:
        _make_parts(images, folder, missing, search, filters, num_workers=num_workers, name=_name(shard))
        return folder.finished_store() or _merge(folder, shard)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (store := folder.finished_store()):
            return store  # another process made the same parts, merged and removed them meanwhile
        raise SearchError(
            f"cannot write to {path}: {error}. What is finished is kept: the same command goes on"
        ) from error


def _name(shard: Shard) -> str:
    return "proposals" if shard.num_shards == 1 else f"proposals, shard {shard}"


def _make_parts(
    images: ImageList,
    folder: ProposalFolder,
    missing: Sequence[int],
    search: SearchParams,
    filters: FilterParams,
    *,
    num_workers: int,
    name: str,
) -> None:
    if not missing:
        return
    num_images = sum(len(folder.images_of(part)) for part in missing)
    logger.info("%s: %s images to search, with %s worker(s)", name, f"{num_images:,}", num_workers)
    progress = Progress(name, num_images)
    indices = (index for part in missing for index in folder.images_of(part))
    with (
        StopRequest() as stop,
        closing(find_all(images, indices, search, filters, num_workers=num_workers, stop=stop)) as found,
    ):
        for part in missing:
            rows = []
            for _ in folder.images_of(part):
                rows.append(next(found))
                progress.count()
            _refuse_a_lost_disk(images, folder.images_of(part), rows)
            folder.write_part(part, rows)


def _refuse_a_lost_disk(images: ImageList, indices: range, rows: Sequence[ImageProposals]) -> None:
    if len(rows) >= MIN_IMAGES_TO_DOUBT and not any(row.width for row in rows):
        raise SearchError(
            f"{len(rows)} images in a row cannot be read, the first is {images.name(indices[0])}; check that "
            f"{images.root} holds whole image files and is reachable from this machine. What is finished is kept: the "
            f"same command goes on"
        )


def _merge(folder: ProposalFolder, shard: Shard) -> ProposalStore | None:
    unfinished = folder.num_unfinished()
    if unfinished:
        logger.info(
            "shard %s is finished; %s of %s parts of other shards are not: the last one to end makes the store",
            *(shard, f"{unfinished:,}", f"{folder.num_parts:,}"),
        )
        return None
    try:
        return folder.merge()
    except ProposalsError as error:  # in a part of another shard: our own have been looked at
        raise SearchError(f"{error}. The shard that made it makes it again") from error
