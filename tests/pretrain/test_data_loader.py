import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detco.artifact import IMAGENET_RGB
from detco.views.base import ViewRecipe
from detco.views.host import CropBox
from detco.views.moco import MoCoRecipe
from detco.views.photo import Photo
from pretrain.data import Batch, TooManyBadSamples, WorkerDied, build_loader
from pretrain.images import list_images

REPOSITORY = Path(__file__).parents[2]


class NoisyPixel(NamedTuple):
    pixel: Tensor
    noise: Tensor


class NoisyPixels(ViewRecipe[NoisyPixel, Tensor]):
    """The middle pixel of an image and one random number: enough to see which image and which stream was used."""

    preprocess = IMAGENET_RGB

    def draw(self, photo: Photo, rng: np.random.Generator) -> NoisyPixel:
        noise = torch.tensor(rng.random())  # before the photo can prove to be damaged
        (middle,) = photo.crops([(CropBox(photo.height // 2, photo.width // 2, 1, 1), 1)])
        return NoisyPixel(middle.flatten(), noise)

    def render(self, batch: NoisyPixel) -> Tensor:
        return batch.pixel.float()


class Suicidal(NoisyPixels):
    """Kills the worker it runs in, as a system short of memory does."""

    def draw(self, photo: Photo, rng: np.random.Generator) -> NoisyPixel:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


class FrozenObjects(NoisyPixels):
    """How many objects the garbage collector of the worker passes over."""

    def draw(self, photo: Photo, rng: np.random.Generator) -> NoisyPixel:
        return super().draw(photo, rng)._replace(noise=torch.tensor(gc.get_freeze_count()))


class Buggy(NoisyPixels):
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def draw(self, photo: Photo, rng: np.random.Generator) -> NoisyPixel:
        raise self.error("a mistake in the recipe")


def load(root: Path, recipe: ViewRecipe[Any, Any] | None = None, **changes: int) -> list[Batch]:
    settings = {"batch_size_total": 4, "rank": 0, "world_size": 1, "seed": 5, "start_step": 0, "total_steps": 8}
    settings |= {"num_workers": 0} | changes
    return list(build_loader(list_images(root), recipe or NoisyPixels(), **settings))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.sample.pixel, other.sample.pixel)
        assert torch.equal(one.sample.noise, other.sample.noise)
        assert [(b.path, b.used_instead) for b in one.bad] == [(b.path, b.used_instead) for b in other.bad]


@pytest.fixture(scope="module")
def hostile_dir(photo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files that cannot be read among 32 that can, some of them odd."""
    root = tmp_path_factory.mktemp("hostile")
    for photo in photo_dir.iterdir():
        shutil.copy(photo, root)
    photo = Image.open(photo_dir / "photo_000.jpg")
    data = (photo_dir / "photo_000.jpg").read_bytes()
    (root / "empty.jpg").write_bytes(b"")
    (root / "photo_005_truncated.jpg").write_bytes(data[: len(data) // 2])
    (root / "photo_005_truncated_too.jpg").write_bytes(data[: len(data) // 3])
    (root / "text (1).jpg").write_text("<html>404 not found</html>")
    (root / "zeros.png").write_bytes(bytes(1000))
    (root / "zz last.webp").write_bytes(b"RIFF")
    photo.convert("CMYK").save(root / "cmyk.jpg")
    photo.convert("RGBA").save(root / "r g b a (\u00e9).png")
    photo.convert("P").save(root / "palette.PNG")
    photo.convert("L").save(root / "grey.JPG")
    photo.save(root / "png_inside.jpg", format="PNG")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(root / "sixteen_bits.png")
    photo.resize((1, 1)).save(root / "one_pixel.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photo.save(root / "rotated.jpeg", exif=rotated)
    return root


UNREADABLE = {
    "empty.jpg", "photo_005_truncated.jpg", "photo_005_truncated_too.jpg", "text (1).jpg", "zeros.png", "zz last.webp",
}  # fmt: skip


def test_worker_processes_change_no_batch(hostile_dir: Path) -> None:
    assert_same(load(hostile_dir, total_steps=19), load(hostile_dir, total_steps=19, num_workers=2))


def test_a_worker_leaves_what_it_was_forked_with_out_of_its_garbage_collections(photo_dir: Path) -> None:
    (batch,) = load(photo_dir, FrozenObjects(), total_steps=1, num_workers=1)
    assert batch.sample.noise.min() > 100_000  # torch alone makes more objects


def test_odd_files_pass_through_a_real_recipe(hostile_dir: Path) -> None:
    (batch,) = load(hostile_dir, MoCoRecipe(global_size=32), batch_size_total=38, total_steps=1, num_workers=1)
    views = MoCoRecipe(global_size=32).render(batch.sample)
    assert views.global_query.shape == views.global_key.shape == (38, 3, 32, 32)
    assert torch.isfinite(views.global_query).all()


def test_unreadable_files_and_only_they_are_replaced_by_the_next_readable_one(hostile_dir: Path) -> None:
    batches = load(hostile_dir, batch_size_total=38, total_steps=1)
    bad = {Path(sample.path).name: sample for sample in batches[0].bad}
    assert set(bad) == UNREADABLE
    names = sorted(path.name for path in hostile_dir.iterdir())
    for name, sample in bad.items():
        following = names[names.index(name) + 1 :] + names
        assert Path(sample.used_instead).name == next(other for other in following if other not in UNREADABLE)
        assert sample.reason.startswith("cannot decode image of ")
    assert len(batches[0].bad) == len(UNREADABLE), "a file that is only passed over is not counted again"


@pytest.mark.parametrize(
    ("name", "used_instead"), [("zz last.webp", "cmyk.jpg"), ("photo_005_truncated.jpg", "photo_006.jpg")]
)
def test_replacement_shows_the_other_image_with_the_random_numbers_of_the_asked_one(
    hostile_dir: Path, name: str, used_instead: str
) -> None:
    """Whether a file is found to be damaged when it is opened, or when its crops are cut; the list wraps at its end."""
    images = list_images(hostile_dir)
    names = [images.path(index).name for index in range(len(images))]
    (batch,) = load(hostile_dir, batch_size_total=38, total_steps=1)
    row, other = (batch.indices.tolist().index(names.index(wanted)) for wanted in (name, used_instead))
    assert torch.equal(batch.sample.pixel[row], batch.sample.pixel[other])
    assert batch.sample.noise[row] == np.random.default_rng((5, 0, names.index(name))).random()


def test_epochs_draw_new_random_numbers_for_the_same_image(photo_dir: Path) -> None:
    noise: dict[int, set[float]] = {}
    for batch in load(photo_dir, total_steps=18):
        for index, value in zip(batch.indices.tolist(), batch.sample.noise.tolist(), strict=True):
            noise.setdefault(index, set()).add(value)
    assert len(noise) == 24
    assert all(len(values) == 3 for values in noise.values())


@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_of_all_processes_joined_are_those_of_one(photo_dir: Path, world_size: int) -> None:
    ranks = [load(photo_dir, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [
        Batch(
            type(parts[0].sample)(*(torch.cat(tensors) for tensors in zip(*(p.sample for p in parts), strict=True))),
            torch.cat([part.indices for part in parts]),
            [bad for part in parts for bad in part.bad],
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(joined, load(photo_dir))


def test_resuming_in_the_middle_of_an_epoch_continues_the_batches(photo_dir: Path) -> None:
    assert_same(load(photo_dir, start_step=3, num_workers=1), load(photo_dir)[3:])


def test_loading_leaves_the_global_random_numbers_alone(photo_dir: Path) -> None:
    before = torch.random.get_rng_state()
    load(photo_dir, total_steps=2, num_workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_too_small_folder_is_refused_with_both_numbers(photo_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"has 24 images, fewer than one batch of SOLVER\.BATCH_SIZE_TOTAL 32"):
        load(photo_dir, batch_size_total=32)


def test_images_that_are_all_unreadable_stop_the_run(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_text("no image")
    with pytest.raises(TooManyBadSamples, match="5 images in a row cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_mistake_in_a_recipe_is_no_bad_sample(photo_dir: Path, error: type[Exception]) -> None:
    with pytest.raises(error, match="a mistake in the recipe"):
        load(photo_dir, Buggy(error))


def test_killed_worker_ends_the_run_with_advice(photo_dir: Path) -> None:
    with pytest.raises(WorkerDied, match=r"not enough memory \(lower DATA\.NUM_WORKERS, now 1\)"):
        load(photo_dir, Suicidal(), num_workers=1)


TRAINER_THAT_IS_KILLED = """
    import multiprocessing, os, signal, sys
    from pathlib import Path
    from detco.views.moco import MoCoRecipe
    from pretrain.data import build_loader
    from pretrain.images import list_images

    if __name__ == "__main__":
        loader = build_loader(list_images(sys.argv[1]), MoCoRecipe(global_size=32), batch_size_total=4, rank=0,
                              world_size=1, seed=0, start_step=0, total_steps=10**6, num_workers=2)
        batches = iter(loader)
        next(batches)
        print(*(w.pid for w in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_trainer_that_is_killed(photo_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAINER_THAT_IS_KILLED))
    run = subprocess.run(
        [sys.executable, script, photo_dir], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    pids = [int(word) for word in run.stdout.split()]
    assert len(pids) == 2
    deadline_s = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline_s, "workers outlive the trainer"
        time.sleep(0.2)


def is_running(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
