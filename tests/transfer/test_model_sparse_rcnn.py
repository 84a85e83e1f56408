"""Sparse R-CNN: matching, losses, heads, and the whole detector at a small size."""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)
pytest.importorskip("scipy", reason="Sparse R-CNN needs SciPy: pip install scipy")

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from transfer.config import load_config
from transfer.modeling import register_models
from transfer.modeling.sparse_rcnn.head import Prediction
from transfer.modeling.sparse_rcnn.losses import objects_per_process, set_losses
from transfer.modeling.sparse_rcnn.matcher import HungarianMatcher, Target, Terms, giou, matching_costs
from transfer.preflight import backbone_tensors

pytestmark = pytest.mark.d2

BASE = Path(__file__).parents[2] / "configs/transfer/base/sparse_rcnn.yaml"
TERMS = Terms(class_weight=2.0, l1_weight=5.0, giou_weight=2.0, focal_alpha=0.25, focal_gamma=2.0)
CLASSES, PROPOSALS = 3, 12
SMALL = (
    "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NORM BN "
    f"MODEL.FPN.OUT_CHANNELS 32 MODEL.SPARSE_RCNN.NUM_CLASSES {CLASSES} MODEL.SPARSE_RCNN.NUM_PROPOSALS {PROPOSALS} "
    "MODEL.SPARSE_RCNN.NUM_HEADS 2 MODEL.SPARSE_RCNN.FEEDFORWARD_DIM 64 MODEL.SPARSE_RCNN.DYNAMIC_DIM 8 "
    "TEST.DETECTIONS_PER_IMAGE 20"
)


