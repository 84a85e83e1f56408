"""What a killed run leaves behind: Detectron2 writes its checkpoints and the file that names the last one in place.

A kill in the wrong moment leaves a name without a whole checkpoint, and Detectron2 would then start over without the
pretrained weights, without a word. Needs no Detectron2.
"""

import zipfile
from pathlib import Path

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
