"""The digest of a file, by which its content is recognised again. Needs neither torch nor Detectron2."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, as 64 hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
