"""What the peers that run as several ranks share: who a rank is, how the ranks meet, the largest of what they have.

mpirun or torchrun starts a process for each rank and says in the environment which it is; without either there is one.

    rank, ranks, local = torch_ranks.who()       local: the rank's number on its machine, and its GPU's
    device = torch_ranks.join("cuda", port)      all ranks; 300 s without an answer from one of them end the others

Used by torch_alltoall.py and torch_gpu.py.
"""
import datetime
import os
import sys

import torch
import torch.distributed as dist


def who():
    """Also sets what PyTorch reads: torchrun's names, which mpirun's ranks have under others."""
    env = os.environ
    env.setdefault("RANK", env.get("OMPI_COMM_WORLD_RANK", "0"))
    env.setdefault("WORLD_SIZE", env.get("OMPI_COMM_WORLD_SIZE", "1"))
    env.setdefault("LOCAL_RANK", env.get("OMPI_COMM_WORLD_LOCAL_RANK", env["RANK"]))
    return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])


def join(kind, port=None, seconds=300):
    """kind: cuda, where NCCL connects the ranks, or cpu, where gloo does. port: a free one of rank 0's machine, or
    MASTER_PORT, or 29500. Returns this rank's device."""
    rank, _, local = who()
    if kind == "cuda" and local >= torch.cuda.device_count():
        sys.exit("%s: rank %d has no GPU: %d are here, and each rank needs its own" %
                 (os.path.basename(sys.argv[0]), rank, torch.cuda.device_count()))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(port or os.environ.get("MASTER_PORT", 29500))
    device = torch.device(kind, local if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(seconds=seconds))
    return device


def most_of_ranks(values):
    """values, a tensor of the same shape on all ranks, becomes everywhere the largest of each; returned, too."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values
