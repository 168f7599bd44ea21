"""A pre-training iteration from end to end, against its forward and backward pass on a batch that is in memory.

End to end is the loop as a run goes through it: drawing slices, reading them from the store, two views of each, pairs,
network, loss, backward, optimiser, log, progress, and a checkpoint at the end. The other keeps one batch with its pairs
and does nothing but network, loss and backward; with the optimiser's step it is shown for one of them.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import Row, against, in_turn, temporary_root

from clseg.loop import fit, optimiser_for
from clseg.losses import contrastive_loss
from clseg.stages import STAGES
from clseg.stages.contrast import draw_batch
from clseg.study import runs
from clseg.study.archive import Checkpoints
from clseg.study.parameters import PretrainParameters

TITLE = "pre-training iteration, end to end"
GOAL = "at most 1.15 of the same forward and backward on a batch already in memory"
PEERS: list[str] = []


def contenders(method: str, profile: str, steps: int, with_step: bool) -> dict[str, Callable[[], None]]:
    run = runs.pretrain_run(PretrainParameters(dataset="phantom", profile=profile, method=method))
    store = runs.open_store(run.experiment, progress=False)
    network = runs.build_network(run, store)
    work = runs.stage_work(run, store, runs.split_of(run, store))
    stage, training = run.stage, STAGES[run.stage.stage](work, run.stage)
    encoder, head = training.learning["encoder"], training.learning["head"]
    views, pairs = draw_batch(work, stage, 0)
    optimiser = optimiser_for(training.learning.values(), stage)

    def end_to_end() -> None:
        with tempfile.TemporaryDirectory() as folder:
            keeper = Checkpoints(Path(folder), run.experiment.checkpoint_every, steps, run.code)
            fit(network, training, stage, steps, run.experiment.precision, keeper=keeper)

    def in_memory(step: bool = False) -> None:
        network.train()
        for _ in range(steps):
            optimiser.zero_grad(set_to_none=True)
            embedding = torch.cat([head(encoder(view)[-1]) for view in views])
            contrastive_loss(embedding, pairs, stage.temperature, stage.denominator).backward()
            if step:
                optimiser.step()

    calls = {"ours": end_to_end, "forward and backward": in_memory}
    if with_step:
        calls["forward, backward and optimiser"] = lambda: in_memory(step=True)
    return calls


def measure(quick: bool) -> list[Row]:
    rows = []
    cells = [("laptop", "gd", 50, True), ("laptop", "pcl", 50, False), ("paper", "gd", 4, False)]
    with temporary_root():
        for profile, method, steps, with_step in [("smoke", "gd", 2, True)] if quick else cells:
            calls = contenders(method, profile, steps, with_step)
            samples = in_turn(calls, 2 if quick else 5, 0)
            samples = {name: [seconds / steps for seconds in times] for name, times in samples.items()}
            _, strict, *others = calls
            rows.append(against(f"{method}, {profile}: time per step", samples, strict, 1.15))
            for other in others:
                rows.append(against(f"{method}, {profile}: time per step, optimiser in both", samples, other, None))
    return rows
