# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The time of a training step on n GPUs: compute, what of the communication is not hidden, update, checkpoint, data.

Letters: n GPUs, of which g share a node and m = n / g nodes; S bytes; B images per GPU and optimiser step. Bandwidths
are bytes per second and direction of one GPU, as nccl-tests reports them as "bus bandwidth" (NVIDIA/nccl-tests,
doc/PERFORMANCE.md). Routing shrinks the compute; what is sent depends only on the weights and stays the same.
"""

import math
from dataclasses import dataclass


SCHEMES = ("ddp", "fsdp2", "hsdp")
KINDS = ("dense", "routed")
ADAMW_BYTES = 28
"""That fused AdamW moves per float32 parameter: weight, gradient and two moments in, all but the gradient out."""
EMA_BYTES = 12
"""That the average of the weights moves per parameter: reads weight and average, writes the average."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The links."""

    gpus_per_node: int = 8
    intra_bandwidth: float = 450e9
    """Between GPUs of a node. 450 GB/s: NVLink 4, 900 GB/s in both directions (NVIDIA's data sheets of H100, H200)."""
    inter_bandwidth: float = 50e9
    """Between nodes, per GPU. 50 GB/s: one 400 Gb/s adapter for each GPU, as in NVIDIA's DGX H100 and H200."""
    latency: float = 10e-6
    """Seconds per level of a tree over the ranks, for each collective; an assumption."""

    def groups(self, num_gpus: int) -> tuple[int, int]:
        """GPUs per node g and nodes m.

        Raises:
            ValueError: The last node would not be full.
        """
        local = min(num_gpus, self.gpus_per_node)
        if num_gpus < 1 or num_gpus % local:
            raise ValueError(f"Expected fewer GPUs than a node has, or whole nodes of {local}, got {num_gpus}.")
        return local, num_gpus // local


@dataclass(frozen=True, kw_only=True)
class Model:
    """What one GPU has to do."""

    num_parameters: int
    num_blocks: int
    seconds_per_image: dict[str, float]
    """Forward and backward, "dense" and "routed"; a third of it is the forward."""
    overhead: float
    """Seconds of a forward and backward that do not grow with the batch: launches and what else there is."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the model is trained."""

    scheme: str = "ddp"
    """ddp; fsdp2, sharded over all GPUs; hsdp, sharded in the node and replicated across nodes."""
    overlap: float = 1.0
    """Share of the compute, in [0, 1], behind which communication hides. 1: all but its last piece may be hidden. 0:
    nothing is."""
    accumulation: int = 1
    """Forwards and backwards per optimiser step, which share its B images."""
    ddp_gradient_bytes: float = 4.0
    """Per parameter: DDP reduces gradients in the weights' dtype, here float32."""
    fsdp_gradient_bytes: float = 2.0
    """Accelerate's FSDP2 gathers and reduces in bfloat16 with `mixed_precision: bf16`; 4 in float32."""
    fsdp_parameter_bytes: float = 2.0
    """See above."""
    reshard_after_forward: bool = True
    """Whether FSDP2 gathers the weights again for the backward."""
    bucket_bytes: float = 25 * 2**20
    """DDP's `bucket_cap_mb`."""
    ema: bool = True
    """Whether an average of the weights is kept."""
    memory_bandwidth: float = 4.3e12
    """Of the GPU, for optimiser and average. 90 % of the H200's 4.8 TB/s."""
    checkpointing_steps: int = 10_000
    """Steps between checkpoints, which all GPUs wait for."""
    checkpoint_rate: float = 0.3e9
    """Bytes per second at which weights, optimiser and average are gathered, written, flushed and hashed."""
    image_bytes: float = 16 * 2**10
    """Of the data read per image: mean and deviation of a 32x32x4 latent in float16."""
    storage_rate: float = 1e9
    """Bytes per second that one node reads of the data; an assumption."""


# ------------------------------------------------------------------------------------------------------ communication


def one_way(num_bytes: float, num_ranks: int, bandwidth: float, latency: float) -> float:
    """Seconds of a reduce-scatter or an all-gather of S bytes over k equal ranks: (k - 1) / k · S / bandwidth.

    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009): no algorithm
    sends less. The latency is that of a tree, log2(k) levels; in a ring it would be k - 1 of them.
    """
    return (num_ranks - 1) / num_ranks * num_bytes / bandwidth + latency * math.ceil(math.log2(num_ranks))


def in_node(num_bytes: float, num_gpus: int, cluster: Cluster) -> float:
    """Seconds of a reduce-scatter or an all-gather over the GPUs that share a node."""
    return one_way(num_bytes, cluster.groups(num_gpus)[0], cluster.intra_bandwidth, cluster.latency)


def across_nodes(num_bytes: float, num_gpus: int, cluster: Cluster) -> float:
    """Likewise across the nodes: each GPU of a node takes a g-th of the bytes to its peers in the others."""
    local, nodes = cluster.groups(num_gpus)
    return one_way(num_bytes / local, nodes, cluster.inter_bandwidth, cluster.latency)


