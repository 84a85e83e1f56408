"""Proposals on their way from the store to the views: of the right image, or refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from detco.artifact import IMAGENET_RGB, read_artifact
from detco.views.base import ProposalRecipe, Proposals
from detco.views.photo import Photo
from pretrain.data import ProposalsError, build_loader
from pretrain.images import list_images
from pretrain.proposals.store import ProposalStore

WITH_BOXES = {"METHOD.BOXES": "True"}


class Seen(NamedTuple):
    width: Tensor
    widest_box: Tensor
    times_found: Tensor


class Witness(ProposalRecipe[Seen, Tensor]):
    """What it was given: `make_proposals` tells the image by how often its first box was found."""

    preprocess = IMAGENET_RGB

    def draw_with_proposals(self, photo: Photo, proposals: Proposals, rng: np.random.Generator) -> Seen:
        widest_box = proposals.boxes_image_px[:, 2].max()
        return Seen(torch.tensor(photo.width), torch.tensor(widest_box), torch.tensor(proposals.multiplicity[0]))

    def render(self, batch: Seen) -> Tensor:
        return batch.times_found


@pytest.fixture
def photos(photo_dir: Path, tmp_path: Path) -> Path:
    """24 files, of which 5, 6 and the last cannot be read."""
    folder = shutil.copytree(photo_dir, tmp_path / "photos")
    for number in (5, 6, 23):
        (folder / f"photo_{number:03d}.jpg").write_bytes(b"")
    return folder


def test_every_image_has_its_own_boxes_and_a_replacement_those_of_the_image_that_was_read(
    photos: Path, make_proposals: Callable[..., Path]
) -> None:
    store = ProposalStore.open(make_proposals(photos))
    settings = {"rank": 0, "world_size": 1, "seed": 0, "start_step": 0, "total_steps": 1, "num_workers": 0}
    (batch,) = build_loader(list_images(photos), Witness(), proposals=store, batch_size_total=24, **settings)
    read = {5: 7, 6: 7, 23: 0}
    for index, times_found in zip(batch.indices.tolist(), batch.sample.times_found.tolist(), strict=True):
        assert times_found == read.get(index, index) + 1
    assert torch.equal(batch.sample.widest_box, batch.sample.width.float())


def test_a_store_of_changed_images_ends_the_run_with_the_file_and_both_sizes(
    photos: Path, make_proposals: Callable[..., Path]
) -> None:
    store = ProposalStore.open(make_proposals(photos, grow=1))
    settings = {"rank": 0, "world_size": 1, "seed": 0, "start_step": 0, "total_steps": 1, "num_workers": 0}
    with pytest.raises(ProposalsError, match=r"photo_\d+\.jpg: .*\d+x\d+ px.*\d+x\d+ px"):
        list(build_loader(list_images(photos), Witness(), proposals=store, batch_size_total=4, **settings))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_worker_cannot_use_is_one_line_without_a_traceback(
    run_here: Callable[..., Any], photo_dir: Path, make_proposals: Callable[..., Path], tmp_path: Path, num_workers: int
) -> None:
    proposals = make_proposals(photo_dir, grow=1)
    # The toy's own recipe lies in a script that a worker does not know.
    real = {"METHOD.NAME": "soco_c4", "METHOD.HIDDEN": "8", "VIEWS.VIEW_SIZE": "32", "LOG.EVERY_STEPS": "1"}
    options = real | {"DATA.PROPOSALS": str(proposals), "DATA.NUM_WORKERS": str(num_workers)}
    ended = run_here(tmp_path / "run", **options)
    assert ended.code == 1
    assert ended.stderr.startswith("error: rank 0: ")
    assert "proposals" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_what_does_not_fit_together_is_refused_before_any_work(
    run_here: Callable[..., Any], photo_dir: Path, photos: Path, make_proposals: Callable[..., Path], tmp_path: Path
) -> None:
    of_photos = str(make_proposals(photo_dir))
    (photos / "photo_000.jpg").rename(photos / "renamed.jpg")
    cases = [
        (WITH_BOXES, f"python tools/generate_proposals.py {photo_dir} -o proposals"),
        ({"DATA.PROPOSALS": of_photos}, f"the views of METHOD.NAME toy have no use for DATA.PROPOSALS {of_photos}"),
        (WITH_BOXES | {"DATA.PROPOSALS": of_photos, "DATA.ROOT": str(photos)}, "lists 24 and not the same names"),
        (WITH_BOXES | {"DATA.PROPOSALS": str(tmp_path / "nowhere")}, "does not exist"),
    ]
    for options, message in cases:
        refused = run_here(tmp_path / "run", **options)
        assert (refused.code, refused.stderr[:7]) == (2, "error: "), message
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (tmp_path / "run").exists(), "nothing was written"


def test_a_run_remembers_its_store_and_resumes_with_no_other(
    run_here: Callable[..., Any], photo_dir: Path, make_proposals: Callable[..., Path], tmp_path: Path
) -> None:
    store = make_proposals(photo_dir)
    options = WITH_BOXES | {"DATA.PROPOSALS": str(store)}
    stopped = run_here(tmp_path / "run", trouble="15@0.25", **options)
    assert stopped.code == 143
    digest = ProposalStore.open(store).digest
    assert digest in stopped.stdout

    other = make_proposals(photo_dir, "other", grow=1)
    refused = run_here(tmp_path / "run", "--resume", **(options | {"DATA.PROPOSALS": str(other)}))
    assert refused.code == 2
    assert f"was trained with the proposals of sha256 {digest}" in refused.stderr

    moved = shutil.copy(store, tmp_path / "moved.safetensors")
    assert run_here(tmp_path / "run", "--resume", **(options | {"DATA.PROPOSALS": str(moved)})).code == 0
    assert read_artifact(tmp_path / "run/model.safetensors").provenance["dataset"]["proposals"] == digest
