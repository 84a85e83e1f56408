"""DensePose R-CNN through Detectron2's DensePose project, which is a package of its own: there only if installed.

The project brings head, losses, loaders and evaluator; ours are the config, the datasets' place and the checks. It
fetches four files of body geometry when it first needs them, most of them after the training; here they come before it.

Three things of the project would end or spoil an evaluation with today's libraries; `build_evaluator` sees to them:

- It asks for Pdist_matrix.pkl with a time limit, an argument that iopath refuses.
- It computes places in that matrix with the integers of SMPL_SUBDIV_TRANSFORM.mat. If those have 16 bits, numpy 2 keeps
  them so (NEP 50) and the products overflow: wrong distances, hence a wrong AP, and no error.
- Its box evaluator always takes the compiled COCOeval, which Detectron2 0.5 demands then.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer import d2

d2.require()

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators  # noqa: E402
from detectron2.utils.file_io import PathManager  # noqa: E402

MAPPER = "densepose"
"""The value of TRANSFER.MAPPER that says that a config is a DensePose one."""

GEOMETRY_URL = "https://dl.fbaipublicfiles.com/densepose/data/"
GEOMETRY = ("UV_symmetry_transforms.mat", "SMPL_subdiv.mat", "SMPL_SUBDIV_TRANSFORM.mat", "Pdist_matrix.pkl")
PACKAGES = ("densepose", "av", "scipy")
"""The project's package, and what it imports beyond Detectron2's own needs."""

PROJECT = "projects/DensePose"
UPSTREAM = "https://github.com/facebookresearch/detectron2.git"
TESTED_COMMIT = "c69939aa"
"""Where the project is taken from if the installed Detectron2 does not say which commit it is."""


def is_installed() -> bool:
    """Whether the project's package and what it imports can be found."""
    return not _absent()


def require() -> None:
    """Refuse a DensePose config where the project is missing, or belongs to another Detectron2.

    Raises:
        ValueError: If so; says how to install it.
    """
    absent = _absent()
    if absent:
        raise ValueError(
            f"this config is for DensePose R-CNN, which Detectron2 keeps in a project of its own ({PROJECT}), and "
            f"{', '.join(absent)} cannot be imported here. {how_to_install()}"
        )
    try:
        importlib.import_module("densepose")
    except ImportError as error:
        raise ValueError(
            f"Detectron2's DensePose project does not fit the installed Detectron2 {d2.require().version} ({error}): "
            f"both must be of one version. {how_to_install()}"
        ) from error


def how_to_install() -> str:
    """Commands for the version of the project that belongs to the installed Detectron2."""
    found = d2.require()
    if found.version == "0.5":  # its project has no setup.py
        return (
            f"Install with: pip install av scipy && git clone --depth 1 --branch v0.5 {UPSTREAM} d2-v0.5 && "
            f"export PYTHONPATH=$PWD/d2-v0.5/{PROJECT}"
        )
    source = f"git+{UPSTREAM}@{found.commit or TESTED_COMMIT}#subdirectory={PROJECT}"
    # --no-deps: the project asks for Detectron2's newest commit. No isolation: its setup.py imports torch.
    return f"Install with: pip install av scipy && pip install --no-deps --no-build-isolation '{source}'"


def _absent() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def add_config(cfg: Any) -> None:
    """Add the project's config keys.

    Raises:
        ValueError: As `require`.
    """
    require()
    importlib.import_module("densepose").add_densepose_config(cfg)


def register_datasets(root: Path) -> None:
    """Let densepose_coco_2014_{train,valminusminival,minival} mean the files under `root`. Reads none of them.

    The project registers them when it is imported, for ./datasets; those entries are replaced.
    """
    coco = importlib.import_module("densepose.data.datasets.coco")
    datasets = [dataset for dataset in coco.DATASETS if dataset.name.startswith("densepose_coco_2014")]
    for dataset in datasets:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if dataset.name in catalog:
                catalog.remove(dataset.name)
    coco.register_datasets(datasets, str(root))
    for dataset in datasets:
        MetadataCatalog.get(dataset.name).evaluator_type = "densepose"


