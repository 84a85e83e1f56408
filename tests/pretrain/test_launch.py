"""Who am I, and how does it end: environments, exit codes, messages."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.launch import (
    RefusalError,
    RunFailedError,
    StopRequest,
    World,
    agree,
    environment_world,
    first_host,
    from_first,
    launch,
    spawn,
)

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, (9, 16, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}, (3, 8, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script: one process, whatever the job has
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, None),
    ],
)
def test_ranks_come_from_torchrun_or_a_slurm_step(
    environ: Mapping[str, str], expected: tuple[int, int, int] | None
) -> None:
    assert environment_world(environ) == expected


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-012,020],cpu1", "gpu007"),
        ("n-a[3,5]", "n-a3"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_more_gpus_than_there_are_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(_body, "fine", num_gpus=torch.cuda.device_count() + 1) == 2
    assert "--num-gpus 0 runs on the CPU" in capsys.readouterr().err


def _body(world: World, how: str) -> int:
    """What a rank does in the tests below; rank 0 ends as `how` says, rank 1 would wait for ever if nobody ended it."""
    if how == "fine":
        total = torch.tensor(world.rank + 1)
        if world.size > 1:
            dist.all_reduce(total)
        return 0 if total == world.size * (world.size + 1) // 2 else 99
    if how == "refused":
        raise RefusalError("no such folder")
    if how == "failed":
        raise RunFailedError("loss is nan")
    if world.rank == 0:
        raise KeyError("a mistake in the code")
    dist.barrier()
    return 0


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("fine", 0, ""),
        ("refused", 2, "error: no such folder\n"),
        ("failed", 1, "error: loss is nan\n"),
        ("mistake", 1, "error: rank 0: KeyError: 'a mistake in the code'\n"),
    ],
)
def test_one_process_ends_with_a_code_and_a_message(
    how: str, code: int, message: str, capsys: pytest.CaptureFixture[str], one_thread_and_quiet_logs: None
) -> None:
    assert launch(_body, how, num_gpus=0) == code
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "code", "message"),
    [("fine", 0, None), ("refused", 2, "error: no such folder"), ("mistake", 1, "error: rank 0: KeyError")],
)
def test_spawned_processes_end_together_with_one_message(
    how: str, code: int, message: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert spawn(_body, how, size=2, use_cuda=False) == code
    assert time.monotonic() - started < 60, "nobody waits for the time-out of a collective"
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == (1 if message else 0), errors
    assert all(line.startswith(message or "") for line in errors)


def _wait_for_signal(world: World, folder: Path) -> int:
    with StopRequest() as stop:
        (folder / "ready").touch()
        while not stop.number:
            time.sleep(0.01)
    return 128 + stop.number


@pytest.mark.dist
def test_a_signal_to_the_parent_reaches_the_ranks(tmp_path: Path) -> None:
    finished = threading.Event()

    def send_when_ready() -> None:
        while not (tmp_path / "ready").exists() and not finished.wait(0.05):
            pass
        os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=send_when_ready)
    sender.start()
    code = spawn(_wait_for_signal, tmp_path, size=1, use_cuda=False)
    finished.set()
    sender.join()
    assert code == 138


def test_a_refusal_of_any_kind_becomes_one_with_its_message() -> None:
    def missing() -> None:
        raise FileNotFoundError("no folder /images")

    for work in (agree, from_first):
        with pytest.raises(RefusalError, match="no folder /images"):
            work(missing, ALONE)
    assert agree(lambda: 5, ALONE, first_alone=True) == from_first(lambda: 5, ALONE) == 5


def test_mistakes_are_not_taken_for_refusals() -> None:
    with pytest.raises(ZeroDivisionError):
        agree(lambda: 1 // 0, ALONE)


def test_stop_remembers_the_first_signal_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_help_needs_no_torch_and_teaches() -> None:
    blocked = "import sys; sys.modules['torch'] = None; from pretrain.__main__ import main; main(['--help'])"
    shown = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=True).stdout
    for word in ("what to run:", "how to run it:", "examples:", "DATA.ROOT", "exit codes:", "(default: "):
        assert word in shown
