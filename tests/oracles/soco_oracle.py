"""SoCo and BYOL restated for one process, image by image and box by box. Slow, obvious, shares no code with the suite.

Sources: SoCo, arXiv:2106.02637, Sec. 3.3 and 3.4 (Eq. 1 to 6), with the layers of hologerry/SoCo@624a70d
contrast/models/; BYOL, arXiv:2006.07733, Sec. 3.1.
"""

from collections.abc import Mapping, Sequence

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

C4_CELLS = 14
"""Side of what RoIAlign makes of a box for res5."""


class Network:
    """Online network with predictor, or target without, from given weights. BatchNorm uses the statistics of each call.

    level_routing: "all" (what follows RoIAlign runs once per level, on all boxes), "own" (once, with each box from its
    own level), None: SoCo-C4.
    """

    def __init__(self, weights: Mapping[str, Tensor], level_routing: str | None) -> None:
        self.w = {name: value.detach().clone() for name, value in weights.items()}
        self.level_routing = level_routing
        self.resnet = resnet50(below("backbone.", self.w))

    def watch(self) -> dict[str, Tensor]:
        """Every parameter under its name, now with gradient."""
        of_resnet = {f"backbone.{name}": value for name, value in self.resnet.named_parameters()}
        others = {n: v for n, v in self.w.items() if v.is_floating_point() and "running" not in n}
        for name in of_resnet:
            del others[name]
        for value in others.values():
            value.requires_grad_()
        return of_resnet | others

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps with RoIs: [C4], or [P2, P3, P4, P5]."""
        r = self.resnet
        c2 = r.layer1(r.maxpool(r.relu(r.bn1(r.conv1(images)))))
        c3 = r.layer2(c2)
        c4 = r.layer3(c3)
        if self.level_routing is None:
            return [c4]
        c5 = r.layer4(c4)
        inner = [self.conv_bn(f"fpn.lateral_convs.{i}", c) for i, c in enumerate((c2, c3, c4, c5))]
        for finer in (2, 1, 0):
            height, width = inner[finer].shape[2:]
            inner[finer] = inner[finer] + F.interpolate(inner[finer + 1], size=(height, width), mode="nearest")
        return [self.conv_bn(f"fpn.fpn_convs.{i}", m) for i, m in enumerate(inner)]

    def embed(self, maps: list[Tensor], boxes_view: Tensor, levels: Tensor) -> list[list[Tensor]]:
        """A vector for every box of every image. A box without a level (-1) is looked at on the last one."""
        num_images, num_boxes = levels.shape
        places = [(n, k) for n in range(num_images) for k in range(num_boxes)]
        if self.level_routing is None:
            vectors = self.mlps(self.res5([cut(maps[0], n, boxes_view[n, k], C4_CELLS) for n, k in places]))
        elif self.level_routing == "own":
            rois = [cut(maps[int(levels[n, k])], n, boxes_view[n, k], 7) for n, k in places]
            vectors = self.mlps(self.box_head(rois))
        else:
            of_level = []
            for level in range(4):
                rois = [cut(maps[level], n, boxes_view[n, k], 7) for n, k in places]
                of_level.append(self.mlps(self.box_head(rois)))
            vectors = torch.stack([of_level[int(levels[n, k])][i] for i, (n, k) in enumerate(places)])
        return [[vectors[n * num_boxes + k] for k in range(num_boxes)] for n in range(num_images)]

    def res5(self, rois: list[Tensor]) -> Tensor:
        return self.resnet.layer4(torch.stack(rois)).mean(dim=(2, 3))

    def mlps(self, x: Tensor) -> Tensor:
        """Projector and, in the online network, predictor."""
        x = self.mlp("projector", x)
        return self.mlp("predictor", x) if "predictor.0.weight" in self.w else x

    def box_head(self, rois: list[Tensor]) -> Tensor:
        x = torch.stack(rois)
        for i in (1, 2, 3, 4):
            x = F.conv2d(x, self.w[f"box_head.conv{i}.weight"], padding=1)
            x = F.relu(self.batch_norm(f"box_head.bn{i}", x))
        return F.relu(F.linear(x.flatten(1), self.w["box_head.fc1.weight"], self.w["box_head.fc1.bias"]))

    def conv_bn(self, name: str, x: Tensor) -> Tensor:
        kernel = self.w[f"{name}.conv.weight"]
        return self.batch_norm(f"{name}.bn", F.conv2d(x, kernel, padding=kernel.shape[-1] // 2))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """Linear, BatchNorm, ReLU, Linear."""
        x = F.linear(x, self.w[f"{name}.0.weight"], self.w[f"{name}.0.bias"])
        x = F.relu(self.batch_norm(f"{name}.1", x))
        return F.linear(x, self.w[f"{name}.3.weight"], self.w[f"{name}.3.bias"])

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.w[f"{name}.weight"], self.w[f"{name}.bias"], training=True)


def below(start: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def resnet50(weights: Mapping[str, Tensor]) -> nn.Module:
    """torchvision's, without its classifier, around these very tensors."""
    with torch.device("meta"):  # no time is spent on initial weights
        resnet = torchvision.models.resnet50()
    resnet.fc = nn.Identity()
    resnet.load_state_dict(weights, assign=True)
    return resnet