def small_detector(*overrides: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    register_models()
    return build_model(load_config(BASE, [*SMALL.split(), *overrides]))


def record(width: int, height: int, boxes: list[list[float]], classes: list[int]) -> dict[str, Any]:
    """A grey image with one rectangle per box, as bright as its class."""
    image = torch.full((3, height, width), 100, dtype=torch.uint8)
    for (x1, y1, x2, y2), label in zip(boxes, classes, strict=True):
        image[label, int(y1) : int(y2), int(x1) : int(x2)] = 250
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return {"image": image, "instances": instances, "height": height, "width": width}


def two_images() -> list[dict[str, Any]]:
    return [record(96, 64, [[8, 8, 40, 40], [50, 20, 90, 60]], [0, 2]), record(64, 80, [[10, 30, 60, 70]], [1])]


def random_boxes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Whole-numbered boxes with area inside a square image."""

    def interval() -> list[int]:
        return sorted(torch.randperm(side + 1, generator=generator)[:2].tolist())

    spans = [(*interval(), *interval()) for _ in range(count)]
    return torch.tensor([(x1, y1, x2, y2) for x1, x2, y1, y2 in spans], dtype=torch.float32).reshape(-1, 4)


def random_image(proposals: int, objects: int, seed: int) -> tuple[Tensor, Tensor, Target]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(proposals, CLASSES, generator=generator)
    classes = torch.randint(CLASSES, (objects,), generator=generator)
    target = Target(classes, random_boxes(objects, 16, generator), torch.full((4,), 16.0))
    return logits, random_boxes(proposals, 16, generator), target


def cells(box: Tensor) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = (int(value) for value in box)
    return set(itertools.product(range(x1, x2), range(y1, y2)))


def slow_giou(left: Tensor, right: Tensor) -> float:
    """By counting the unit squares that the boxes consist of."""
    a, b = cells(left), cells(right)
    hull = cells(torch.cat([torch.minimum(left, right)[:2], torch.maximum(left, right)[2:]]))
    return len(a & b) / len(a | b) - len(hull - (a | b)) / len(hull)


def focal(logit: float, *, is_object: bool) -> float:
    score = 1 / (1 + math.exp(-logit))
    if is_object:
        return -0.25 * (1 - score) ** 2 * math.log(score)
    return -0.75 * score**2 * math.log(1 - score)


def slow_cost(logits: Tensor, box: Tensor, label: int, true: Tensor, side: float) -> float:
    logit = float(logits[label])
    distance = sum(abs(float(a) - float(b)) / side for a, b in zip(box, true, strict=True))
    return 2 * (focal(logit, is_object=True) - focal(logit, is_object=False)) + 5 * distance - 2 * slow_giou(box, true)


@pytest.mark.parametrize("seed", range(10))
def test_giou_counts_unit_squares(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = random_boxes(4, 9, generator), random_boxes(3, 9, generator)
    found = giou(left[:, None], right[None])
    for i, j in itertools.product(range(4), range(3)):
        assert found[i, j].item() == pytest.approx(slow_giou(left[i], right[j]), abs=1e-5)


def test_giou_is_one_for_equal_boxes_and_finite_for_points() -> None:
    boxes = random_boxes(5, 50, torch.Generator().manual_seed(0))
    assert torch.allclose(giou(boxes, boxes), torch.ones(5))
    point = torch.tensor([3.0, 3.0, 3.0, 3.0])
    assert giou(point, point).isfinite()
    assert giou(point, boxes).isfinite().all()


@pytest.mark.parametrize(("proposals", "objects"), [(5, 3), (4, 4), (2, 4), (3, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_no_permutation_costs_less_than_the_matching(proposals: int, objects: int, seed: int) -> None:
    logits, boxes, target = random_image(proposals, objects, seed)
    cost = [
        [slow_cost(logits[i], boxes[i], int(target.classes[j]), target.boxes[j], 16) for j in range(objects)]
        for i in range(proposals)
    ]
    assert torch.allclose(matching_costs(logits, boxes, target, TERMS), torch.tensor(cost), atol=1e-4)
    pairs = min(proposals, objects)
    least = min(
        sum(cost[i][j] for i, j in zip(chosen, wanted, strict=True))
        for chosen in itertools.permutations(range(proposals), pairs)
        for wanted in itertools.combinations(range(objects), pairs)
    )
    found_proposals, found_objects = HungarianMatcher(TERMS)(logits, boxes, target)
    assert len(set(found_proposals.tolist())) == len(set(found_objects.tolist())) == pairs
    total = sum(cost[i][j] for i, j in zip(found_proposals.tolist(), found_objects.tolist(), strict=True))
    assert total == pytest.approx(least, abs=1e-5)


def test_an_image_without_objects_has_no_pairs() -> None:
    proposals, objects = HungarianMatcher(TERMS)(*random_image(5, 0, seed=0))
    assert len(proposals) == len(objects) == 0


def test_predictions_that_are_not_finite_are_reported_as_divergence() -> None:
    logits, boxes, target = random_image(4, 2, seed=0)
    boxes[1, 2] = float("inf")
    with pytest.raises(FloatingPointError, match=r"lower SOLVER\.BASE_LR"):
        HungarianMatcher(TERMS)(logits, boxes, target)


def test_without_scipy_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        HungarianMatcher(TERMS)


def test_the_losses_are_the_sums_over_pairs_and_scores_per_object() -> None:
    images = [random_image(5, objects, seed=objects) for objects in (3, 0, 2)]
    logits, boxes, targets = (list(column) for column in zip(*images, strict=True))
    matcher = HungarianMatcher(TERMS)
    found = set_losses(torch.stack(logits), torch.stack(boxes), targets, matcher, num_objects=2.5)
    expected = {"cls": 0.0, "l1": 0.0, "giou": 0.0}
    for of_image in images:
        pairs = {int(i): int(j) for i, j in zip(*matcher(*of_image), strict=True)}
        for i, k in itertools.product(range(5), range(CLASSES)):
            is_object = i in pairs and int(of_image[2].classes[pairs[i]]) == k
            expected["cls"] += 2 * focal(float(of_image[0][i, k]), is_object=is_object) / 2.5
        for i, j in pairs.items():
            expected["l1"] += 5 * float((of_image[1][i] - of_image[2].boxes[j]).abs().sum()) / 16 / 2.5
            expected["giou"] += 2 * (1 - slow_giou(of_image[1][i], of_image[2].boxes[j])) / 2.5
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-4)


def count_objects(rank: int, world_size: int) -> float:
    objects = (5, 0)[rank]
    return objects_per_process([Target(torch.zeros(objects).long(), torch.zeros(objects, 4), torch.ones(4))])


@pytest.mark.dist
def test_the_number_of_objects_is_averaged_over_processes(run_distributed: Any) -> None:
    assert run_distributed(count_objects, 2) == [2.5, 2.5]


def test_the_number_of_objects_is_at_least_one() -> None:
    assert objects_per_process([Target(torch.zeros(0).long(), torch.zeros(0, 4), torch.ones(4))]) == 1


def still(head: Any) -> None:
    """Let a head leave the boxes where they are."""
    torch.nn.init.zeros_(head.bboxes_delta.weight)
    torch.nn.init.zeros_(head.bboxes_delta.bias)


def test_a_head_moves_boxes_by_the_deltas_that_lead_to_the_target() -> None:
    head = small_detector().head.head_series[0]
    source = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    target = torch.tensor([[15.0, 10.0, 85.0, 40.0]])
    still(head)
    deltas = head.box_transform.get_deltas(source, target)
    # Centre 20 -> 50 of width 20 with weight 2; log of width 20 -> 70 with weight 1.
    assert deltas[0, [0, 2]].tolist() == pytest.approx([3.0, math.log(3.5)])
    objects, rois = torch.randn(1, 1, 32), torch.randn(1, 32, 7, 7)
    assert torch.equal(head(objects, source[None], rois)[0].boxes, source[None])
    with torch.no_grad():
        head.bboxes_delta.bias.copy_(deltas[0])
    assert torch.allclose(head(objects, source[None], rois)[0].boxes, target[None], atol=1e-4)
    with torch.no_grad():
        head.bboxes_delta.bias.copy_(torch.tensor([0.0, 0.0, 1000.0, 0.0]))
    x1, _, x2, _ = head(objects, source[None], rois)[0].boxes[0, 0].tolist()
    assert x2 - x1 == pytest.approx(20 * 100000 / 16)


def test_a_proposal_reads_its_own_region_and_attends_to_all_others() -> None:
    head = small_detector().head.head_series[0].eval()
    objects, boxes = torch.randn(2, 4, 32), torch.tensor([0.0, 0.0, 32.0, 32.0]).expand(2, 4, 4)
    rois = torch.randn(8, 32, 7, 7)
    before = head(objects, boxes, rois)[0].logits
    rois[5] += 1  # second image, second proposal
    assert (head(objects, boxes, rois)[0].logits != before).any(dim=-1).nonzero().tolist() == [[1, 1]]
    rois[5] -= 1
    objects[0, 3, :16] += 1  # not all channels: the norm would take a constant away
    changed = (head(objects, boxes, rois)[0].logits - before).abs().amax(dim=-1) > 1e-5
    assert changed.tolist() == [[True] * 4, [False] * 4]


def test_later_heads_send_no_gradient_through_the_boxes() -> None:
    head = small_detector().head
    features = [torch.randn(1, 32, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    boxes = torch.tensor([8.0, 8.0, 40.0, 40.0]).expand(1, PROPOSALS, 4).clone().requires_grad_()
    last: Prediction = head(features, boxes, torch.randn(1, PROPOSALS, 32))[-1]
    last.boxes.sum().backward()
    first, second = head.head_series
    assert boxes.grad is None
    assert first.bboxes_delta.weight.grad is None
    assert first.linear1.weight.grad.abs().sum() > 0  # through the proposals' features
    assert second.bboxes_delta.weight.grad.abs().sum() > 0


def test_training_yields_three_losses_per_head_and_reaches_every_parameter() -> None:
    detector = small_detector()
    losses = detector(two_images())
    assert set(losses) == {f"loss_{name}_{head}" for name in ("cls", "l1", "giou") for head in range(2)}
    sum(losses.values()).backward()
    assert [name for name, value in detector.named_parameters() if value.grad is None] == []
    assert detector.init_proposal_boxes.weight.grad.abs().sum() > 0
    assert detector.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


def test_images_without_objects_give_finite_losses_and_reach_every_parameter() -> None:
    detector = small_detector()
    losses = detector([record(64, 64, [], []), record(96, 64, [], [])])
    assert all(value.isfinite() for value in losses.values())
    assert all(losses[f"loss_{name}_{head}"] == 0 for name in ("l1", "giou") for head in range(2))
    sum(losses.values()).backward()
    # DistributedDataParallel waits for the gradient of every parameter.
    assert [name for name, value in detector.named_parameters() if value.grad is None] == []


def test_two_images_are_learned_by_heart() -> None:
    detector = small_detector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    history = []
    for _ in range(25):
        loss = sum(detector(two_images()).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-3:]) / 3 < 0.5 * history[0]


def test_half_precision_keeps_boxes_and_losses_in_single() -> None:
    detector = small_detector()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(two_images())
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert all(value.isfinite() for value in losses.values())


def test_predictions_are_in_pixels_of_the_original_images() -> None:
    detector = small_detector().eval()
    for head in detector.head.head_series:
        still(head)
    with torch.no_grad():
        detector.init_proposal_boxes.weight.copy_(torch.tensor([0.5, 0.5, 0.25, 0.5]))
        # Of different sizes, so that both are padded; originals twice as large, and three times.
        images = [
            {**record(96, 64, [], []), "width": 192, "height": 128},
            {**record(64, 80, [], []), "width": 192, "height": 240},
        ]
        first, second = (found["instances"] for found in detector(images))
    assert first.image_size == (128, 192)
    assert torch.allclose(first.pred_boxes.tensor, torch.tensor([72.0, 32.0, 120.0, 96.0]).expand(len(first), 4))
    assert torch.allclose(second.pred_boxes.tensor, torch.tensor([72.0, 60.0, 120.0, 180.0]).expand(len(second), 4))


def test_the_best_scores_of_all_boxes_and_classes_are_kept() -> None:
    detector = small_detector().eval()
    for head in detector.head.head_series:
        still(head)
    with torch.no_grad():
        detector.head.head_series[-1].class_logits.bias.copy_(torch.tensor([-9.0, 9.0, 0.0]))
        found = detector([record(64, 64, [], [])])[0]["instances"]
        detector.max_detections = 1000
        everything = detector([record(64, 64, [], [])])[0]["instances"]
    # A box may be of several classes: 12 of class 1, then 8 of class 2.
    assert found.pred_classes.tolist() == [1] * 12 + [2] * 8
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert len(everything) == PROPOSALS * CLASSES


def test_each_score_comes_with_its_own_box() -> None:
    detector = small_detector().eval()
    for head in detector.head.head_series:
        still(head)
    with torch.no_grad():
        sides = torch.linspace(0.2, 0.9, PROPOSALS)
        detector.init_proposal_boxes.weight[:, 2:] = sides[:, None]
        seen: list[Prediction] = []
        detector.head.register_forward_hook(lambda _head, _inputs, predictions: seen.extend(predictions))
        found = detector([record(64, 64, [], [])])[0]["instances"]
    scores = seen[-1].logits[0].sigmoid()
    for box, score, label in zip(found.pred_boxes.tensor, found.scores, found.pred_classes, strict=True):
        proposal = int((64 * sides - (box[2] - box[0])).abs().argmin())
        assert scores[proposal, label] == score


def test_proposals_start_as_the_whole_image_and_classes_at_the_prior() -> None:
    detector = small_detector()
    assert (detector.init_proposal_boxes.weight == torch.tensor([0.5, 0.5, 1.0, 1.0])).all()
    for head in detector.head.head_series:
        assert head.class_logits.bias.sigmoid().tolist() == pytest.approx([0.01] * CLASSES)


def test_the_published_model_has_106_million_parameters_and_the_published_names() -> None:
    register_models()
    detector = build_model(load_config(BASE, ["MODEL.DEVICE", "cpu"]))
    names = list(detector.state_dict())
    assert sum(value.numel() for value in detector.parameters()) == 106_342_888
    assert len(backbone_tensors(names)) == 265
    linear = ["self_attn.out_proj", "linear1", "linear2", "class_logits", "bboxes_delta"]
    linear += ["inst_interact.dynamic_layer", "inst_interact.out_layer"]
    norms = ["norm1", "norm2", "norm3", "inst_interact.norm1", "inst_interact.norm2", "inst_interact.norm3"]
    norms += ["cls_module.1", "reg_module.1", "reg_module.4", "reg_module.7"]
    published = {f"{layer}.{kind}" for layer in linear + norms for kind in ("weight", "bias")}
    published |= {"self_attn.in_proj_weight", "self_attn.in_proj_bias", "cls_module.0.weight"}
    published |= {f"reg_module.{index}.weight" for index in (0, 3, 6)}
    rest = {"init_proposal_boxes.weight", "init_proposal_features.weight"}
    expected = {f"head.head_series.{head}.{name}" for head in range(6) for name in published} | rest
    assert {name for name in names if not name.startswith("backbone.")} == expected
