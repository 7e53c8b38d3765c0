"""What the command line asks for, checked: a model, machines, a step."""

import argparse
import math
from dataclasses import replace
from typing import Any

import torch

from training.errors import UserError
from training.plan import hardware, machine_file, shapes, strategies
from training.plan.assumptions import ASSUMPTIONS, attribute, values
from training.plan.choice import Wish, divisors, possible
from training.plan.hardware import Device
from training.plan.options import CHINCHILLA, DEVICE, DTYPES, STEP
from training.plan.shapes import Shape
from training.plan.system import System
from training.units import number, size

MOST_RANKS, LARGEST = 100_000, 1e13
LEAST_MEMORY, MOST_MEMORY = 1e8, 1e14  # bytes


def shape(args: argparse.Namespace) -> Shape:
    own = (args.n_layer, args.n_head, args.n_embd)
    given = [args.model is not None, args.parameters is not None, any(own)]
    if sum(given) != 1:
        said = "several models contradict each other" if sum(given) else "no model"
        raise UserError(f"{said}; write --model=gpt2-xl, or --parameters=7.5e9, or --n_layer --n_head --n_embd")
    if args.model is not None:
        found = shapes.named(args.model)
    elif args.parameters is not None:
        count = number(args.parameters)
        if not 1e5 <= count <= LARGEST:
            raise UserError(f"parameters = {args.parameters!r}: must be a number from 1e5 to 1e13, as 7.5e9")
        found = shapes.sized(int(count))
    else:
        if not all(n and n > 0 for n in own) or args.n_embd % args.n_head:
            raise UserError(f"n_layer, n_head, n_embd = {own}: all must be given, above 0, n_embd divisible by n_head")
        found = Shape(f"{args.n_layer} layers of {args.n_embd}", *own, bias=False)
    for name in ("vocab_size", "block_size"):
        if (value := getattr(args, name)) is not None:
            found = replace(found, **dict[str, Any]({name: above(name, value)}))
    if not 0 <= args.dropout < 1:
        raise UserError(f"dropout = {args.dropout}: must be at least 0 and below 1")
    return replace(found, dropout=args.dropout)


def above(name: str, value: float, most: float = 1e12) -> int:
    if not 0 < value <= most:
        raise UserError(f"{name} = {value}: must be above 0" + (f", at most {most:,.0f}" if value > most else ""))
    return int(value)


def device(args: argparse.Namespace, dtype: torch.dtype) -> Device:
    """Of the table, with the numbers that are given in its place."""
    numbers = (args.tflops, args.gpu_memory, args.memory_bandwidth)
    known = (args.device or DEVICE).lower() in [key.lower() for key in (*hardware.TABLE, *hardware.SHORT)]
    if all(numbers) and not known:
        found = Device(args.device, 1.0, 1.0, args.node_link or "pcie4", 1.0, 1.0)
    else:
        found = hardware.device(args.device or DEVICE)
    if dtype == torch.bfloat16 and not found.has_bf16:
        raise UserError(f"dtype = bfloat16: {found.name} lacks it; use --dtype=float16 or float32")
    if args.gpu_memory:
        found = replace(found, memory=memory(args, "gpu_memory"))
    if args.memory_bandwidth:
        found = replace(found, memory_rate=hardware.link(args.memory_bandwidth, "--memory-bandwidth"))
    if args.tflops:
        peak = 1e12 * above("tflops", number(args.tflops) * 1000) / 1000
        found = replace(found, half=peak, single=peak)
    return found


def memory(args: argparse.Namespace, name: str) -> float:
    """Bytes; 0 where it is not given."""
    text = getattr(args, name)
    if text is None:
        return 0.0
    option = f"--{name.replace('_', '-')}"
    try:
        found = size(text)
    except UserError as error:
        raise UserError(f"{option} = {error}") from None
    if not LEAST_MEMORY <= found <= MOST_MEMORY:
        raise UserError(f"{option} = {text!r}: {found:,.0f} bytes are no device's or host's memory; write 80GB")
    return found


def assumed(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Every assumption by its attribute in System, and those of them that the command line gives."""
    given = {name: text for name in ASSUMPTIONS if (text := getattr(args, attribute(name))) is not None}
    found = {attribute(name): value for name, value in values(given).items()}
    return found, {attribute(name): found[attribute(name)] for name in given}


def system(args: argparse.Namespace) -> System:
    gpus, nodes = above("gpus", args.gpus, MOST_RANKS), above("nodes", args.nodes, MOST_RANKS)
    if args.link and nodes == 1 and args.curve is None:
        raise UserError(f"link = {args.link!r}: is between nodes, and there is one; add --nodes=2, or say --node-link")
    numbers, given = assumed(args)
    between = hardware.link(args.link or "400Gb", "--link")
    about: dict[str, Any] = {"gpus": gpus, "nodes": nodes, "host_memory": memory(args, "host_memory")}
    if args.machine:
        return measured(args, {**about, **given, "link": between})
    dtype = getattr(torch, args.dtype or DTYPES[0])
    known = device(args, dtype)
    return System(
        device=known.name,
        kind=known.kind,
        dtype=dtype,
        memory=known.memory,
        flops=known.flops(dtype),
        memory_rate=known.memory_rate,
        node_link=hardware.link(args.node_link or known.link, "--node-link"),
        link=between,
        origin=dict.fromkeys(given, "given"),
        **{**about, **numbers},
    )


def measured(args: argparse.Namespace, about: dict[str, Any]) -> System:
    """By a file of --calibrate; what the command line says goes before it."""
    if args.device or args.tflops or args.memory_bandwidth:
        raise UserError("--machine: has the device's numbers; leave --device, --tflops and --memory-bandwidth out")
    found = machine_file.read(args.machine)
    if args.dtype and args.dtype != found.dtype:
        raise UserError(f"dtype = {args.dtype}: {args.machine} was measured in {found.dtype}; measure in {args.dtype}")
    if args.gpu_memory:
        about["memory"] = memory(args, "gpu_memory")
    if args.node_link:
        about["node_link"] = hardware.link(args.node_link, "--node-link")
    return found.system(about, args.machine)


def wish(args: argparse.Namespace, found: Shape, machines: System, strict: bool = True) -> Wish:
    """strict: strategies that are not possible there are an error, and not left out."""
    ranks = machines.ranks
    each = max(1.0, STEP / found.block_size / ranks)
    default = ranks * 2 ** round(math.log2(each))  # which many micro-batches divide
    wanted = strategies.named(args.strategies) if args.strategies else list(strategies.STRATEGIES.values())
    taken = tuple(s for s in wanted if possible(s, machines, args.shard_ranks))
    if args.strategies and strict and (left := [s.name for s in wanted if s not in taken]):
        raise UserError(f"strategies: {', '.join(left)}: not possible on {ranks} ranks of {machines.nodes} nodes")
    if args.shard_ranks < 0 or (args.shard_ranks and ranks % args.shard_ranks):
        raise UserError(f"shard_ranks = {args.shard_ranks}: must divide the {ranks} ranks: {divisors(ranks)}")
    if args.batch_size < 0:
        raise UserError(f"batch_size = {args.batch_size}: must be above 0")
    tokens = number(args.tokens) if args.tokens else CHINCHILLA * found.parameter_count()
    above("tokens", tokens, 1e18)
    batch = above("global-batch", args.global_batch) if args.global_batch is not None else default
    checkpointing = {None: (False, True), "True": (True,), "False": (False,)}[args.activation_checkpointing]
    return Wish(found, machines, taken, batch, tokens, args.batch_size, checkpointing, args.shard_ranks)
