"""The config: one schema, from the constructors; nothing unknown, nothing of the wrong type."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from detco.methods import METHODS
from detco.views.detco import DetCoRecipe
from pretrain.__main__ import EPILOG
from pretrain.config import ConfigError, build_method, build_recipe, differences, digest, load_config, method_options

CONFIGS = Path(__file__).parents[2] / "configs/pretrain"
SOCO = ("soco_c4", "soco_fpn", "soco_fpn_star")
QUICK = [*CONFIGS.glob("quick/*_r50.yaml"), *(CONFIGS / f"quick/{name}.yaml" for name in SOCO)]
COMPLETE = sorted([*CONFIGS.glob("*.yaml"), *QUICK])


def keys(**sections: Any) -> list[str]:
    return [word for key, value in sections.items() for word in (key.replace("__", "."), str(value))]


@pytest.mark.parametrize("file", COMPLETE, ids=lambda file: file.stem)
def test_every_config_builds_its_recipe_and_fits_its_method(file: Path) -> None:
    cfg = load_config(file)
    recipe = build_recipe(cfg)
    with torch.device("meta"):  # the shapes of 65536-key queues without their memory
        method = build_method(cfg)
    per_process = cfg.SOLVER.BATCH_SIZE_TOTAL if "quick" in file.parts else cfg.SOLVER.BATCH_SIZE_TOTAL // 8
    method.check_batch(per_process)
    assert type(recipe) is METHODS[cfg.METHOD.NAME].recipe_for(**method_options(cfg))
    named = file.stem.partition("_r50")[0].removesuffix("_paper").removesuffix("_aa")
    assert {"mls": "detco", "glc": "detco"}.get(named, named) == cfg.METHOD.NAME


def test_the_published_configs_are_all_there() -> None:
    names = {file.stem for file in COMPLETE}
    assert {f"{m}_r50_{e}ep" for m in ("moco_v2", "detco", "detco_aa") for e in (100, 200, 800)} <= names
    assert {f"{m}{paper}_r50_{e}ep" for m in SOCO for paper in ("", "_paper") for e in (100, 400)} <= names
    for file in CONFIGS.glob("*.yaml"):
        assert int(file.stem.split("_")[-1].removesuffix("ep")) == load_config(file).SOLVER.EPOCHS


@pytest.mark.parametrize(
    ("name", "multi_level", "local", "rand_augment"),
    [
        ("detco_r50_200ep", True, True, False),
        ("detco_aa_r50_200ep", True, True, True),
        ("mls_r50_100ep", True, False, False),
        ("glc_r50_100ep", False, True, False),
    ],
)
def test_rows_differ_by_their_switches(name: str, multi_level: bool, local: bool, rand_augment: bool) -> None:
    cfg = load_config(CONFIGS / f"{name}.yaml")
    assert (multi_level, local, rand_augment) == (cfg.METHOD.MULTI_LEVEL, cfg.METHOD.LOCAL, cfg.VIEWS.RAND_AUGMENT)
    assert ("PATCH_SIZE" in cfg.VIEWS) == local


def test_published_values_are_those_of_the_papers() -> None:
    for name in ("moco_v2_r50_200ep", "detco_r50_200ep"):
        cfg = load_config(CONFIGS / f"{name}.yaml")
        solver, method, views = cfg.SOLVER, cfg.METHOD, cfg.VIEWS
        assert (solver.BASE_LR, solver.BATCH_SIZE_TOTAL, solver.REFERENCE_BATCH_SIZE) == (0.03, 256, 256)
        assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.SCHEDULE, solver.SCHEDULE_UNIT) == (
            0.9,
            1e-4,
            "cosine",
            "epoch",
        )
        assert (method.QUEUE_SIZE, method.DIM, method.TEMPERATURE, method.EMA_DECAY) == (65536, 128, 0.2, 0.999)
        assert (views.GLOBAL_SIZE, views.GLOBAL_SCALE, views.JITTER) == (224, (0.2, 1.0), (0.4, 0.4, 0.4, 0.1))
        assert (views.JITTER_PROB, views.GREY_PROB, views.BLUR_PROB, views.BLUR_SIGMA) == (0.8, 0.2, 0.5, (0.1, 2.0))
    assert (views.LOCAL_SIZE, views.LOCAL_SCALE, views.PATCH_SIZE) == (255, (0.6, 1.0), 64)
    assert method.STAGE_WEIGHTS == (0.1, 0.4, 0.7, 1.0)


@pytest.mark.parametrize("file", [file for file in COMPLETE if file.stem.startswith("soco")], ids=lambda f: f.stem)
def test_socos_optimisation_is_that_of_the_paper_and_of_its_code(file: Path) -> None:
    cfg = load_config(file)
    solver, method = cfg.SOLVER, cfg.METHOD
    assert (method.DIM, method.EMA_DECAY, method.SYNC_BN) == (256, 0.99, True)
    expected = {"OPTIMIZER": "lars", "TRUST_COEFFICIENT": 0.001, "MOMENTUM": 0.9, "WEIGHT_DECAY": 1e-5}
    expected |= {"SCHEDULE": "cosine", "SCHEDULE_UNIT": "step", "WARMUP_START": 0.01, "FINAL_LR": 1e-6}
    assert {key: solver[key] for key in expected} == expected
    if file in QUICK:
        assert solver.WARMUP_EPOCHS < 1
        assert cfg.SOLVER.PRECISION == "fp32", "in bf16, oneDNN makes NaN gradients in 3x3 convolutions of 1x1 maps"
        return
    assert (solver.BASE_LR, solver.BATCH_SIZE_TOTAL, solver.REFERENCE_BATCH_SIZE, method.HIDDEN) == (1, 2048, 256, 4096)
    assert (solver.WARMUP_EPOCHS, solver.ACCUMULATE_STEPS, solver.PRECISION) == (10, 1, "bf16")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("soco_c4_r50_100ep", {"CROP_SCALE": (0.6, 1.0), "CUTOUT_PROB": 0.5, "BOX_JITTER_PROB": 0.0}),
        ("soco_c4_r50_400ep", {"CROP_SCALE": (0.6, 1.0), "CUTOUT_PROB": 0.5, "BOX_JITTER_PROB": 0.0}),
        ("soco_fpn_r50_100ep", {"CUTOUT_PROB": 0.5, "SMALL_VIEW": "crop", "SHARED_BOXES": False}),
        ("soco_fpn_r50_400ep", {"CUTOUT_PROB": 0.0, "SMALL_VIEW": "crop", "SHARED_BOXES": False}),
        ("soco_fpn_star_r50_400ep", {"CUTOUT_PROB": 0.0, "MEDIUM_SIZE": 192, "SHARED_BOXES": False}),
        ("soco_c4_paper_r50_100ep", {"CROP_SCALE": (0.5, 1.0), "CUTOUT_PROB": 0.0, "BOX_JITTER_PROB": 0.5}),
        ("soco_fpn_paper_r50_100ep", {"CUTOUT_PROB": 0.0, "SMALL_VIEW": "resize", "SHARED_BOXES": True}),
        ("soco_fpn_star_paper_r50_400ep", {"CUTOUT_PROB": 0.0, "MEDIUM_SIZE": 192, "SHARED_BOXES": True}),
    ],
)
def test_socos_views_are_those_of_the_published_weights_or_of_the_paper(name: str, values: dict[str, Any]) -> None:
    cfg = load_config(CONFIGS / f"{name}.yaml")
    is_paper = "paper" in name
    values |= {"CROP_FRAME": "whole", "OUTSIDE_BOXES": "drop"} if is_paper else {"CROP_FRAME": "image"}
    values |= {"BOX_JITTER_RULE": "centre", "BOX_JITTER_VIEWS": "all"} if is_paper else {"OUTSIDE_BOXES": "clip"}
    values |= {"NUM_BOXES": 4, "VIEW_SIZE": 224}
    assert {key: cfg.VIEWS[key] for key in values} == values
    assert cfg.METHOD.get("LEVEL_ROUTING", "own") == ("own" if is_paper or "c4" in name else "all")
    if "c4" not in name:
        assert (cfg.VIEWS.SMALL_SIZE, cfg.VIEWS.LEVEL_MAX_SIZES) == (112, (48, 96, 192, 224))
        assert (cfg.VIEWS.CROP_SCALE, cfg.VIEWS.BOX_JITTER_PROB) == ((0.5, 1.0), 0.5)


def test_every_key_of_socos_method_and_views_is_written_out() -> None:
    for name in SOCO:
        bases = (CONFIGS / f"base/{part}.yaml" for part in ("soco_recipe", "soco_pyramid", name))
        text = "".join(file.read_text() for file in bases)
        cfg = load_config(CONFIGS / f"{name}_r50_100ep.yaml")
        for key in (*cfg.METHOD, *cfg.VIEWS):
            assert f"  {key}: " in text, f"{name}: {key}"


def test_every_line_of_a_published_value_has_a_source() -> None:
    for file in (CONFIGS / "base").glob("*.yaml"):
        for line in file.read_text().splitlines():
            is_value = line.startswith("  ") and line.partition(":")[2].strip()
            assert not is_value or "  # " in line, f"{file.name}: {line}"


def test_help_names_every_method() -> None:
    assert [name for name in METHODS if name not in EPILOG] == []


def test_method_and_view_keys_are_the_constructors_keywords() -> None:
    cfg = load_config(None)
    of_method = inspect.signature(METHODS["detco"]).parameters
    assert {key.lower() for key in cfg.METHOD} - {"name"} == set(of_method)
    assert {key.lower() for key in cfg.VIEWS} == set(inspect.signature(DetCoRecipe).parameters)
    assert of_method["ema_decay"].default == cfg.METHOD.EMA_DECAY


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("SOLVER.LR", "SOLVER.BASE_LR"),
        ("METHOD.QUEUE", "METHOD.QUEUE_SIZE"),
        ("solver.epochs", "SOLVER.EPOCHS"),
        ("DATA.PATH", "DATA.ROOT"),
        ("VIEWS.CROP_SIZE", "VIEWS.PATCH_SIZE"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown config key {key}; did you mean {nearest}\?"):
        load_config(None, [key, "1"])


def test_keys_of_another_method_are_unknown() -> None:
    with pytest.raises(ConfigError, match=r"unknown config key METHOD\.LOCAL"):
        load_config(None, keys(METHOD__NAME="moco_v2", METHOD__LOCAL=True))
    with pytest.raises(ConfigError, match=r"unknown config key VIEWS\.PATCH_SIZE"):
        load_config(None, keys(METHOD__LOCAL=False, VIEWS__PATCH_SIZE=8))
    with pytest.raises(ConfigError, match=r"METHOD\.NAME is 'simclr'; it must be one of detco, moco_v2, soco_c4"):
        load_config(None, keys(METHOD__NAME="simclr"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.EPOCHS", "1.5"], r"SOLVER.EPOCHS is 1.5; it must be an integer"),
        (["SOLVER.EPOCHS", "True"], r"SOLVER.EPOCHS is True; it must be an integer"),
        (["SOLVER.EPOCHS", "0"], r"SOLVER.EPOCHS is 0; it must be at least 1"),
        (["SOLVER.BASE_LR", "fast"], r"SOLVER.BASE_LR is 'fast'; it must be a number"),
        (["SOLVER.SCHEDULE", "linear"], r"SOLVER.SCHEDULE is 'linear'; it must be one of cosine, constant"),
        (["METHOD.LOCAL", "1"], r"METHOD.LOCAL is 1; it must be True or False"),
        (["METHOD.STAGE_WEIGHTS", "(1, 'a')"], r"METHOD.STAGE_WEIGHTS is \(1, 'a'\); it must be a list of a number"),
        (["VIEWS.GLOBAL_SIZE", "[64]"], r"VIEWS.GLOBAL_SIZE is \[64\]; it must be an integer"),
        (["METHOD.DIM", "None"], r"METHOD.DIM is None; it must be an integer"),
        (["SOLVER.OPTIMIZER", "adam"], r"SOLVER.OPTIMIZER is 'adam'; it must be one of sgd, lars"),
        (["SOLVER.ACCUMULATE_STEPS", "0"], r"SOLVER.ACCUMULATE_STEPS is 0; it must be at least 1"),
        (["SOLVER.WARMUP_START", "1.5"], r"SOLVER.WARMUP_START is 1.5; it must be at most 1"),
        (["SOLVER.FINAL_LR", "-1"], r"SOLVER.FINAL_LR is -1.0; it must be at least 0"),
        (["SOLVER.EPOCHS"], r"overrides are KEY VALUE pairs, but there are 1 words"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_what_only_the_constructor_knows_is_refused_by_it() -> None:
    with pytest.raises(ValueError, match="patch_order"):
        build_recipe(load_config(None, ["VIEWS.PATCH_ORDER", "sorted"]))


def test_words_become_what_the_annotation_asks_for() -> None:
    words = keys(SOLVER__WEIGHT_DECAY="1e-4", SOLVER__BASE_LR=1, METHOD__HEAD_HIDDEN=64, DATA__ROOT="007")
    cfg = load_config(None, [*words, *keys(METHOD__STAGE_WEIGHTS="[0, 0, 0, 1]", SOLVER__CHANNELS_LAST="false")])
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BASE_LR, cfg.METHOD.HEAD_HIDDEN) == (1e-4, 1.0, 64)
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    assert (cfg.DATA.ROOT, cfg.METHOD.STAGE_WEIGHTS, cfg.SOLVER.CHANNELS_LAST) == ("007", (0.0, 0.0, 0.0, 1.0), False)
    assert load_config(None, keys(METHOD__HEAD_HIDDEN="null")).METHOD.HEAD_HIDDEN is None


def test_a_file_is_a_diff_over_its_bases_and_overrides_come_last(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("SOLVER: {EPOCHS: 3, BASE_LR: 1e-3}\n")
    (tmp_path / "diff.yaml").write_text("_BASE_: base.yaml\nSOLVER: {EPOCHS: 5}\nSEED: 4\n")
    cfg = load_config(tmp_path / "diff.yaml", ["SEED", "9"])
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.BASE_LR, cfg.SEED) == (5, 1e-3, 9)


@pytest.mark.parametrize("text", ["_BASE_: nowhere.yaml\n", "SOLVER: [\n", "", "_BASE_: broken.yaml\n", "- 1\n"])
def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"cannot read the config .*broken\.yaml"):
        load_config(tmp_path / "broken.yaml")
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config(tmp_path / "absent.yaml")


def test_the_config_is_frozen() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        load_config(None).SOLVER.EPOCHS = 3


def test_words_that_yaml_takes_for_truth_values_are_words_where_words_are_wanted(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for word in ("on", "off", "auto"):
        file.write_text(f"SOLVER:\n  COMPILE: {word}\n")
        cfg = load_config(file)
        file.write_text(cfg.dump())
        given, saved = cfg.SOLVER.COMPILE, load_config(file).SOLVER.COMPILE
        assert (given, saved) == (word, word)
    file.write_text("SOLVER:\n  PRECISION: off\n")
    with pytest.raises(ConfigError, match=r"SOLVER\.PRECISION is 'off'; it must be one of bf16, fp32"):
        load_config(file)


def test_the_digest_sees_what_changes_weights_and_nothing_else() -> None:
    cfg = load_config(None)
    for same in (
        keys(OUTPUT_DIR="x", DATA__ROOT="y", DATA__PROPOSALS="z"),
        keys(DATA__NUM_WORKERS=0, LOG__EVERY_STEPS=1),
        keys(CHECKPOINT__KEEP_LAST=9, SOLVER__COMPILE="on"),
    ):
        assert digest(load_config(None, same)) == digest(cfg)
    for other in (keys(SEED=1), keys(METHOD__TEMPERATURE=0.1), keys(VIEWS__BLUR_SIGMA="(0.1, 1.0)")):
        assert digest(load_config(None, other)) != digest(cfg)


def test_differences_name_the_key_and_both_values() -> None:
    saved = load_config(None, keys(METHOD__NAME="moco_v2", SOLVER__EPOCHS=100)).dump()
    lines = differences(saved, load_config(None, keys(DATA__NUM_WORKERS=1)))
    assert "SOLVER.EPOCHS: 100 in the checkpoint, 200 now" in lines
    assert "METHOD.LOCAL: (absent) in the checkpoint, True now" in lines
    assert not [line for line in lines if "NUM_WORKERS" in line]
    assert differences(load_config(None).dump(), load_config(None)) == []


def test_a_saved_config_from_before_a_key_existed_had_its_default() -> None:
    saved = load_config(None).dump()
    for key in ("OPTIMIZER", "WARMUP_EPOCHS", "ACCUMULATE_STEPS"):
        saved = "".join(line for line in saved.splitlines(keepends=True) if f" {key}:" not in line)
    assert differences(saved, load_config(None)) == []
    assert differences(saved, load_config(None, keys(SOLVER__ACCUMULATE_STEPS=2))) == [
        "SOLVER.ACCUMULATE_STEPS: 1 in the checkpoint, 2 now"
    ]
