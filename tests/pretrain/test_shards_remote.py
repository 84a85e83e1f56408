"""Shards on a web server: a real one, with the faults that servers have."""

import os
import pickle
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from detco.views import MoCoRecipe
from pretrain import remote_shards
from pretrain.data import build_loader
from pretrain.images import ImagesLost, list_images
from pretrain.shard_packing import pack
from pretrain.shards import INDEX_NAME


class Handler(BaseHTTPRequestHandler):
    """Files of a folder, in ranges; `server.faults` are answers that it gives first, one per request."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        name, _, query = self.path.partition("?")
        self.server.requests.append((name, query, self.headers.get("Range", ""), self.client_address))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        file = self.server.folder / name.removeprefix("/data/")
        if fault == "hang up":
            self.close_connection = True
        elif fault.isdigit():
            self.answer(int(fault), b"what went wrong", {"Location": "http://elsewhere/x?secret"})
        elif not file.is_file():
            self.answer(404, b"no such file")
        else:
            self.send_file(file.read_bytes(), fault)

    def send_file(self, content: bytes, fault: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or fault == "whole" or not self.server.knows_ranges:
            self.answer(200, content)
            return
        start, end = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        if start >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        if fault == "short":
            self.close_connection = True
        self.answer(206, content[start : end + 1], headers, cut=fault == "short")

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:-1] if cut else body)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.requests: list[tuple[str, str, str, Any]] = []
        self.knows_ranges = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up, as ours does on an answer that it did not hope for."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def index(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data/{INDEX_NAME}"


@pytest.fixture
def served(photo_dir: Path, tmp_path: Path) -> Iterator[Server]:
    """The photos in shards of ten, on a server."""
    pack(list_images(photo_dir), tmp_path / "shards", 10)
    with Server(tmp_path / "shards") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience for tests."""
    monkeypatch.setattr(remote_shards, "PATIENCE_AT_START_S", 0.2)
    monkeypatch.setattr(remote_shards, "PATIENCE_S", 0.6)
    monkeypatch.setattr(remote_shards, "FIRST_PAUSE_S", 0.1)


def test_remote_images_are_those_of_the_folder(served: Server, photo_dir: Path) -> None:
    files, images = list_images(photo_dir), list_images(served.index)
    assert [images.read(i) for i in range(len(images))] == [files.read(i) for i in range(len(files))]
    assert images.digest == files.digest
    assert images.root == f"http://127.0.0.1:{served.server_port}/data"
    assert images.name(11) == f"{images.root}/shard-000001.tar/photo_011.jpg"


def test_an_image_costs_one_request_of_its_own_bytes_over_a_connection_that_stays(
    served: Server, photo_dir: Path
) -> None:
    images = list_images(served.index)
    served.requests.clear()
    sizes = [len(images.read(index)) for index in (3, 20, 3)]
    asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) for _, _, wanted, _ in served.requests]
    assert [int(match[2]) - int(match[1]) + 1 for match in asked if match] == [512 + size for size in sizes]
    assert len({client for *_, client in served.requests}) == 1


def test_workers_read_through_connections_of_their_own(served: Server, photo_dir: Path) -> None:
    settings: dict[str, Any] = {"batch_size_total": 6, "rank": 0, "world_size": 1, "seed": 3}
    settings |= {"start_step": 0, "total_steps": 4, "num_workers": 2}
    recipe = MoCoRecipe(global_size=32)
    remote = list(build_loader(list_images(served.index), recipe, **settings))
    local = list(build_loader(list_images(photo_dir), recipe, **settings | {"num_workers": 0}))
    for left, right in zip(remote, local, strict=True):
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(left.sample[0].crop, right.sample[0].crop)


def test_run_that_began_on_the_folder_goes_on_from_a_server(
    run_here: Callable[..., Any], served: Server, tmp_path: Path
) -> None:
    assert run_here(tmp_path / "whole").code == 0
    assert run_here(tmp_path / "cut", trouble="15@0.375").code == 128 + 15
    assert run_here(tmp_path / "cut", "--resume", **{"DATA.ROOT": served.index}).code == 0
    whole, cut = (
        torch.load(max((tmp_path / name / "checkpoints").glob("*.pth")), weights_only=True) for name in ("whole", "cut")
    )
    assert all(torch.equal(cut["model"][name], value) for name, value in whole["model"].items())
    assert cut["step"] == whole["step"]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("fault", ["hang up", "503", "429", "500", "short"])
