"""One of two gloo ranks, as a program: `python two_ranks.py FOLDER RANK`.

Reads FOLDER/inputs.pt, takes this rank's half of the rows, and writes the value and the parameter gradient, averaged
over the ranks as DistributedDataParallel does, of every loss of `LOSSES` to FOLDER/rank0.pt or rank1.pt.
`test_losses.py` computes the same in one process.
"""

import sys

import torch
from torch import distributed, nn

from clseg.losses import contrastive_loss, local_contrastive_loss
from clseg.pairs import cluster_pairs, instance_pairs, partition_pairs, position_pairs
from clseg.ranks import gather

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


def work(folder, rank):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    inputs = torch.load(f"{folder}/inputs.pt")
    image = inputs["image"].chunk(2)[rank]
    about = {name: gather(rows.chunk(2)[rank]) for name, rows in inputs["about"].items()}
    found = {}
    for name, loss in LOSSES.items():
        network = linear(inputs["weight"])
        value = loss(gather(network(image)), about)
        value.backward()
        gradient = network.weight.grad
        distributed.all_reduce(gradient)
        found[name] = value.detach(), gradient / 2
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