def cut(maps: Tensor, image: int, box_view: Tensor, size: int) -> Tensor:
    """RoIAlign of one box, given in fractions of the view, on one image's feature map."""
    height, width = maps.shape[2:]
    x1, y1, x2, y2 = box_view.tolist()
    roi = torch.tensor([[0, x1 * width, y1 * height, x2 * width, y2 * height]], dtype=maps.dtype)
    return roi_align(maps[image : image + 1], roi, size, spatial_scale=1.0, sampling_ratio=-1, aligned=True)[0]


def soco_loss(online: Network, target: Network, whole: Tensor, pairs: Sequence) -> Tensor:
    """Sum over pairs (whole, other) of both directions; a pair has `image`, `boxes` and `boxes_in_whole`."""
    total = torch.zeros((), dtype=whole.dtype)
    whole_online = online.maps(whole)
    with torch.no_grad():
        whole_target = target.maps(whole)
    for pair in pairs:
        a, b = pair.boxes_in_whole, pair.boxes
        predicted_a = online.embed(whole_online, a.boxes_view, a.levels)
        predicted_b = online.embed(online.maps(pair.image), b.boxes_view, b.levels)
        with torch.no_grad():
            target_a = target.embed(whole_target, a.boxes_view, a.levels)
            target_b = target.embed(target.maps(pair.image), b.boxes_view, b.levels)
        total = total + one_direction(predicted_a, a, target_b, b) + one_direction(predicted_b, b, target_a, a)
    return total


def one_direction(predictions, boxes, targets, target_boxes) -> Tensor:
    """-2 * mean over images of the mean over its matching boxes of cosines."""
    of_images = []
    for n in range(len(predictions)):
        cosines = []
        for i, prediction in enumerate(predictions[n]):
            for j, target in enumerate(targets[n]):
                is_assigned = boxes.levels[n, i] >= 0 and target_boxes.levels[n, j] >= 0
                if is_assigned and boxes.ids[n, i] == target_boxes.ids[n, j]:
                    cosines.append((prediction @ target) / (prediction.norm() * target.norm()))
        of_images.append(sum(cosines) / len(cosines) if cosines else predictions[n][0].sum() * 0)
    return -2 * sum(of_images) / len(of_images)


class BYOLOracle:
    """theta: encoder f (a ResNet), projector g, predictor q; xi: target f and g."""

    def __init__(self, f: nn.Module, g: nn.Module, q: nn.Module, f_xi: nn.Module, g_xi: nn.Module, lr: float) -> None:
        self.f, self.g, self.q, self.f_xi, self.g_xi = f, g, q, f_xi, g_xi
        self.online = [*f.parameters(), *g.parameters()]
        self.optimiser = torch.optim.SGD([*self.online, *q.parameters()], lr=lr, momentum=0.9)

    def step(self, v: Tensor, v_prime: Tensor, tau: float) -> float:
        """One iteration on two views of N images; returns the loss (Eq. 2, symmetrised). The target moves first."""
        with torch.no_grad():
            for xi, theta in zip([*self.f_xi.parameters(), *self.g_xi.parameters()], self.online, strict=True):
                xi.copy_(tau * xi + (1 - tau) * theta)
            z_xi, z_xi_prime = self.g_xi(represent(self.f_xi, v)), self.g_xi(represent(self.f_xi, v_prime))
        q, q_prime = self.q(self.g(represent(self.f, v))), self.q(self.g(represent(self.f, v_prime)))
        loss = squared_distance(q, z_xi_prime) + squared_distance(q_prime, z_xi)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.item()


def represent(resnet: nn.Module, images: Tensor) -> Tensor:
    """Globally averaged features."""
    x = resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images)))))
    return resnet.layer4(resnet.layer3(resnet.layer2(x))).mean(dim=(2, 3))


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over images of the squared distance of the vectors scaled to unit length."""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean()