def test_failure_that_passes_is_waited_out(
    served: Server, photo_dir: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = list_images(served.index)
    served.faults = [fault]
    assert images.read(4) == list_images(photo_dir).read(4)
    assert not caplog.records[2:], "one failure is no news"
    served.faults = [fault] * 2
    assert images.read(4) == list_images(photo_dir).read(4)
    assert "trying again in 0.1 s" in caplog.text
    assert not served.faults


@pytest.mark.usefixtures("hurried")
def test_failure_that_does_not_pass_ends_with_the_reason(served: Server) -> None:
    images = list_images(served.index)
    served.faults = ["503"] * 100
    with pytest.raises(ImagesLost, match=r"shard-000000\.tar cannot be read, also after 1 s .*503 Service Unavailable"):
        images.read(0)
    with pytest.raises(ValueError, match=r"image_index\.npz cannot be read, also after 0 s"):
        list_images(served.index)


@pytest.mark.usefixtures("hurried")
def test_server_that_is_not_there_is_refused_at_the_start() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=r"ConnectionRefusedError.*check that the server is up and reachable"):
        list_images(f"http://127.0.0.1:{port}/data/{INDEX_NAME}")


def test_server_without_ranges_is_refused_and_nothing_is_downloaded(served: Server) -> None:
    served.knows_ranges = False
    with pytest.raises(ValueError, match=r"sends whole files where a part was asked for .*use one that knows range"):
        list_images(served.index)


def test_missing_index_and_missing_shard_are_named(served: Server) -> None:
    (served.folder / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"data/shard-000001\.tar is missing \(404 Not Found\): check DATA\.ROOT"):
        list_images(served.index)
    with pytest.raises(ValueError, match=r"other\.npz is missing \(404"):
        list_images(served.index.replace(INDEX_NAME, "other.npz"))


def test_changed_shards_are_noticed_whether_or_not_their_length_is_another(served: Server, tmp_path: Path) -> None:
    images = list_images(served.index)
    shard = served.folder / "shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole + bytes(512))
    with pytest.raises(ImagesLost, match=rf"has changed .* it has {len(whole) + 512} bytes and had {len(whole)}"):
        images.read(0)
    shard.write_bytes(whole[:512])
    with pytest.raises(ImagesLost, match=r"has changed .* no bytes \d+-\d+"):
        images.read(9)
    shutil.copy(served.folder / "shard-000001.tar", shard)
    os.truncate(shard, len(whole))
    with pytest.raises(ValueError, match=r"'photo_000\.jpg' does not begin at byte 512"):
        list_images(served.index)


def test_moved_and_forbidden_shards_are_told_apart_from_missing_ones(served: Server) -> None:
    images = list_images(served.index)
    served.faults = ["302"]
    with pytest.raises(ImagesLost, match=r"is to be found at http://elsewhere/x \(302\)"):
        images.read(0)
    served.faults = ["403"]
    with pytest.raises(ImagesLost, match="403"):
        images.read(0)


def test_damaged_index_is_refused(served: Server) -> None:
    index = served.folder / INDEX_NAME
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"http://.*/image_index\.npz is no index of tools/make_shards\.py, or it is dam"
    ):
        list_images(served.index)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://host/folder/", " http://host/folder/"),
        ("http://host:81/shard.tar?secret", " http://host:81/shard.tar"),
        ("http:///image_index.npz", ""),
        ("http://host:port/image_index.npz", ""),
        ("http://[::1/image_index.npz", ""),
    ],
)
def test_address_that_is_not_one_of_an_index_is_refused(address: str, shown: str) -> None:
    with pytest.raises(ValueError, match="is not the address") as refused:
        list_images(address)
    assert str(refused.value).startswith(f"DATA.ROOT{shown} is not the address of an index: it must be http[s]://HOST")


def test_what_stands_after_the_question_mark_goes_with_every_request_and_into_no_message(served: Server) -> None:
    images = list_images(served.index + "?sig=secret")
    images.read(0)
    assert {query for _, query, _, _ in served.requests} == {"sig=secret"}
    assert "secret" not in f"{images.root} {images.name(0)}"
    (served.folder / "shard-000000.tar").unlink()
    with pytest.raises(ImagesLost) as lost:
        pickle.loads(pickle.dumps(images)).read(0)
    assert "secret" not in str(lost.value)
    with pytest.raises(ValueError, match="is not the address") as refused:
        list_images("http://me:secret@host/image_index.npz")
    assert "secret" not in str(refused.value)
