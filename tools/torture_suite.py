"""Kills a small suite with SIGKILL at random moments, over and over, and compares its table with an uninterrupted one.

Makes its own demo data and random weights, runs the suite once in peace, then again under fire: the scheduler, a
worker, a training process, or all of them at once are killed at random moments, and a killed scheduler is started
again. At the end the two tables must hold the same numbers, as must the losses of every iteration, and after each kill
at most one job may have been started again. If the suite is through before the last kill, it begins anew elsewhere.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transfer.suite.jobs import Job, Status, find_jobs, status_of  # noqa: E402
from transfer.suite.processes import processes_of  # noqa: E402

SCHEDULER, WORKER, TRAINING, EVERYTHING = "scheduler", "worker", "training", "everything"
MODULES = {WORKER: "transfer.suite.worker", TRAINING: "transfer.train_net"}
TASKS = ("coco_retinanet", "voc_faster_rcnn_c4", "coco_mask_rcnn_fpn")
# A third kill of one job under one scheduler would make it a failed one, rightly.
KILLS_OF_A_JOB = 2
WEIGHTS: Mapping[str, Callable[[Path], dict[str, str]]] = {
    "random": lambda work: {"init": "random"},
    "given": lambda work: {"file": str(work / "given.pkl")},
}
TINY = {
    "SOLVER.MAX_ITER": "4",
    "SOLVER.STEPS": "(3,)",
    "SOLVER.WARMUP_ITERS": "1",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MAX_SIZE_TRAIN": "96",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "96",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "16",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "8",
    "TEST.PRECISE_BN.NUM_ITER": "1",
}

EPILOG = """examples:
  python tools/torture_suite.py                                   30 kills over 12 jobs, 15 minutes on two cores
  python tools/torture_suite.py --kills 5 --seed 7 --work /tmp/t  a few, at other moments