def all_reduce(num_bytes: float, num_gpus: int, cluster: Cluster) -> float:
    """Reduce-scatter and all-gather: 2 (k - 1) / k · S / bandwidth on one level (nccl-tests, PERFORMANCE.md).

    Across nodes it has three stages, one after the other: reduce-scatter in the node, all-reduce of the shards across
    nodes, all-gather in the node. NCCL may run them at once, which takes at least half of their sum.
    """
    return 2 * (in_node(num_bytes, num_gpus, cluster) + across_nodes(num_bytes, num_gpus, cluster))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Seconds of communication, sent in equal pieces."""

    forward: float
    """In each forward."""
    backward: float
    """In each backward."""
    reduction: float
    """Besides, in the last backward of an optimiser step."""
    pieces: int


def traffic(num_gpus: int, model: Model, plan: Plan, cluster: Cluster) -> Traffic:
    """What the scheme sends.

    DDP all-reduces the gradients in buckets (arXiv 2006.15704). FSDP (arXiv 2304.11277; ZeRO-3, arXiv 1910.02054,
    section 7.2) gathers the weights of one block after the other in the forward, again in the backward, and
    reduce-scatters the gradients: 1.5 times DDP's bytes, if each number has as many. Its hybrid does so in the node
    and all-reduces each shard of the gradients across nodes (arXiv 2304.11277, section 3.2.2).
    """
    if plan.scheme == "ddp":
        num_bytes = plan.ddp_gradient_bytes * model.num_parameters
        pieces = math.ceil(num_bytes / plan.bucket_bytes)
        reduction = pieces * all_reduce(num_bytes / pieces, num_gpus, cluster)
        return Traffic(forward=0.0, backward=0.0, reduction=reduction, pieces=pieces)

    # One piece per block, and one for what is outside of them.
    pieces = model.num_blocks + 1
    weights = plan.fsdp_parameter_bytes * model.num_parameters / pieces
    gradients = plan.fsdp_gradient_bytes * model.num_parameters / pieces
    gather, reduction = in_node(weights, num_gpus, cluster), in_node(gradients, num_gpus, cluster)
    if plan.scheme == "fsdp2":
        gather += across_nodes(weights, num_gpus, cluster)
        reduction += across_nodes(gradients, num_gpus, cluster)
    else:
        reduction += 2 * across_nodes(gradients, num_gpus, cluster)
    again = gather if plan.reshard_after_forward else 0.0
    return Traffic(forward=pieces * gather, backward=pieces * again, reduction=pieces * reduction, pieces=pieces)


def exposed(seconds: float, pieces: int, window: float, overlap: float) -> float:
    """Seconds of communication that are not hidden behind `window` seconds of compute.

    At least one piece is not: the last bucket or block is there when the backward ends, and nothing runs before the
    first block's weights have come.
    """
    return max(seconds / pieces, seconds - overlap * window)


# --------------------------------------------------------------------------------------------------------------- step


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of an optimiser step, by what they are spent on."""

    compute: float
    """Forwards and backwards, with their overhead."""
    exposed: float
    """Communication that nothing hides."""
    update: float
    """AdamW and the average."""
    checkpoint: float
    """A step's share of it."""
    data: float
    """Waiting for the data."""

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update + self.checkpoint + self.data


def step(kind: str, num_gpus: int, batch_size: float, model: Model, plan: Plan, cluster: Cluster) -> Step:
    """A "dense" or "routed" optimiser step on n GPUs with B images on each."""
    local, _ = cluster.groups(num_gpus)
    sent, repeats = traffic(num_gpus, model, plan, cluster), plan.accumulation

    # Compute, and what of the communication it hides.
    images = batch_size * model.seconds_per_image[kind]
    forward, backward = images / repeats / 3, images / repeats * 2 / 3
    visible = repeats * exposed(sent.forward, sent.pieces, forward, plan.overlap)
    visible += (repeats - 1) * exposed(sent.backward, sent.pieces, backward, plan.overlap)
    visible += exposed(sent.backward + sent.reduction, sent.pieces, backward, plan.overlap)
    compute = images + repeats * model.overhead

    # What each GPU updates: all of the weights, or its shard.
    shards = {"ddp": 1, "fsdp2": num_gpus, "hsdp": local}[plan.scheme]
    update_bytes = (ADAMW_BYTES + (EMA_BYTES if plan.ema else 0)) * model.num_parameters / shards
    update = update_bytes / plan.memory_bandwidth

    # Data are read beside all of this; a checkpoint has float32 weights, two moments and the average.
    reading = local * batch_size * plan.image_bytes / plan.storage_rate
    checkpoint_bytes = (16 if plan.ema else 12) * model.num_parameters
    checkpoint = checkpoint_bytes / plan.checkpoint_rate / plan.checkpointing_steps
    waiting = max(0.0, reading - compute - visible - update)
    return Step(compute=compute, exposed=visible, update=update, checkpoint=checkpoint, data=waiting)


def speedup(num_gpus: int, batch_size: float, model: Model, plan: Plan, cluster: Cluster) -> float:
    """The dense step's time over the routed one's."""
    dense, routed = (step(kind, num_gpus, batch_size, model, plan, cluster).total for kind in KINDS)
    return dense / routed


def gain_kept(num_gpus: int, batch_size: float, reference: float, *setup) -> float:
    """The share of one GPU's gain, its speed-up at a batch of `reference` less 1, that n GPUs have."""
    return (speedup(num_gpus, batch_size, *setup) - 1) / (speedup(1, reference, *setup) - 1)


def smallest_batch(num_gpus: int, keep: float, reference: float | None, *setup, limit: int = 1024) -> int | None:
    """The smallest B from which on, up to `limit`, n GPUs keep so much of the gain.

    Args:
        num_gpus: n.
        keep: Share of the gain, in (0, 1].
        reference: Batch of the one GPU whose gain counts; None for the same B, which asks for communication alone.
        setup: Model, plan and cluster.
        limit: Largest B that is looked at.

    Returns:
        B, or None if `limit` is too small.
    """
    for batch_size in range(limit, 0, -1):
        if gain_kept(num_gpus, batch_size, reference or batch_size, *setup) < keep:
            return None if batch_size == limit else batch_size + 1
    return 1
