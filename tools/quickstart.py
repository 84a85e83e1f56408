"""From a folder of unlabelled images to a results table, in one command, on demo data drawn on the spot.

Stages whose result already exists are skipped, and an interrupted stage goes on from its last checkpoint, so running
the command again is always right. Every stage is an ordinary command of the suite and is printed before it runs.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("moco_v2", "detco")
TASKS = {"voc_c4": "voc_faster_rcnn_c4", "coco_fpn": "coco_mask_rcnn_fpn"}
SHOWN = re.compile(
    r"^\d\d:\d\d:\d\d epoch|^drawing|demo data is|\beta: .*total_loss|Start inference on|"
    r"^error|largest difference|Written to"
)
NOISE = re.compile(r"^\[.*?\]:? |lr: .*|time: .*")

EPILOG = """examples:
  python tools/quickstart.py                      everything, into runs/quickstart
  python tools/quickstart.py --output-dir /tmp/q  somewhere else
"""


@dataclass(frozen=True)
class Stage:
    """One command, and the file whose existence says that it is finished."""

    title: str
    result: Path
    command: tuple[str, ...]


def pretrain_stage(method: str, out: Path, num_gpus: int) -> Stage:
    """Pretraining of one method on the unlabelled demo images."""
    command = ["-m", "pretrain", "--config-file", f"configs/pretrain/quick/{method}_r50.yaml", "--resume"]
    command += ["--num-gpus", str(num_gpus), "--output-dir", str(out / method)]
    command += ["DATA.ROOT", str(out / "data/unlabelled")]
    return Stage(f"pretrain {method}", out / method / "model.safetensors", tuple(command))


def convert_stage(method: str, out: Path) -> Stage:
    """Conversion to Detectron2's format, checked against Detectron2's own ResNet."""
    source, target = out / method / "model.safetensors", out / f"{method}.pkl"
    command = ("-m", "transfer.convert", str(source), str(target), "--verify", "--force")
    return Stage(f"convert {method}", target, command)


def transfer_stage(task: str, weights: str, out: Path, num_gpus: int) -> Stage:
    """Fine-tuning and evaluation of one detector from one set of weights."""
    run = out / task / weights
    init = "random" if weights == "random" else "converted"
    command = ["-m", "transfer.train_net", "--config-file", f"configs/transfer/quick/{TASKS[task]}_{init}.yaml"]
    command += ["--resume", "--num-gpus", str(num_gpus), "--datasets-root", str(out / "data"), "--output-dir", str(run)]
    command += [] if weights == "random" else ["MODEL.WEIGHTS", str(out / f"{weights}.pkl")]
    return Stage(f"{task} from {weights}", run / "results.json", tuple(command))


def plan(out: Path, num_gpus: int) -> list[Stage]:
    """All stages, in order."""
    data = Stage("demo data", out / "data/.complete", ("tools/make_demo_data.py", str(out / "data")))
    stages = [data]
    stages += [pretrain_stage(method, out, num_gpus) for method in METHODS]
    stages += [convert_stage(method, out) for method in METHODS]
    stages += [transfer_stage(task, weights, out, num_gpus) for task in TASKS for weights in ("random", *METHODS)]
    return stages


def run_stage(stage: Stage, log: Path) -> None:
    """Run one stage; progress lines go to the terminal, everything to `log`.

    Raises:
        subprocess.CalledProcessError: If the command fails; its last lines have been printed then.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", *stage.command]
    print("  $ " + shlex.join(["python", *stage.command]).replace(f"{ROOT}/", ""), flush=True)
    tail: list[str] = []
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                tail = [*tail[-19:], line]
                if SHOWN.search(line):
                    print("    " + NOISE.sub("", line.rstrip()).strip()[:160], flush=True)
        except KeyboardInterrupt:
            process.wait()  # it got the signal too, and is saving
            raise
        code = process.wait()
    if code:
        print(f"\nerror: stage '{stage.title}' ended with exit code {code}. Its last lines (all of them in {log}):")
        print("".join("    " + line for line in tail))
        raise subprocess.CalledProcessError(code, command)


def shown(path: Path) -> str:
    """A path as short as it can be said from the project's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def print_table(out: Path) -> None:
    """The results table, on the terminal and as Markdown beside the runs."""
    runs = [str(out / task) for task in TASKS]
    subprocess.run([sys.executable, "-m", "transfer.results.cli", *runs], cwd=ROOT, check=True)
    table = out / "results.md"
    command = [sys.executable, "-m", "transfer.results.cli", *runs, "--format", "md", "-o", str(table)]
    subprocess.run(command, cwd=ROOT, check=True)


def print_next_steps(out: Path) -> None:
    """Where everything lies and what to do with real data."""
    place = shown(out)
    print(f"""
Where everything lies
  {place}/data                     the demo images: unlabelled/, VOC2007/, VOC2012/, coco/
  {place}/detco/model.safetensors  pretrained weights; metrics.jsonl, tensorboard/ and manifest.json beside them
  {place}/detco.pkl                the same for Detectron2
  {place}/voc_c4, coco_fpn         one folder per detector: log.txt, metrics.json, results.json
  {place}/results.md               the table above

These runs are a few hundred tiny images seen for minutes: they show that the chain works, not which method is better.

With your own images (any folder of JPEG, PNG or WebP; see README.md)
  detco-pretrain --config-file configs/pretrain/detco_r50_200ep.yaml --num-gpus 8 \\
      --output-dir runs/detco DATA.ROOT IMAGES
  convert-to-d2 runs/detco/model.safetensors detco.pkl --verify
  detco-transfer --config-file configs/transfer/voc/faster_rcnn_r50_c4_24k_converted.yaml --num-gpus 8 \\
      --output-dir runs/voc MODEL.WEIGHTS detco.pkl
  detco-results runs/voc""")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs/quickstart", help="(default: runs/quickstart)")
    out = parser.parse_args(argv).output_dir.resolve()
    import torch  # after --help, which need not wait for it

    num_gpus = min(1, torch.cuda.device_count())
    print(f"quickstart on {'one GPU' if num_gpus else 'the CPU'}, into {shown(out)}", flush=True)
    stages = plan(out, num_gpus)
    start = time.monotonic()
    for number, stage in enumerate(stages, 1):
        heading = f"\n[{number}/{len(stages)}] {stage.title}"
        if stage.result.exists():
            print(f"{heading}: done before", flush=True)
            continue
        print(f"{heading}   ({time.monotonic() - start:.0f} s so far)", flush=True)
        try:
            run_stage(stage, out / "logs" / f"{stage.title.replace(' ', '_')}.txt")
        except subprocess.CalledProcessError:
            return 1
        except KeyboardInterrupt:
            print("\ninterrupted; run the same command again to go on from here")
            return 130
    print(f"\nall stages done, {time.monotonic() - start:.0f} s in this run\n", flush=True)
    print_table(out)
    print_next_steps(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