"""

Say = Callable[[str], None]


class Broken(Exception):
    """What must not happen has happened."""


@dataclass
class Torture:
    """One suite under fire.

    Attributes:
        suite: Its file.
        say: Takes a line for each kill.
        typical_s: Seconds that one job takes in peace.
        kills: Time and kind of each kill so far.
    """

    suite: Path
    say: Say
    typical_s: float
    kills: list[tuple[float, str]] = field(default_factory=list)

    def round(self, output: Path, *, kills: int, rng: random.Random) -> None:
        """Run the suite into `output` until it is through, killing until `kills` kills have been made in all.

        Raises:
            Broken: If the suite fails, or two processes train one job at the same time.
        """
        scheduler = start(self.suite, output)
        lives: Counter[str] = Counter()
        try:
            while scheduler.poll() is None and not any(status_of(job) is Status.RUNNING for job in jobs_of(output)):
                time.sleep(0.1)  # the check of all jobs comes first, once
            while True:
                pause = rng.uniform(0.05, 1.0) * self.typical_s if len(self.kills) < kills else None
                code = self._wait(scheduler, output, pause)
                if code is not None:
                    if code:
                        raise Broken(f"detco-suite ended with exit code {code}:\n{log_of(output)}")
                    return
                kind = self._kill(scheduler, output, rng, lives)
                if kind in (SCHEDULER, EVERYTHING):
                    scheduler.wait()
                    lives.clear()
                    time.sleep(rng.uniform(0, 0.5))
                    scheduler = start(self.suite, output)
        finally:
            if scheduler.poll() is None:
                scheduler.send_signal(signal.SIGINT)
                scheduler.wait()

    def _wait(self, scheduler: subprocess.Popen[bytes], output: Path, pause: float | None) -> int | None:
        """Let it run for a while. Returns its exit code if it ends meanwhile."""
        until = time.monotonic() + pause if pause is not None else float("inf")
        while time.monotonic() < until:
            if (code := scheduler.poll()) is not None:
                return code
            for job in jobs_of(output):
                if len(training := find(job, TRAINING)) > 1:
                    raise Broken(f"processes {training} train {job.id} at the same time")
            time.sleep(0.1)
        return scheduler.poll()

    def _kill(self, scheduler: subprocess.Popen[bytes], output: Path, rng: random.Random, lives: Counter[str]) -> str:
        jobs = jobs_of(output)
        victims = {kind: [(job, pid) for job in jobs for pid in find(job, kind)] for kind in (WORKER, TRAINING)}
        spared = [job.id for job, _ in victims[TRAINING] if lives[job.id] >= KILLS_OF_A_JOB]
        possible = [SCHEDULER, EVERYTHING, *(kind for kind in victims if victims[kind] and not spared)]
        kind = rng.choice(possible)
        hit: list[int] = []
        if kind in (SCHEDULER, EVERYTHING):
            hit.append(scheduler.pid)
        if kind == EVERYTHING:
            hit += [pid for group in victims.values() for _, pid in group]
        elif kind != SCHEDULER:
            job, pid = rng.choice(victims[kind])
            hit.append(pid)
            lives[job.id] += 1
        self.kills.append((time.time(), kind))
        for pid in hit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        done = sum(status_of(job) is Status.DONE for job in jobs)
        self.say(f"kill {len(self.kills):>2}: {kind:<10} with {done} of {len(jobs)} jobs done")
        return kind


def jobs_of(output: Path) -> list[Job]:
    """The jobs of an output folder.

    Raises:
        Broken: If one cannot be read, for every kill must leave the old or the new content.
    """
    jobs, left_out = find_jobs(output)
    if left_out:
        raise Broken("\n".join(left_out))
    return jobs


def find(job: Job, kind: str) -> list[int]:
    """Ids of a job's processes of one kind, without children that have not begun their own program yet."""
    found: dict[int, int] = {}
    for pid in processes_of(job.folder):
        with contextlib.suppress(OSError):
            if MODULES[kind] in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                found[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [pid for pid, parent in found.items() if parent not in found]


def make_suite(
    work: Path, *, tasks: Sequence[str], weights: Sequence[str], seeds: Sequence[int], settings: Mapping[str, str]
) -> Path:
    """Draw the demo data, make a file of random weights, and write a suite of tasks x weights x seeds.

    Args:
        work: Where all of it goes.
        tasks: Stems in configs/transfer/quick.
        weights: "random" (no file), "given" (the file), or both.
        seeds: See there.
        settings: KEY -> VALUE of every run.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    commands = [["tools/make_demo_data.py", str(work / "data"), "--images", "1"]]
    if not (work / "given.pkl").exists():
        import torch
        from torchvision.models import resnet50

        torch.manual_seed(0)
        torch.save(resnet50().state_dict(), work / "given.pth")
        commands.append(["-m", "transfer.convert", str(work / "given.pth"), str(work / "given.pkl")])
    for command in commands:
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    content = {
        "name": "torture",
        "output": str(work / "peace"),
        "datasets_root": str(work / "data"),
        "weights": {name: WEIGHTS[name](work) for name in weights},
        "seeds": list(seeds),
        "overrides": [word for pair in settings.items() for word in pair],
        "tasks": [{"config": f"{ROOT}/configs/transfer/quick/{task}_{{init}}.yaml"} for task in tasks],
    }
    path = work / "suite.yaml"
    path.write_text(json.dumps(content, indent=2))  # JSON is YAML
    return path


def start(suite: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start detco-suite on the CPU; what it prints goes to a file beside the jobs."""
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "transfer.suite.cli", "run", str(suite), "--num-gpus", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (output / "scheduler.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--output-dir", str(output)], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def log_of(output: Path) -> str:
    """The end of what the schedulers of an output folder have printed."""
    return "\n".join((output / "scheduler.log").read_text().splitlines()[-20:])


def run_in_peace(suite: Path, output: Path) -> float:
    """Run a suite without any kill. Returns the mean seconds of a job, from its start to its end.

    Raises:
        Broken: If it fails.
    """
    if code := start(suite, output).wait():
        raise Broken(f"detco-suite ended with exit code {code} without being killed:\n{log_of(output)}")
    states = [json.loads((job.folder / "state.json").read_text()) for job in jobs_of(output)]
    return sum(state["ended"] - state["started"] for state in states) / len(states)


def table_of(output: Path) -> list[Any]:
    """The numbers of `detco-results --format json`, without what belongs to the folder and the clock."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "transfer.results.cli", str(output), "--format", "json", "--no-reference"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    content = json.loads(done.stdout)
    if content["left_out"]:
        raise Broken(f"detco-results leaves out {content['left_out']}")
    rows = [(table["task"], row) for table in content["tables"] for row in table["rows"]]
    return [
        (
            task,
            row["pretraining"],
            row["config_digest"],
            row["weights_sha256"],
            row["cells"],
            run["seed"],
            run["metrics"],
        )
        for task, row in rows
        for run in row["runs"]
    ]


def losses_of(job: Job) -> dict[int, float]:
    """Loss by iteration, of the last attempt that wrote it."""
    lines = map(json.loads, (job.run_folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def compare(expected: Path, found: Path) -> None:
    """Compare the tables of two folders, and the losses that led to them.

    Raises:
        Broken: If they differ.
    """
    tables = table_of(expected), table_of(found)
    for left, right in zip(*tables, strict=False):
        if left != right:
            raise Broken(f"the table of {found} is not the one in peace:\n{left}\n{right}")
    if len(tables[0]) != len(tables[1]):
        raise Broken(f"{found} has {len(tables[1])} runs instead of {len(tables[0])}")
    for left_job, right_job in zip(jobs_of(expected), jobs_of(found), strict=True):
        left_losses, right_losses = losses_of(left_job), losses_of(right_job)
        if left_losses != right_losses:
            raise Broken(f"{right_job.id} was trained with losses {right_losses}, in peace with {left_losses}")


def repeats_by_kill(output: Path, kills: Sequence[tuple[float, str]]) -> Counter[int]:
    """How many jobs were started again after each kill, by the kill's index; -1 is before the first."""
    repeats: Counter[int] = Counter()
    for job in jobs_of(output):
        for line in (job.folder / "attempts.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if entry["event"] == "start" and entry["attempt"] > 1:
                repeats[sum(moment <= entry["time"] for moment, _ in kills) - 1] += 1
    return repeats


def torture(suite: Path, work: Path, *, kills: int, seed: int, say: Say) -> Counter[int]:
    """Run a suite in peace and under fire, and compare.

    Returns:
        Jobs started again after each kill.

    Raises:
        Broken: If the tables differ, a kill made more than one job start again, or a run failed.
    """
    begun = time.monotonic()
    typical_s = run_in_peace(suite, work / "peace")
    say(f"in peace: {time.monotonic() - begun:.0f} s; a job takes {typical_s:.0f} s")
    rng, repeats = random.Random(seed), Counter[int]()
    under_fire = Torture(suite, say, typical_s)
    rounds = 0
    while len(under_fire.kills) < kills:
        output = work / f"fire_{rounds}"
        under_fire.round(output, kills=kills, rng=rng)
        rounds += 1
        compare(work / "peace", output)
        repeats += repeats_by_kill(output, under_fire.kills)
        say(f"{output.name}: as in peace, after {len(under_fire.kills)} of {kills} kills")
    if too_many := {index: count for index, count in repeats.items() if count > 1 or index < 0}:
        raise Broken(f"jobs started again after single kills: {too_many}")
    kinds = Counter(kind for _, kind in under_fire.kills)
    say(
        f"{kills} kills ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}): tables equal, "
        f"{repeats.total()} jobs started again, at most one after each kill; {time.monotonic() - begun:.0f} s"
    )
    return repeats


def main(argv: Sequence[str] | None = None) -> int:
    """Run the torture. Returns 0 if everything holds, 1 if not."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="number of SIGKILLs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides on moments and victims (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/torture", help="new or empty folder (default: runs/torture)"
    )
    arguments = parser.parse_args(argv)
    work: Path = arguments.work.resolve()
    if work.exists() and any(work.iterdir()):
        print(f"error: {work} is not empty; remove it or give another --work", file=sys.stderr)
        return 2
    work.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {text}", flush=True)

    say("making demo data and weights")
    suite = make_suite(work, tasks=TASKS, weights=tuple(WEIGHTS), seeds=(0, 1), settings=TINY)
    say("the suite in peace: 12 jobs")
    try:
        torture(suite, work, kills=arguments.kills, seed=arguments.seed, say=say)
    except Broken as broken:
        print(f"FAILED: {broken}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
