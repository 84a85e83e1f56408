"""Every command of the README runs, from the first to the last; made small and for the CPU, without --auto-scale."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.e2e
@pytest.mark.d2
def test_every_readme_command_runs_from_images_to_a_table(
    tmp_path: Path, run_documented: Callable[..., list[str]]
) -> None:
    demo = [sys.executable, ROOT / "tools/make_demo_data.py", tmp_path / "datasets", "--images", "12"]
    subprocess.run(demo, check=True, capture_output=True)
    images = tmp_path / "datasets/unlabelled"
    (tmp_path / "my").mkdir()
    for split in ("train", "val"):
        annotations = tmp_path / f"datasets/coco/annotations/instances_{split}2017.json"
        (tmp_path / f"my/instances_{split}.json").symlink_to(annotations)
        (tmp_path / f"my/instances_{split}").symlink_to(tmp_path / f"datasets/coco/{split}2017")

    outputs = run_documented(ROOT / "README.md", {"IMAGES": str(images)})

    assert (tmp_path / "views.png").stat().st_size > 10_000
    assert "box AP" in outputs[-1]
    assert list((tmp_path / "runs/suite").rglob("results.json"))
    assert r"\toprule" in (tmp_path / "table.tex").read_text()


@pytest.mark.e2e
def test_the_documented_shards_are_packed_and_pretrained_on(
    tmp_path: Path, run_documented: Callable[..., list[str]], photo_dir: Path
) -> None:
    run_documented(ROOT / "docs/shards.md", {"IMAGES": str(photo_dir)})

    assert (tmp_path / "shards/image_index.npz").exists()
    assert (tmp_path / "runs/detco/model.safetensors").exists()


def test_every_file_the_readme_names_exists() -> None:
    named = set(
        re.findall(
            r"(?<![\w/])(?:configs|detco|pretrain|transfer|tools|docs|tests)/[\w./{},-]*\.(?:yaml|py|md)", README
        )
    )
    assert len(named) > 8
    for name in sorted(named):
        assert (ROOT / name).is_file() or "{" in name or "CONFIG" in name, name


def test_every_config_family_the_readme_lists_exists() -> None:
    folder = ""
    for line in README.splitlines():
        if heading := re.match(r"\| (?:config|suite) \(`(.*?)`\)", line):
            folder = heading[1]
        for pattern in re.findall(r"`([\w/{},*-]+\.yaml)`", line if line.startswith("| `") else ""):
            choices = re.search(r"{(.*?)}", pattern)
            for choice in choices[1].split(",") if choices else [""]:
                glob = re.sub(r"{.*?}", choice, pattern)
                assert list((ROOT / folder).glob(glob)), f"{folder}{glob}"


@pytest.mark.parametrize("target", ["setup", "quickstart", "test", "check", "format", "bench"])
def test_every_make_target_is_known_to_make(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
