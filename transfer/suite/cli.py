"""detco-suite: a whole table of transfer runs, weights x tasks x seeds, as one command that can be interrupted."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transfer.suite.check import CheckFailed, check_jobs, describe, mark_checked, was_checked
from transfer.suite.forecast import finished_jobs, forecast, summary
from transfer.suite.jobs import Job, Status, find_jobs, read_members, status_of, write_members
from transfer.suite.plan import SuiteError, job_ids, load_suite, make_jobs, shown, with_weights
from transfer.suite.processes import require_proc
from transfer.suite.scheduler import AlreadyThere, Scheduler, is_at_work, only_scheduler, register, slots_of
from transfer.suite.slurm import SlurmMissing, queued_ids, submit
from transfer.suite.status import status_report

INTERRUPTED = 130

EPILOG = """\
examples:
  what it would run, and for how long; then run it, and the same command again after any interruption:
    detco-suite run configs/suites/ranking_12k.yaml --weights mine=mine.pkl --num-gpus 8 --dry-run
    detco-suite run configs/suites/ranking_12k.yaml --weights mine=mine.pkl --num-gpus 8
  four jobs side by side, two GPUs each, the 8-GPU recipes scaled to them; only the VOC rows:
    detco-suite run configs/suites/detco_paper.yaml --weights detco=detco.pkl --num-gpus 8 --gpus-per-job 2 \\
        --auto-scale --only 'voc*__detco__*'
  on a cluster, one SLURM job each:
    detco-suite run configs/suites/soco_paper.yaml --weights soco_c4=c4.pkl --weights soco_fpn=fpn.pkl \\
        --launcher slurm --slurm slurm_partition=gpu --slurm timeout_min=2880 --num-gpus 8
  how far it is; and the tables:
    detco-suite status configs/suites/ranking_12k.yaml --watch
    detco-results runs/suites/ranking_12k

Each job has a folder below the suite's output: run/ is the run directory of detco-transfer, log.txt what it printed,
state.json how it ended. A job that fails keeps its log's last lines and does not stop the others. If this program is
killed, the job that is running goes on, and the next call waits for it. Ctrl-C stops the running jobs; they go on from
their last checkpoint.
"""

RUN_EPILOG = """\
exit code: 0 every job is done (slurm: submitted), 1 some failed, 2 wrong input, 130 interrupted.

examples:
  detco-suite run configs/suites/quick.yaml --num-gpus 0
  detco-suite run configs/suites/ranking_12k.yaml --weights mine=mine.pkl --num-gpus 8 --dry-run
"""

STATUS_EPILOG = """\
examples:
  detco-suite status configs/suites/quick.yaml
  detco-suite status runs/suites/quick --watch
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="detco-suite",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,status}")
    run = commands.add_parser(
        "run",
        help="run what is not done yet",
        description="Run every job of a suite that is not done yet. Safe to repeat at any time.",
        epilog=RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("suite", type=Path, metavar="SUITE", help="a YAML file; transfer/suite/plan.py explains its keys")
    _add_what(run)
    _add_where(run)
    _add_slurm(run)
    status = commands.add_parser(
        "status",
        help="what is done, running, failed, waiting",
        description="Show every job's state, results, progress with ETA, and why it failed. Changes nothing.",
        epilog=STATUS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    status.add_argument("place", type=Path, metavar="SUITE|OUTPUT_DIR", help="a suite file, or where a suite runs")
    status.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="show it again every so many seconds (10 if none are given) until nothing is running (default: once)",
    )
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a file made by convert-to-d2, for the suite's weights NAME or as a further row; may be repeated "
        "(default: the files that the suite names)",
    )
    what.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only jobs whose id TASK__WEIGHTS__seedN fits, * stands for anything; may be repeated (default: all)",
    )
    what.add_argument("--datasets-root", metavar="DIR", help="as for detco-transfer (default: the suite's)")
    what.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where the jobs go (default: the suite's `output`)"
    )
    what.add_argument("--retry-failed", action="store_true", help="run failed jobs again (default: leave them)")
    what.add_argument(
        "--dry-run", action="store_true", help="print the commands and a forecast of the GPU-hours, and stop"
    )


