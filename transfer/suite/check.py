"""Checks every job before the first one starts: hours later is too late for a missing file of the last one.

One process checks them all. The rest of the suite can do without Detectron2, the check cannot. What was found right is
remembered, so that going on after an interruption is quick: every run repeats the check of its own settings anyway.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from transfer.suite.jobs import Job
from transfer.suite.plan import train_words
from transfer.suite.processes import marked_environment

JOBS_NAMED = 3
SAY_EVERY_S = 20.0
MARK = "checked"


class CheckFailed(RuntimeError):
    """The check itself did not work, say because Detectron2 is missing; the message holds what it printed."""


def check_jobs(jobs: Sequence[Job], *, on_cluster: bool, say: Callable[[str], None]) -> dict[str, list[str]]:
    """Examine the settings, weights and data of jobs, with what `detco-transfer --check` knows.

    Args:
        jobs: At least one.
        on_cluster: Whether they run elsewhere, so that this machine's GPUs do not matter.
        say: Takes lines about the progress.

    Returns:
        What is wrong -> ids of the jobs, each different text once; empty if everything is right.

    Raises:
        CheckFailed: If it cannot be done.
    """
    asked = [{"id": job.id, "words": [*["--check"] * on_cluster, *train_words(job)]} for job in jobs]
    found: dict[str, list[str]] = {}
    said, answered = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as questions, tempfile.TemporaryFile("w+") as noise:
        questions.writelines(json.dumps(question) + "\n" for question in asked)
        questions.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "transfer.suite.check_worker"],
            stdin=questions,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=marked_environment(jobs[0].folder.parent),
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                answered += 1
                for text in answer["errors"]:
                    found.setdefault(text, []).append(answer["id"])
                if time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    say(f"checked {answered} of {len(jobs)} jobs")
        noise.seek(0)
        if process.returncode:
            raise CheckFailed(f"the jobs cannot be checked: {noise.read()[-3000:].strip()}")
    return found


def was_checked(job: Job) -> bool:
    """Whether this very command with these very files has been found right before."""
    path = job.folder / MARK
    return path.is_file() and path.read_text(encoding="utf-8") == _digest(job)


def mark_checked(job: Job) -> None:
    """Remember that a job was found right."""
    (job.folder / MARK).write_text(_digest(job), encoding="utf-8")


def _digest(job: Job) -> str:
    return hashlib.sha256("\0".join([*job.command, *job.inputs, *job.inputs.values()]).encode()).hexdigest()


def describe(problems: dict[str, list[str]]) -> str:
    """What is wrong, and in which jobs, for people."""
    lines = []
    for text, ids in problems.items():
        more = f" and {len(ids) - JOBS_NAMED} more" if len(ids) > JOBS_NAMED else ""
        lines += [f"error: {text}", f"    in {', '.join(ids[:JOBS_NAMED])}{more}"]
    return "\n".join([*lines, "Nothing was started. Repair this, or choose other jobs with --only."])
