"""Going on with a run that was killed: from a whole checkpoint, and with the images that come next.

Detectron2 writes its checkpoints and the file that names the last one in place: a kill in the wrong moment leaves a
name without a whole checkpoint, and Detectron2 would then start over without the pretrained weights, without a word.
And it starts the order of the images anew on every start; with a fixed SEED a run that is killed often would see the
same few images again and again. Needs no Detectron2.
"""

import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, Sampler

from detco.artifact import open_atomically

TAG = "last_checkpoint"


def mend_last_checkpoint(folder: Path) -> list[str]:
    """Let `last_checkpoint` of a run directory name a checkpoint that is whole, or remove it if there is none.

    Returns:
        What was wrong and what was done, for the log; empty if nothing was.
    """
    tag = folder / TAG
    if not tag.exists():
        return []
    name = tag.read_text(encoding="utf-8").strip()
    if name and is_whole(folder / name):
        return []
    wrong = f"{tag} names {name or 'nothing'}, which is not a whole checkpoint: an earlier run was killed while saving"
    whole = [path for path in sorted(folder.glob("model_*.pth")) if is_whole(path)]
    if not whole:
        tag.unlink()
        return [f"{wrong}. There is no other; the run starts over."]
    newest = max(whole, key=lambda path: path.stat().st_mtime)
    with open_atomically(tag) as file:
        file.write(newest.name.encode())
    return [f"{wrong}. Going on from {newest.name}."]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end: the table of contents of torch's archives is their last part."""
    return path.is_file() and zipfile.is_zipfile(path)


class ContinuedSampler(Sampler[int]):
    """A sampler's sequence without its beginning.

    Attributes:
        whole: Endless, and the same on every iteration.
        skipped: Number of indices left out at the beginning, 0 or more.
    """

    def __init__(self, whole: Sampler[int], skipped: int) -> None:
        self.whole = whole
        self.skipped = skipped

    def __iter__(self) -> Iterator[int]:
        """The indices after the skipped ones (1.4 million, the end of COCO 1x on one process, take about a second)."""
        return itertools.islice(self.whole, self.skipped, None)


def continue_loader(loader: Any, skipped: int) -> None:
    """Let the next iteration over one of Detectron2's training loaders go on after `skipped` images. In place.

    Args:
        loader: As Detectron2 0.5, c69939aa or main builds it, with or without grouping by aspect ratio; any sampler.
        skipped: Images that this process has trained on.
    """
    while not isinstance(loader, DataLoader):  # AspectRatioGroupedDataset
        loader = loader.dataset
    # Since 0.6 the data set draws the indices itself, in the workers; 0.5 leaves it to PyTorch.
    draws: Any = loader.dataset if isinstance(loader.dataset, IterableDataset) else loader.batch_sampler
    draws.sampler = ContinuedSampler(draws.sampler, skipped)


def continued_seed(seed: int, start_iter: int, rank: int) -> int:
    """A seed in [0, 2^32) for the augmentation of a resumed run: another one for each start, and for each process."""
    return int(np.random.SeedSequence([seed, start_iter, rank]).generate_state(1)[0])