def _add_where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("GPUs")
    where.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="GPUs to use, the first N of CUDA_VISIBLE_DEVICES if it is set; 0 is the CPU (default: all there are)",
    )
    where.add_argument(
        "--gpus-per-job", type=int, metavar="N", help="GPUs of each job; jobs run side by side (default: all of them)"
    )
    where.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="jobs side by side on the CPU (default: %(default)s)"
    )
    where.add_argument(
        "--auto-scale",
        action="store_true",
        help="scale the published 8-GPU recipe to the GPUs of a job by Detectron2's linear rule (default: keep batch "
        "and lr, which fits a GPU with enough memory)",
    )


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="slurm submits one job each and returns; needs `pip install submitit` (default: %(default)s)",
    )
    cluster.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameters of submitit: timeout_min=MINUTES (needed), slurm_partition=NAME, cpus_per_task=N, mem_gb=N; "
        "cluster=local tries it out without SLURM; may be repeated",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run detco-suite. Returns the exit code: 0, 1 if jobs failed, 2 for wrong input, 130 if interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return run(arguments) if arguments.command == "run" else show_status(arguments)
    except (SuiteError, AlreadyThere, SlurmMissing, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckFailed, OSError) as error:  # a full disk, say
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def run(arguments: argparse.Namespace) -> int:
    """`detco-suite run`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    suite = with_weights(load_suite(arguments.suite), arguments.weights)
    output = arguments.output_dir or suite.output
    suite = replace(suite, output=output, datasets_root=arguments.datasets_root or suite.datasets_root)
    gpus = _gpus(arguments)
    per_job = arguments.gpus_per_job or len(gpus)
    slots = slots_of(gpus, per_job=per_job, cpu_jobs=arguments.jobs)
    jobs = make_jobs(suite, only=arguments.only, num_gpus=per_job, auto_scale=arguments.auto_scale)
    if arguments.dry_run:
        print(dry_run(jobs, num_slots=len(slots)))
        return 0
    require_proc()
    with only_scheduler(output):
        register(jobs)
        write_members(output, job_ids(suite))
        statuses = [status_of(job) for job in jobs]
        again = (Status.WAITING, Status.INTERRUPTED, *((Status.FAILED,) if arguments.retry_failed else ()))
        to_do = [job for job, status in zip(jobs, statuses, strict=True) if status in again]
        _say(f"{suite.name}: {len(jobs)} jobs, {statuses.count(Status.DONE)} done, into {output}")
        _say(f"{len(slots)} side by side, each on {per_job} GPUs" if gpus else f"on the CPU, {len(slots)} side by side")
        if unused := len(gpus) - per_job * len(slots):
            _say(f"{unused} of {len(gpus)} GPUs stay unused: --gpus-per-job is {per_job}")
        if to_do and not _check(to_do, arguments):
            return 2
        if arguments.launcher == "slurm":
            return _run_slurm(jobs, arguments, output)
        return _run_here(jobs, slots, arguments, output)


def _check(jobs: Sequence[Job], arguments: argparse.Namespace) -> bool:
    """Say what is wrong with the jobs. Returns whether nothing is."""
    # A failed one may have failed for what the check can see.
    new = [job for job in jobs if status_of(job) is Status.FAILED or not was_checked(job)]
    if not new:
        return True
    _say(f"checking {len(new)} jobs")
    problems = check_jobs(new, on_cluster=arguments.launcher == "slurm", say=_say)
    wrong = {name for ids in problems.values() for name in ids}
    for job in new:
        if job.id not in wrong:
            mark_checked(job)
    if problems:
        print(describe(problems), file=sys.stderr)
    return not problems


def _run_here(
    jobs: Sequence[Job], slots: Sequence[tuple[str, ...]], arguments: argparse.Namespace, output: Path
) -> int:
    scheduler = Scheduler(jobs, slots, _say)
    failed = scheduler.run(retry_failed=arguments.retry_failed)
    if scheduler.was_stopped:
        _say("interrupted; run the same command again to go on")
        return INTERRUPTED
    if failed:
        _say(f"{len(failed)} of {len(jobs)} jobs failed; the others are done. Why: detco-suite status {output}")
        _say("once the cause is gone: the same command with --retry-failed")
        return 1
    _say(f"all {len(jobs)} jobs are done. The tables: detco-results {output}")
    return 0


def _run_slurm(jobs: Sequence[Job], arguments: argparse.Namespace, output: Path) -> int:
    parameters = {}
    for word in arguments.slurm:
        key, equals, value = word.partition("=")
        if not equals:
            raise SuiteError(f"--slurm {word} is not KEY=VALUE")
        parameters[key] = value
    submitted = submit(jobs, parameters, output=output, retry_failed=arguments.retry_failed)
    for job in submitted:
        _say(f"submitted  {job.id}")
    _say(f"{len(submitted)} submitted. Watch them: detco-suite status {output} --watch")
    return 0


def dry_run(jobs: Sequence[Job], *, num_slots: int) -> str:
    """The exact commands, each with its forecast as a comment, and the sum of those that are not done."""
    finished = finished_jobs(jobs)
    lines, left = [], []
    for job in jobs:
        status, expected = status_of(job), forecast(job, finished)
        if status is Status.DONE:
            lines.append(f"# {job.id}: done")
            continue
        left.append(expected)
        amount = "" if expected.gpu_hours is None else f"{expected.gpu_hours:.2f} {'GPU-' * bool(job.num_gpus)}hours: "
        lines += [f"# {job.id}: {amount}{expected.source}", shown(job)]
    total = summary(left, num_gpus=jobs[0].num_gpus, num_slots=num_slots)
    return "\n".join([*lines, f"# {len(left)} jobs to run: {total}"])


def show_status(arguments: argparse.Namespace) -> int:
    """`detco-suite status`."""
    place: Path = arguments.place
    output = load_suite(place).output if place.suffix in (".yaml", ".yml") else place
    while True:
        jobs, left_out = find_jobs(output)
        for text in left_out:
            print(text, file=sys.stderr)
        if not jobs:
            raise SuiteError(f"no job has been started in {output}; detco-suite run SUITE starts them")
        queued = queued_ids(jobs)
        if arguments.watch and sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        print(status_report(jobs, queued=queued, members=read_members(output)), flush=True)
        at_work = queued or is_at_work(output) or any(status_of(job) is Status.RUNNING for job in jobs)
        if not arguments.watch or not at_work:
            return 0
        time.sleep(arguments.watch)


def _gpus(arguments: argparse.Namespace) -> list[str]:
    """Names of the GPUs to use: of CUDA_VISIBLE_DEVICES where it is set, else 0, 1, ...

    Raises:
        SuiteError: If there are fewer than asked for, or the numbers do not fit together.
    """
    wanted, per_job = arguments.num_gpus, arguments.gpus_per_job
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None and arguments.launcher == "slurm":
        raise SuiteError("--launcher slurm needs --num-gpus N, the GPUs of each job")
    if wanted is None:
        import torch  # takes seconds, and is not needed with --num-gpus

        wanted = torch.cuda.device_count()
    names = [str(index) for index in range(wanted)]
    if visible is not None and arguments.launcher == "local":
        listed = [name.strip() for name in visible.split(",") if name.strip()]
        if len(listed) < wanted:
            raise SuiteError(f"--num-gpus is {wanted}, but CUDA_VISIBLE_DEVICES names {len(listed)}: {visible!r}")
        names = listed[:wanted]
    if wanted < 0 or arguments.jobs < 1 or (per_job is not None and not 1 <= per_job <= wanted):
        raise SuiteError(
            f"--num-gpus {wanted}, --gpus-per-job {per_job}, --jobs {arguments.jobs}: --gpus-per-job must be from 1 to "
            "--num-gpus, --jobs at least 1"
        )
    if wanted and arguments.jobs > 1:
        raise SuiteError("--jobs is for the CPU; with GPUs --gpus-per-job decides how many jobs run side by side")
    if arguments.auto_scale and not wanted:
        raise SuiteError("--auto-scale scales to a number of GPUs, and there is none")
    if arguments.launcher == "slurm" and arguments.gpus_per_job is not None:
        raise SuiteError("with --launcher slurm --num-gpus is the GPUs of each job; leave --gpus-per-job out")
    return names


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
