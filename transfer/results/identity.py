"""Which published row our weights correspond to, by rules kept in names.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from transfer.results.reference import SUPERVISED, Published
from transfer.results.runs import Run

SCHEMA = 1
NAMES_FILE = Path(__file__).with_name("names.yaml")


@dataclass(frozen=True)
class Identity:
    """What our weights are.

    Attributes:
        pretrain_method: Name in the publications, None if the rules know none.
        variant: "plain" or "AA" for DetCo, else None.
        epochs: Epochs of pretraining, a fraction if it was cut short; None if unknown or not applicable.
        obstacle: Why the weights must not be compared with the published ones of that name; None if they may.
    """

    pretrain_method: str | None
    variant: str | None
    epochs: float | None
    obstacle: str | None

    @property
    def is_supervised(self) -> bool:
        """Whether the weights are a supervised ImageNet baseline."""
        return self.pretrain_method is not None and self.pretrain_method.startswith(SUPERVISED)

    def names(self, row: Published) -> bool:
        """Whether a published row is of the same method and variant, after as many epochs."""
        same_method = (row.pretrain_method, row.variant) == (self.pretrain_method, self.variant)
        return same_method and self.epochs in (None, row.pretrain_epochs)


@lru_cache(maxsize=1)
def load_names(path: Path = NAMES_FILE) -> Mapping[str, Any]:
    """Read the naming rules.

    Raises:
        ValueError: If the file has another schema.
    """
    data: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} has schema {data.get('schema')!r}, this program reads {SCHEMA}")
    return data


def identify(run: Run) -> Identity:
    """Return what the weights of a run are called in the publications, and whether a comparison with those is fair."""
    names = load_names()
    path = run.weights_path.split("?")[0]
    for known in names["weights"]:
        if path == known["path"] and _is_so(known.get("when", {}), run):
            return Identity(known["published"]["pretrain_method"], None, None, None)
    epochs = _epochs(run.provenance)
    method = setting(run.provenance, "method")
    if method is None:
        return Identity(None, None, epochs, "the weights file does not say how it was pretrained")
    needed = dict.fromkeys(name for rule in names["rules"] for name in rule["ours"] if name not in names["defaults"])
    if lacking := [name for name in needed if setting(run.provenance, name) is None]:
        if not isinstance(run.provenance.get("dataset"), Mapping):  # not of this suite, whose weights name it
            return _released(run, str(method), epochs, names)
        return Identity(None, None, epochs, f"the weights file does not say {' and '.join(lacking)}")
    for rule in names["rules"]:
        if _holds(rule["ours"], run.provenance, names["defaults"]):
            published = rule["published"]
            obstacle = _obstacle(str(method), epochs, run.provenance, names)
            return Identity(published["pretrain_method"], published.get("variant"), epochs, obstacle)
    return Identity(None, None, epochs, f"no published row is known for method {method!r} with these settings")


def _released(run: Run, method: str, epochs: float | None, names: Mapping[str, Any]) -> Identity:
    """Return what a released checkpoint of another project is called, comparable only if its user vouches for it."""
    for rule in names["released"]:
        if _holds(rule["ours"], run.provenance, {}) and _is_so(rule.get("when", {}), run):
            word = names["vouched_by"]
            obstacle = None
            if epochs is None:
                obstacle = "the checkpoint does not say for how many epochs it was pretrained"
            elif word.lower() not in run.label.lower():
                obstacle = f"the checkpoint does not say on which images it was pretrained, and the label not {word!r}"
            return Identity(rule["published"]["pretrain_method"], None, epochs, obstacle)
    return Identity(None, None, epochs, f"no published row is known for a released checkpoint of method {method!r}")


def _is_so(when: Mapping[str, Any], run: Run) -> bool:
    """Whether task, recipe and weight decay of a run are as a rule wants them."""
    facts = {"task": run.task, "recipe": run.recipe, "weight_decay": run.schedule.get("weight_decay")}
    return all(facts[name] == value for name, value in when.items())


def setting(provenance: Mapping[str, Any], name: str) -> Any:
    """Return a setting of the pretraining, None if the provenance lacks it.

    It is looked for at the top and in the records one level below (method and view options); the case of keys does not
    matter, since configuration keys are upper case.
    """
    nested = [value for value in provenance.values() if isinstance(value, Mapping)]
    for record in (provenance, *nested):
        for key, value in record.items():
            if str(key).lower() == name and value is not None and not isinstance(value, Mapping):
                return value
    return None


def _epochs(provenance: Mapping[str, Any]) -> float | None:
    epochs = setting(provenance, "epochs")
    return None if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) else epochs


def _holds(ours: Mapping[str, Any], provenance: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether the provenance has all settings of a rule."""
    for name, expected in ours.items():
        value = setting(provenance, name)
        if (defaults.get(name) if value is None else value) != expected:
            return False
    return True


def _obstacle(method: str, epochs: float | None, provenance: Mapping[str, Any], names: Mapping[str, Any]) -> str | None:
    """Return why weights of a published method are not comparable with the published ones, None if they are."""
    if epochs is None:
        return "the weights file does not say for how many epochs it was pretrained"
    dataset = provenance.get("dataset")
    images = dataset.get("images") if isinstance(dataset, Mapping) else None
    expected_images = names["pretraining_images"]
    if not isinstance(images, int):
        return "the weights file does not say on how many images it was pretrained"
    if images != expected_images:
        return f"pretrained on {images:,} images, the published weights on the {expected_images:,} of ImageNet-1k"
    for option, expected in names["published_options"].get(method, {}).items():
        value = setting(provenance, option)
        value = list(value) if isinstance(value, tuple) else value
        if value is not None and value != expected:
            return f"pretrained with {option} {value}, the published weights with {expected}"
    return None
