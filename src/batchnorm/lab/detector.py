"""A small two-stage detector after Faster R-CNN (Ren et al. 2015, arXiv:1506.01497): it proposes regions, then classifies them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.boxes import ENOUGH, Labeled, decode, encode, overlaps, strongest
from batchnorm.lab.data import canvases
from batchnorm.layers import BatchNorm1d, BatchNorm2d

WIDTH = 16  # channels of the first layers; twice as many later
CELLS, ANCHOR = 16, 17.0  # one anchor of 17 pixels for each cell of 4 pixels
PROPOSALS = 12  # regions of an image that are classified
NOTHING = 10  # the class of a region without a digit


def anchors() -> Tensor:
    """A square around each of 16x16 cells, (256, 4): left, top, right, bottom."""
    centers = torch.arange(CELLS) * 4 + 2.0
    x, y = centers.repeat(CELLS), centers.repeat_interleave(CELLS)
    return torch.stack([x, y, x, y], 1) + torch.tensor([-1, -1, 1, 1]) * ANCHOR / 2


class Detector(nn.Module):
    """A backbone for features, a proposal network, and a region classifier."""

    def __init__(self, backbone: bool, proposals: bool, regions: bool) -> None:
        """The arguments say which of the three have batch normalization."""
        super().__init__()
        C = 2 * WIDTH

        def layer(inputs: int, outputs: int, stride: int, batch_norm: bool) -> list[nn.Module]:
            normalization = BatchNorm2d(outputs) if batch_norm else nn.Identity()
            return [nn.Conv2d(inputs, outputs, 3, stride, 1), normalization, nn.ReLU()]

        sizes = [(1, WIDTH, 1), (WIDTH, WIDTH, 2), (WIDTH, C, 1), (C, C, 2), (C, C, 1), (C, C, 1)]
        self.backbone = nn.Sequential(*(module for size in sizes for module in layer(*size, backbone)))
        self.proposals = nn.Sequential(*layer(C, C, 1, proposals), nn.Conv2d(C, 5, 1))
        self.regions = nn.Sequential(
            *layer(C, C, 1, regions),
            *layer(C, C, 2, regions),
            *(nn.Flatten(), nn.Linear(C * 9, 64), BatchNorm1d(64) if regions else nn.Identity(), nn.ReLU()),
            nn.Linear(64, NOTHING + 1),
        )
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 1, 64, 64) to features (N, C, 16, 16), scores of anchors (N, 256), and changes to boxes (N, 256, 4)."""
        features = self.backbone(images)
        proposed = self.proposals(features).flatten(2).mT  # (N, 256, 5)
        return features, proposed[..., 0], proposed[..., 1:]

    def classify(self, features: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
        """Class scores (M, 11) of boxes (M, 4), from 6x6 points of the features in each; `image` (M,) has the number of its image."""
        steps = (torch.arange(6) + 0.5) / 6
        points = boxes[:, None, :2] + (boxes[:, 2:] - boxes[:, :2])[:, None] * steps[None, :, None]  # (M, 6, 2)
        x, y = points[:, None, :, 0].expand(-1, 6, 6), points[:, :, None, 1].expand(-1, 6, 6)
        grid = torch.stack([x, y], -1) / canvases.SIZE * 2 - 1
        return self.regions(F.grid_sample(features[image], grid, align_corners=False))


def wanted(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Targets of anchors: 1 for a digit, 0 for none, -1 for undecided (256,); and changes to the box of the nearest digit (256, 4)."""
    match = overlaps(anchors(), boxes)
    value, nearest = match.max(1)
    kind = torch.where(value < 0.3, 0.0, torch.where(value < ENOUGH, -1.0, 1.0))
    best = match.argmax(0)  # every digit has at least its best anchor
    kind[best], nearest[best] = 1.0, torch.arange(len(boxes))
    return kind, encode(boxes[nearest], anchors())


def candidates(truth: Labeled, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training regions with their classes, (3n, 4): for each digit, two boxes shifted by up to 2 pixels and one random box."""
    count = len(truth.boxes)
    shifted = truth.boxes.repeat(2, 1) + torch.empty(2 * count, 4).uniform_(-2, 2, generator=generator)
    corner = torch.empty(count, 2).uniform_(0, 46, generator=generator)
    anywhere = torch.cat([corner, corner + torch.empty(count, 1).uniform_(12, 22, generator=generator)], 1)
    boxes = torch.cat([shifted, anywhere])
    value, nearest = overlaps(boxes, truth.boxes).max(1)
    return boxes, torch.where(value >= ENOUGH, truth.labels[nearest], NOTHING)


def loss(detector: Detector, images: Tensor, objects: list[Labeled], generator: torch.Generator) -> Tensor:
    """The sum of the losses of proposals, of their boxes, and of the classes of regions."""
    features, scores, changes = detector(images)
    kinds, targets = map(torch.stack, zip(*(wanted(truth.boxes) for truth in objects), strict=True))
    there, empty = kinds == 1, kinds == 0
    proposing = F.softplus(-scores[there]).mean() + F.softplus(scores[empty]).mean()  # both kinds have equal weight
    placing = F.smooth_l1_loss(changes[there], targets[there], beta=0.1)
    boxes, labels = zip(*(candidates(truth, generator) for truth in objects), strict=True)
    image = torch.arange(len(objects)).repeat_interleave(torch.tensor([len(each) for each in boxes]))
    return (
        proposing + placing + F.cross_entropy(detector.classify(features, image, torch.cat(boxes)), torch.cat(labels))
    )


@torch.no_grad()
def detect(detector: Detector, images: Tensor) -> tuple[list[Labeled], list[Tensor]]:
    """Detections for each image in inference, and the proposals (at most 12, 4) that they are based on."""
    detector.eval()
    features, scores, changes = detector(images)
    found, proposed = [], []
    for number in range(len(images)):
        top = scores[number].topk(40).indices
        boxes = decode(changes[number, top], anchors()[top]).clamp(0, canvases.SIZE)
        large = ((boxes[:, 2:] - boxes[:, :2]) > 3).all(1)
        boxes, trust = boxes[large], scores[number, top][large].sigmoid()
        chosen = strongest(boxes, trust)[:PROPOSALS]
        boxes, trust = boxes[chosen], trust[chosen]
        shares = detector.classify(features, torch.full((len(chosen),), number), boxes).softmax(1)[:, :NOTHING]
        likely = (shares * trust[:, None]).flatten()  # a box may be detected with several classes
        some = likely > 0.02
        labels = torch.arange(NOTHING).repeat(len(boxes))
        found.append(Labeled(boxes.repeat_interleave(NOTHING, 0)[some], labels[some], likely[some]))
        proposed.append(boxes)
    return found, proposed
