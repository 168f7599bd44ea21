"""Weak-to-strong consistency: what the segmenter is sure of on a slice must hold when the slice is changed strongly.

Source: FixMatch (Sohn et al., NeurIPS 2020); for segmentation UniMatch (Yang et al., CVPR 2023), its medical scenario:
confidence 0.95, intensity changes, blur and CutMix. The teacher is a running average as in mean teacher (Tarvainen and
Valpola, NeurIPS 2017).
*Deviation* from UniMatch: one strong view, not two, no dropped features, pixel-wise cross-entropy on the pseudo-labels,
not Dice; a teacher of averaged weights, not the network of the step.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from clseg.augment import cutmix_boxes, strong_view
from clseg.loop import Training, Work
from clseg.recipes.average import follow, ramp_up
from clseg.recipes.supervised import drawn_batch, drawn_images, semi_supervised_loss
from clseg.settings import WeakToStrongRecipe


def pseudo_labels(logits: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """The most probable class of each pixel [B, ...] int64, and whether its probability is `confidence` or more, bool;
    logits: [B, K, ...]."""
    probability, label = logits.float().softmax(dim=1).max(dim=1)
    return label, probability >= confidence


def consistency_loss(logits: Tensor, label: Tensor, sure: Tensor) -> Tensor:
    """Cross-entropy of the pseudo-labels that are sure, summed over pixels and divided by the number of all pixels."""
    return (F.cross_entropy(logits.float(), label, reduction="none") * sure).mean()


def weak_to_strong(work: Work, recipe: WeakToStrongRecipe) -> Training:
    """L(labelled) + weight * mean over pixels of [p(y) >= confidence] CE(student(strong view), y).

    y, p: class and probability that the teacher gives a weakly changed slice without label (the geometric augmentation
    of the labelled ones). The strong view of it has other intensities and boxes of other slices, whose pseudo-labels
    come along. As many slices of each. The weight grows over `ramp` of the steps. `network` is the teacher, the average
    of the student's weights with decay `average` (0: the student of the step before). It sees a slice with its running
    averages of batch norm, those of the student averaged; or, with `statistics` "batch", with the statistics of the
    batch, whose running averages it then keeps. Raises `RequestError` without unlabelled slices.
    """
    segmentation_loss = semi_supervised_loss(work, recipe)
    network, student = work.network, deepcopy(work.network)

    def draw(step: int) -> list[Tensor]:
        generator = work.generator("weak_to_strong", step)
        image, label = drawn_batch(work, work.rows, recipe, generator)
        weak = drawn_images(work, work.unlabelled, recipe, generator)
        strong, box = strong_view(weak, generator), cutmix_boxes(weak, generator)
        other = torch.randperm(len(weak), generator=generator)  # whose pixels a box takes
        follow(network, student, recipe.average, step, statistics=recipe.statistics == "running")
        weight = torch.tensor(recipe.weight * ramp_up(step, recipe.ramp * work.steps))
        return [image, label, weak, strong, *(tensor.to(work.device) for tensor in (box, other, weight))]

    def loss(
        image: Tensor, label: Tensor, weak: Tensor, strong: Tensor, box: Tensor, other: Tensor, weight: Tensor
    ) -> Tensor:
        with torch.no_grad():
            teacher = network.train(recipe.statistics == "batch")
            guess, sure = pseudo_labels(teacher(weak), recipe.confidence)
        strong = torch.where(box[:, None], strong[other], strong)
        guess, sure = torch.where(box, guess[other], guess), torch.where(box, sure[other], sure)
        return segmentation_loss(student(image), label) + weight * consistency_loss(student(strong), guess, sure)

    return Training({"student": student}, draw, loss)
