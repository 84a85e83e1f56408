"""Writes drawn scenes as an unlabelled tree: one folder per shape, which can serve as a label for probes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from demo_layouts import UNLABELLED, draw_size, save_jpeg
from demo_scenes import draw_scene
from demo_shapes import LOOKS


def write_unlabelled(root: Path, num_images: int, seed: int) -> Iterator[Path]:
    """Write `num_images` scenes with one large object, in one folder per shape; yields each file."""
    names = list(LOOKS)
    for index in range(num_images):
        rng = np.random.default_rng((seed, UNLABELLED, index))
        main = names[index % len(names)]
        # The large one lies in front; the small ones fill the scene as in photographs.
        extras = [str(name) for name in rng.choice(names, size=rng.integers(0, 3))]
        radii = [(0.10, 0.17)] * len(extras) + [(0.28, 0.42)]
        scene = draw_scene(rng, draw_size(rng), [*extras, main], radius_share=radii)
        path = root / LOOKS[main].shape / f"scene_{index:05d}.jpg"
        save_jpeg(scene.pixels, path, rng)
        yield path