def check_geometry() -> list[str]:
    """Say which geometry files are still to be fetched. Looks at this machine only, and changes nothing."""
    absent = [name for name in GEOMETRY if not (geometry_folder() / name).is_file()]
    if not absent:
        return []
    return [f"DensePose: {', '.join(absent)} will be fetched from {GEOMETRY_URL} into {geometry_folder()}."]


def geometry_folder() -> Path:
    """Where Detectron2's PathManager keeps what it fetches from GEOMETRY_URL."""
    cache = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    return cache / GEOMETRY_URL.split("/", 3)[3]


def fetch_geometry() -> list[str]:
    """Fetch the geometry files into Detectron2's cache, where they are used from.

    Returns:
        Their local paths.

    Raises:
        FileNotFoundError: If one is not in the cache and cannot be fetched; says where it belongs.
    """
    paths = []
    for name in GEOMETRY:
        try:
            paths.append(PathManager.get_local_path(GEOMETRY_URL + name))
        except Exception as error:  # whatever the network raises, the remedy is the same
            raise FileNotFoundError(
                f"DensePose needs {GEOMETRY_URL}{name}, which cannot be fetched here ({error}). Put the four files "
                f"{', '.join(GEOMETRY)} into {geometry_folder()}; $FVCORE_CACHE moves that folder"
            ) from error
    return paths


def build_train_loader(cfg: Any) -> Any:
    """The project's loader with its mapper, which turns the annotated points with the image."""
    data = importlib.import_module("densepose.data")
    return data.build_detection_train_loader(cfg, mapper=data.DatasetMapper(cfg, True))


def build_test_loader(cfg: Any, dataset_name: str) -> Any:
    """The project's loader for one dataset; it also completes the metadata that the evaluator reads."""
    data = importlib.import_module("densepose.data")
    return data.build_detection_test_loader(cfg, dataset_name, mapper=data.DatasetMapper(cfg, False))


def build_evaluator(cfg: Any, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """COCO's box evaluation and the project's GPS and GPSm, after `build_test_loader`."""
    evaluation = importlib.import_module("densepose.evaluation.evaluator")
    adapter = importlib.import_module("densepose.evaluation.d2_evaluator_adapter")
    PathManager.set_strict_kwargs_checking(False)
    vars(evaluation)["DensePoseCocoEval"] = _with_wide_integers(evaluation.DensePoseCocoEval)
    distributed = cfg.DENSEPOSE_EVALUATION.DISTRIBUTED_INFERENCE
    points = evaluation.DensePoseCOCOEvaluator(
        dataset_name,
        distributed,
        output_folder,
        evaluator_type=cfg.DENSEPOSE_EVALUATION.TYPE,
        min_iou_threshold=cfg.DENSEPOSE_EVALUATION.MIN_IOU_THRESHOLD,
        storage=evaluation.build_densepose_evaluator_storage(cfg, output_folder),
    )
    boxes = adapter.Detectron2COCOEvaluatorAdapter(dataset_name, output_dir=output_folder, distributed=distributed)
    boxes._use_fast_impl = d2.require().compiled  # the adapter does not pass the argument on
    return BoxesAndPoints([boxes, points])


class BoxesAndPoints(DatasetEvaluators):  # type: ignore[misc]  # Detectron2 is not followed
    """Several evaluators, with NaN where there is nothing to measure; the project has -1 or -100 there."""

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Per cent by task and metric on rank 0, empty on the others. Collective."""
        results: Mapping[str, Mapping[str, float]] = super().evaluate()
        return {
            task: {metric: value if value >= 0 else math.nan for metric, value in metrics.items()}
            for task, metrics in results.items()
        }


def _with_wide_integers(base: Any) -> Any:
    """The project's evaluation with numbers of vertices whose products do not overflow."""
    if getattr(base, "has_wide_integers", False):
        return base

    def distances(self: Any, *vertices: Any) -> Any:
        return base.getDistancesUV(self, *(numbers.astype("int64") for numbers in vertices))

    return type(base.__name__, (base,), {"getDistancesUV": distances, "has_wide_integers": True})
