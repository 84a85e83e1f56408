"""Tar shards on a web server: ranges of bytes over connections that stay open.

A failure that may pass (no connection, a server that is busy) is waited out, so that it does not change what a run
sees; one that will not (a shard that is gone, or is another one) ends it.
"""

import http.client
import logging
import ssl
import threading
import time
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, quote, urlsplit

from pretrain.image_list import ImagesLost
from pretrain.shards import INDEX_NAME, ShardIndex, ShardList

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""For a server to send the next bytes."""

PATIENCE_S = 300.0
"""How long a failure that may pass is waited out in a run: half of the time that other processes wait for this one."""

PATIENCE_AT_START_S = 5.0
"""The same when a run begins, where it is rather a wrong address."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

PASSING = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
"""Answers that may be others in a moment."""


def is_address(root: str) -> bool:
    """Whether this names something on a web server."""
    return root.lower().startswith(("http://", "https://"))


def _parts_of_index(address: str) -> tuple[SplitResult, str]:
    """The parts of an index's address, and its host; raises ValueError if it is no such address."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:  # of the standard library, for ports and brackets; it may repeat what is a secret
        parts, port = SplitResult("", "", "", "", ""), None
    if not parts.path.endswith(".npz") or parts.username is not None or not parts.hostname:
        host = f"{parts.hostname}:{port}" if port else parts.hostname
        shown = f" {parts.scheme}://{host}{parts.path}" if parts.hostname else ""
        raise ValueError(
            f"DATA.ROOT{shown} is not the address of an index: it must be http[s]://HOST[:PORT]/FOLDER/{INDEX_NAME}, "
            f"the file that tools/make_shards.py wrote beside the shards"
        )
    return parts, parts.hostname


class _Reply(NamedTuple):
    """What a server said; `body` only if the status is the one that was hoped for."""

    status: int
    reason: str
    location: str
    content_range: str
    body: bytes


class HttpFolder(threading.local):
    """A RangeSource on a web server; each thread has its own connection, which stays open.

    Attributes:
        root: Address of the folder, without what stands after "?", which may be a secret.
    """

    def __init__(self, index_address: str, patience_s: float) -> None:
        """Connects to nothing yet.

        Args:
            index_address: Of the index; the shards lie beside it. What stands after "?" goes with every request.
            patience_s: How long a failure that may pass is waited out.

        Raises:
            ValueError: If it is no address of an index.
        """
        self._arguments = (index_address, patience_s)
        parts, host = _parts_of_index(index_address)
        self._folder, _, self._index_name = parts.path.rpartition("/")
        self.root: Path | str = f"{parts.scheme}://{parts.netloc}{self._folder}"
        self._query = f"?{parts.query}" if parts.query else ""
        self._patience_s = patience_s
        self._connection: http.client.HTTPConnection
        if parts.scheme.lower() == "https":
            self._connection = http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT_S)
        else:
            self._connection = http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)

    def __reduce__(self) -> tuple[type["HttpFolder"], tuple[str, float]]:
        return HttpFolder, self._arguments

    def read_index(self) -> ShardIndex:
        """The index.

        Raises:
            ImagesLost: If it is missing or cannot be reached.
            ValueError: If it is damaged, or something else.
        """
        reply = self._ask(self._index_name, {}, HTTPStatus.OK)
        if reply.status != HTTPStatus.OK:
            raise ImagesLost(self._complaint(self._index_name, reply))
        return ShardIndex.parse(reply.body, f"{self.root}/{self._index_name}")

    def read(self, shard: str, shard_bytes: int, start: int, num_bytes: int) -> bytes:
        """See RangeSource."""
        wanted = f"{start}-{start + num_bytes - 1}"
        reply = self._ask(quote(shard), {"Range": f"bytes={wanted}"}, HTTPStatus.PARTIAL_CONTENT, num_bytes)
        if reply.status == HTTPStatus.OK:
            raise ImagesLost(
                f"the server of {self.root} sends whole files where a part was asked for (bytes {wanted} of {shard}): "
                f"use one that knows range requests, as nginx, Apache and object stores do, or copy the shards here"
            )
        if reply.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise ImagesLost(f"{self.root}/{shard} has changed since its index was made: it has no bytes {wanted}")
        if reply.status != HTTPStatus.PARTIAL_CONTENT:
            raise ImagesLost(self._complaint(shard, reply))
        sent, _, found_bytes = reply.content_range.removeprefix("bytes ").partition("/")
        if sent != wanted:
            raise ImagesLost(f"{self.root}/{shard}: asked for bytes {wanted}, the server sent {reply.content_range!r}")
        if found_bytes not in (str(shard_bytes), "*"):
            raise ImagesLost(
                f"{self.root}/{shard} has changed since its index was made: it has {found_bytes} bytes and had "
                f"{shard_bytes}. Restore it, or make the index again"
            )
        return reply.body

    def _complaint(self, name: str, reply: _Reply) -> str:
        address = f"{self.root}/{name}"
        if reply.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            return f"{address} is missing ({reply.status} {reply.reason}): check DATA.ROOT, or restore it"
        if reply.location:
            return f"{address} is to be found at {reply.location.partition('?')[0]} ({reply.status}): name that place"
        return f"{address} cannot be read: the server answers {reply.status} {reply.reason}"

    def _ask(self, name: str, headers: dict[str, str], hoped_for: int, num_bytes: int | None = None) -> _Reply:
        """Get a file, or `num_bytes` of it, as often as there is hope.

        Raises:
            ImagesLost: If there is none any more.
        """
        deadline_s = time.monotonic() + self._patience_s
        pause_s = 0.0  # a connection that a server has closed meanwhile is no news, and opened again at once
        while True:
            try:
                reply = self._ask_once(name, headers, hoped_for)
                if reply.status == hoped_for and num_bytes not in (None, len(reply.body)):
                    problem = f"the server sent {len(reply.body)} bytes instead of {num_bytes}"
                elif reply.status in PASSING:
                    problem = f"the server answers {reply.status} {reply.reason}"
                else:
                    return reply
            except ssl.SSLCertVerificationError as error:
                raise ImagesLost(f"the server of {self.root} cannot be trusted: {error}") from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            self._connection.close()
            if time.monotonic() + pause_s > deadline_s:
                raise ImagesLost(
                    f"{self.root}/{name} cannot be read, also after {self._patience_s:.0f} s ({problem}): check that "
                    f"the server is up and reachable from this machine"
                )
            if pause_s:
                logger.warning("%s/%s: %s; trying again in %.1f s", self.root, name, problem, pause_s)
            time.sleep(pause_s)
            pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)

    def _ask_once(self, name: str, headers: dict[str, str], hoped_for: int) -> _Reply:
        target = f"{self._folder}/{name}{self._query}"
        self._connection.request("GET", target, headers={"Accept-Encoding": "identity", **headers})
        response = self._connection.getresponse()
        if response.status == hoped_for:
            body = response.read()
        else:
            body = b""
            self._connection.close()  # instead of reading what may be a whole shard
        header = response.headers.get
        return _Reply(response.status, response.reason, header("Location", ""), header("Content-Range", ""), body)


def open_remote_shards(index_address: str) -> ShardList:
    """The images that the index at an http(s) address knows.

    Raises:
        ValueError: If the index or a shard cannot be read, is damaged or has changed, or the server knows no ranges.
    """
    at_start = HttpFolder(index_address, PATIENCE_AT_START_S)
    try:
        index = at_start.read_index()
    except ImagesLost as error:
        raise ValueError(str(error)) from error
    images = ShardList(index, HttpFolder(index_address, PATIENCE_S))
    images.check(at_start)
    return images
