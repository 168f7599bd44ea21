"""Two gloo ranks under DistributedDataParallel, as a program: `python two_ranks.py FOLDER`.

Reads FOLDER/inputs.pt, gives each rank half of the rows, writes value and parameter gradient of every loss of `LOSSES` to
FOLDER/rank0.pt and FOLDER/rank1.pt. `test_losses.py` computes the same in one process.
"""

import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from clseg.losses import contrastive_loss, gather, local_contrastive_loss
from clseg.pairs import cluster_pairs, instance_pairs, partition_pairs, position_pairs

NEIGHBOURS = torch.tensor([[1, 2], [2, 3], [3, 0], [0, 4]])


def local(z, about, paired):
    """The first and second half of the channels as the maps of two views, with five regions of three channels each."""
    first, second = z.view(len(z), 2, 5, 3).unbind(dim=1)
    image_pairs = about["partition"][:, None] == about["partition"][None, :]
    image_pairs &= ~torch.eye(len(z), dtype=torch.bool)
    return local_contrastive_loss(first, second, NEIGHBOURS, 0.2, image_pairs if paired else None)


LOSSES = {
    "instance": lambda z, about: contrastive_loss(z, instance_pairs(about["slice_id"])),
    "position": lambda z, about: contrastive_loss(z, position_pairs(about["position"], 0.3)),
    "cluster": lambda z, about: contrastive_loss(z, cluster_pairs(about["slice_id"], about["partition"]), 0.5, "pair"),
    "gd-": lambda z, about: contrastive_loss(
        z, partition_pairs(about["slice_id"], about["partition"], "gd-"), 0.1, "pair"
    ),
    "gd": lambda z, about: contrastive_loss(
        z, partition_pairs(about["slice_id"], about["partition"], "gd", about["augmented"]), 0.1, "pair"
    ),
    "local": lambda z, about: local(z, about, paired=False),
    "local, image pairs": lambda z, about: local(z, about, paired=True),
}


def linear(weight):
    layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    inputs = torch.load(f"{folder}/inputs.pt")
    mine = {name: rows.chunk(2)[rank] for name, rows in inputs["about"].items()}
    network = DistributedDataParallel(linear(inputs["weight"]))
    found = {}
    for name, loss in LOSSES.items():
        network.zero_grad()
        embedding = network(inputs["image"].chunk(2)[rank])
        value = loss(gather(embedding), {about: gather(rows) for about, rows in mine.items()})
        value.backward()
        found[name] = value.detach(), network.module.weight.grad.clone()
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(sys.argv[1],), nprocs=2)
