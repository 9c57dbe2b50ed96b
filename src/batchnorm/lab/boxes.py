"""Boxes (N, 4) as left, top, right, bottom in pixels: overlap, encoding for a network, and evaluation of detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from batchnorm.errors import InputError

ENOUGH = 0.5  # the smallest overlap at which a detection counts


@dataclass(frozen=True)
class Labeled:
    """Boxes (N, 4) of one image with their classes (N,), and for detections their scores (N,)."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every box (N, 4) with every other (M, 4): (N, M)."""
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    sizes, other_sizes = ((corners[:, 2:] - corners[:, :2]).prod(-1) for corners in (boxes, others))
    return common / (sizes[:, None] + other_sizes[None] - common)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Encode boxes relative to anchors, (N, 4): shift of the center in anchor sizes, logarithm of the scale (Girshick et al. 2014)."""
    size, anchor_size = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2
    return torch.cat([shift / anchor_size, (size / anchor_size).log()], 1)


def decode(changes: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `encode`; the scale is limited to between 1/4.5 and 4.5."""
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    center = (anchors[:, :2] + anchors[:, 2:]) / 2 + changes[:, :2] * anchor_size
    half = anchor_size * changes[:, 2:].clamp(-1.5, 1.5).exp() / 2
    return torch.cat([center - half, center + half], 1)


def strongest(boxes: Tensor, scores: Tensor, limit: float = ENOUGH) -> Tensor:
    """Non-maximum suppression: indices, best first, of the boxes that overlap no better box by more than `limit`."""
    close = (overlaps(boxes, boxes) > limit).tolist()
    chosen: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if not any(close[index][better] for better in chosen):
            chosen.append(index)
    return torch.tensor(chosen, dtype=torch.int64)


def mean_average_precision(found: Sequence[Labeled], truth: Sequence[Labeled]) -> float:
    """The mean over classes of the area under the envelope of precision over recall, at an overlap of .5 (VOC 2010 on).

    Raises:
        InputError: the numbers of images differ, or there is no object at all.
    """
    classes = torch.cat([image.labels for image in truth]).unique().tolist() if truth else []
    if len(found) != len(truth) or not classes:
        raise InputError(
            f"detections and truth must be of the same images, with objects; got {len(found)} and {len(truth)} "
            f"images and {len(classes)} classes"
        )
    return fmean(_average_precision(found, truth, label) for label in classes)


def _average_precision(found: Sequence[Labeled], truth: Sequence[Labeled], label: int) -> float:
    scored: list[tuple[float, bool]] = []
    objects = 0
    for detections, image in zip(found, truth, strict=True):
        there = image.boxes[image.labels == label]
        objects += len(there)
        assert detections.scores is not None, "detections have scores"
        mine = detections.labels == label
        scores = detections.scores[mine]
        match = overlaps(detections.boxes[mine], there)  # (detections, objects)
        taken: set[int] = set()
        for index in scores.argsort(descending=True).tolist():
            best = int(match[index].argmax()) if len(there) else -1
            hit = best >= 0 and float(match[index, best]) >= ENOUGH and best not in taken
            taken |= {best} if hit else set()
            scored.append((float(scores[index]), hit))
    if not scored:
        return 0.0
    scored.sort(key=lambda pair: -pair[0])
    hits = torch.tensor([hit for _, hit in scored]).cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    recall = torch.cat([torch.zeros(1), hits / objects])
    return float((recall.diff() * envelope).sum())
