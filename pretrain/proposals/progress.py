"""A line every few seconds, and nothing otherwise."""

import logging
import time
from datetime import timedelta

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 5.0


class Progress:
    """Says how far long work on images is. The pace is that since the first image, without the start-up."""

    def __init__(self, name: str, num_images: int) -> None:
        """Say nothing yet.

        Args:
            name: What the lines begin with.
            num_images: All of them.
        """
        self._name = name
        self._num_images = num_images
        self._num_done = 0
        self._first_s = self._last_s = time.monotonic()

    def count(self) -> None:
        """One image is done."""
        self._num_done += 1
        now_s = time.monotonic()
        if self._num_done == 1:
            self._first_s = self._last_s = now_s
        elif now_s - self._last_s >= PROGRESS_EVERY_S:
            self._last_s = now_s
            images_per_second = (self._num_done - 1) / max(now_s - self._first_s, 1e-9)
            left = timedelta(seconds=round((self._num_images - self._num_done) / images_per_second))
            logger.info(
                "%s: %s/%s images, %.1f images/s, ETA %s",
                *(self._name, f"{self._num_done:,}", f"{self._num_images:,}", images_per_second, left),
            )
