"""A suite of real runs under SIGKILL: the short form of tools/torture_suite.py, which does it 30 times over 12 jobs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 3
SEED = 10  # of which the victims are a training, everything and a worker, where they exist at that moment


@pytest.fixture(scope="module")
def torture_suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torture_suite", ROOT / "tools/torture_suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.d2
@pytest.mark.e2e
def test_a_suite_that_is_killed_at_random_moments_ends_with_the_table_of_one_left_in_peace(
    torture_suite: ModuleType, tmp_path: Path
) -> None:
    settings = {**torture_suite.TINY, "SOLVER.MAX_ITER": "2", "SOLVER.STEPS": "(1,)"}
    suite = torture_suite.make_suite(
        tmp_path, tasks=("coco_retinanet",), weights=("given",), seeds=(0, 1, 2), settings=settings
    )
    said: list[str] = []
    repeats = torture_suite.torture(suite, tmp_path, kills=KILLS, seed=SEED, say=said.append)
    print("\n".join(said))
    assert sum("kill " in line for line in said) == KILLS
    assert all(count <= 1 for count in repeats.values())
