"""The README's task list: every protocol and its config, and nothing that does not exist."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfer.tasks import load_tasks

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## The task list")[1].split("\n## ")[0]
ROWS = [line.split("|")[1:4] for line in SECTION.splitlines() if line.startswith("| ") and "`" in line]


def expand(pattern: str) -> list[str]:
    """All words of "a{b,c}d", in order."""
    parts = re.split(r"{(.*?)}", pattern)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def listed() -> Iterator[tuple[str, str]]:
    for _, tasks, configs in ROWS:
        names = [name for pattern in re.findall(r"`(.*?)`", tasks) for name in expand(pattern)]
        stems = [stem for pattern in re.findall(r"`(.*?)`", configs) for stem in expand(pattern)]
        yield from zip(names, stems, strict=True)


def test_every_protocol_is_listed_with_its_config() -> None:
    protocols = {name: task.config for name, task in load_tasks().items()}
    assert set(listed()) == set(protocols.items())


@pytest.mark.parametrize("paper", ["DetCo", "SoCo"])
def test_every_table_of_detection_results_is_in_the_list(paper: str) -> None:
    tables = {
        number
        for rows, _, _ in ROWS
        for words in rows.split(";")
        if words.strip().startswith(paper) and " v1 " not in words
        for number in re.findall(r"\d+", re.sub(r"\(.*|, read.*", "", words))
    }
    probes = {"DetCo": {10, 12}, "SoCo": {11}}[paper]
    assert {int(number) for number in tables} == set(range(1, 13)) - probes
