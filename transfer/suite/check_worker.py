"""The process behind transfer/suite/check.py: examines the settings of many runs. Needs Detectron2.

In, one JSON line for each job: {"id": ID, "words": [what follows `detco-transfer`]}. Out, one line for each, at once:
{"id": ID, "errors": [TEXT]}.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transfer import d2
from transfer.train_net import build_parser
from transfer.weights import WeightsRecord


def errors_of(words: Sequence[str]) -> list[str]:
    """What keeps a run from starting.

    Args:
        words: The command line of detco-transfer.
    """
    # Not before main() has found Detectron2, for its absence has a message of its own.
    from transfer.settings_check import examine

    try:
        prepared = examine(build_parser().parse_args(list(words)))
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]
    return [*prepared.errors, *_unrecorded(prepared.weights)]


def _unrecorded(record: WeightsRecord) -> list[str]:
    """A file that does not say what its network's input must look like cannot be compared with the config."""
    if not record.path or record.preprocess is not None:
        return []
    target = Path(record.path).with_suffix(".d2.pkl")
    return [
        f"{record.path} was not made by convert-to-d2: it does not say what input it was trained with. Convert it: "
        f"convert-to-d2 {record.path} {target}"
    ]


def main() -> int:
    """Answer every line of stdin. Returns 0; 1 without Detectron2."""
    try:
        d2.require()
    except d2.Detectron2Missing as error:
        print(error, file=sys.stderr)
        return 1
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        for line in sys.stdin:
            job = json.loads(line)
            print(json.dumps({"id": job["id"], "errors": errors_of(job["words"])}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
