"""The server that workers are forked from starts with the program, and not where there are no workers."""

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import __main__ as program

REPOSITORY = Path(__file__).parents[2]


def test_it_can_start_before_torch_is_imported() -> None:
    code = "import sys, pretrain.__main__; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        ([], True),
        (["DATA.NUM_WORKERS", "2"], True),
        (["DATA.NUM_WORKERS", "0"], False),
        (["--dry-run"], False),
        (["SEED", "0"], True),
    ],
)
def test_the_program_starts_it_if_it_may_want_workers(
    words: list[str], starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    monkeypatch.setattr("pretrain.fork_server.start", lambda: started.append(True))
    assert program.main([*words, "NO.SUCH_KEY", "1"]) == 2
    assert bool(started) == starts
