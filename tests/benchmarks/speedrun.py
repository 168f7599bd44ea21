"""Minutes from files to a segmenter that is good enough, beside a plain MONAI script on the same patients and cores.

Development patients of ACDC, whom nobody is tested on: 20 validate, 1, 8 or all 45 others carry labels. Three draws,
two seeds. The clock runs from the files to the first validation that reaches the Dice, validations included. What never
reaches it counts with all its minutes, and its row says how often it did.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from unittest import mock

import monai.transforms as mt
import numpy as np
import torch
from common import FEW, Row, against, temporary_root
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from monai.utils import set_determinism

from clseg import paths, train
from clseg.data import formats
from clseg.data.prepare import prepare
from clseg.data.splits import make_split
from clseg.metrics import volume_dice
from clseg.study.bf16 import arithmetic
from clseg.study.parameters import resolve

TITLE = "minutes from files to a validation Dice, ACDC's development patients, two cores"
GOAL = "no more minutes than a plain MONAI script; .75 with 1 labelled, .82 with 8, .86 with all"
PEERS = ["monai"]
NOTES = ["two threads; a run that never reaches the Dice counts with all its minutes"]
EVERYONE = 45
TARGETS = {1: 0.75, 8: 0.82, EVERYONE: 0.86}
REAL = {"dataset": "acdc", "profile": "laptop", "protocol": "development", "overrides": ["precision=bf16"]}
QUICK = {"dataset": "phantom", "profile": "smoke", "protocol": "seeded", "overrides": FEW}
BATCH, EVERY = 12, 50  # slices; steps from one validation to the next


class _Reached(Exception):
    """The validation Dice is there: nothing more needs to be trained."""


def _watched(score: Callable[..., float], target: float) -> Callable[..., float]:
    def validate(*arguments: object) -> float:
        if (found := score(*arguments)) >= target:
            raise _Reached
        return found

    return validate


def ours(experiment, split, seed: int, steps: int, every: int, target: float) -> bool:
    """What the laptop profile does; whether it reached the Dice."""
    store = prepare(experiment.dataset, experiment.geometry, progress=False)
    about = {"network": experiment.network, "batch": BATCH, "seed": seed, "precision": experiment.precision}
    about |= {
        "unlabelled": sorted({*split.pretrain} - {*split.labelled}),
        "validation": split.test,
        "validate_every": every,
    }
    with (
        arithmetic(experiment.precision),
        mock.patch.object(train, "validation_dice", _watched(train.validation_dice, target)),
    ):
        try:
            train.finetune(store, split.labelled, experiment.recipe, steps, **about)
        except _Reached:
            return True
    return False


def _slices(experiment, subjects: Iterable[str]) -> Iterator[list[dict]]:
    """Of every volume its slices on the grid of the study, made by MONAI; files are read as ours reads them."""
    (height, width), step = experiment.geometry.size, round(experiment.geometry.step_px)
    keys = ["image", "label"]
    whole = mt.Compose(
        [
            mt.ScaleIntensityRangePercentilesd("image", 1, 99, 0, 1),
            mt.ResizeWithPadOrCropd(keys, (-1, height * step, width * step)),
            mt.Resized(keys, (-1, height, width), mode=("area", "nearest")),
        ]
    )
    for ref in formats.scan(experiment.dataset):
        if ref.subject in subjects:
            volume = formats.read(ref, experiment.dataset)
            made = whole(
                {"image": torch.from_numpy(volume.image.copy()), "label": torch.from_numpy(volume.label[None])}
            )
            yield [{key: made[key].as_tensor()[:, z] for key in keys} for z in range(made["image"].shape[1])]


def plain_monai(experiment, split, seed: int, steps: int, every: int, target: float) -> bool:
    """As MONAI's tutorials train a network; whether it reached the Dice."""
    set_determinism(seed)
    keys, modes = ["image", "label"], ("bilinear", "nearest")
    random = mt.Compose(
        [
            mt.RandRotated(keys, 0.26, prob=0.5, mode=modes, padding_mode="zeros"),
            mt.RandZoomd(keys, min_zoom=0.9, max_zoom=1.1, prob=0.5, mode=modes),
            mt.RandFlipd(keys, prob=0.5, spatial_axis=1),
            mt.RandScaleIntensityd("image", 0.2, prob=0.5),
            mt.RandShiftIntensityd("image", 0.1, prob=0.5),
        ]
    )
    labelled = [one for volume in _slices(experiment, split.labelled) for one in volume]
    validation = list(_slices(experiment, split.test))
    loader = DataLoader(CacheDataset(labelled, random, progress=False), batch_size=BATCH, shuffle=True)
    classes = int(max(one["label"].max() for volume in validation for one in volume))
    network = BasicUNet(spatial_dims=2, in_channels=1, out_channels=classes + 1)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    step = 0
    while step < steps:
        for batch in loader:
            network.train()
            optimiser.zero_grad()
            criterion(network(batch["image"]), batch["label"]).backward()
            optimiser.step()
            step += 1
            if (step % every == 0 or step == steps) and _monai_dice(network, validation, classes) >= target:
                return True
            if step == steps:
                break
    return False


@torch.inference_mode()
def _monai_dice(network, volumes: list[list[dict]], classes: int) -> float:
    network.eval()
    found = []
    for volume in volumes:
        predicted = network(torch.stack([one["image"] for one in volume])).argmax(1).numpy()
        reference = np.stack([one["label"][0].numpy() for one in volume])
        found.append(volume_dice(predicted, reference.astype(np.uint8), range(1, classes + 1)))
    return float(np.mean(found))


def _split(experiment, labelled: int, draw: int):
    """The subjects of a cell. EVERYONE: those of pre-training; the other sets do not depend on the number."""
    subjects = formats.listed(experiment.dataset)
    number = min(labelled, 8)
    split = make_split(experiment.division, subjects.subjects, subjects.labelled_subjects, number, draw)
    return replace(split, labelled=split.pretrain) if labelled == EVERYONE else split


def _row(where: dict, cells: list[tuple[int, int]], labelled: int, target: float, steps: int, every: int) -> Row:
    """Minutes of both, and how often each reached the Dice; `steps` 0: those of the profile."""
    method = "random" if labelled == EVERYONE else "weak_to_strong"
    experiment = resolve(method=method, **where)
    steps = steps or experiment.finetune.steps_for(labelled)
    # a step of MONAI's network is cheaper: it gets three times as many
    contenders = {"ours": (ours, steps), "MONAI": (plain_monai, 3 * steps)}
    minutes, reached = {name: [] for name in contenders}, dict.fromkeys(contenders, 0)
    for draw, seed in cells:
        split = _split(experiment, labelled, draw)
        for name, (train_it, given) in contenders.items():
            with temporary_root():
                began = time.perf_counter()
                reached[name] += train_it(experiment, split, seed, given, every, target)
                minutes[name].append((time.perf_counter() - began) / 60)
    said = ", ".join(f"{name} {count} of {len(cells)}" for name, count in reached.items())
    case = f"Dice {target} with {labelled} labelled ({method}; reached: {said})"
    return against(case, minutes, "MONAI", 1.0, unit="min")


def measure(quick: bool) -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if quick or not (paths.data_root() / "acdc").is_dir():
            NOTES.append("of the phantom, one short run each: it says nothing")
            return [_row(QUICK, [(1, 0)], 1, TARGETS[1], steps=4, every=2)]
        cells = [(draw, seed) for draw in (1, 2, 3) for seed in (0, 1)]
        return [_row(REAL, cells, labelled, target, 0, EVERY) for labelled, target in TARGETS.items()]
    finally:
        torch.set_num_threads(threads)
