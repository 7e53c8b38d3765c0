"""The model state of a rank, counted: the bytes of all living tensors, by what they are.

To be taken when backward is done and the update is still to come, of the second step or a later one, and after the
micro-step that has most: then the optimizer has its states, the gradients are there, and no activation is left.
"""

import gc
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from training.stragglers import Stragglers

Storages = dict[int, int]  # address -> bytes: each once, however many tensors look at it


def storages(tensors: Iterable[Tensor], device: str) -> Storages:
    found = (t.untyped_storage() for t in tensors if t.device.type == device)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def living() -> list[Tensor]:
    """Gradients have no Python object of their own until they are asked for."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.device.type != "meta"]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return [local(t) for t in tensors]


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it: a DTensor, as FSDP2's are, is only a view of the whole."""
    return getattr(tensor, "_local_tensor", tensor)


def parameters(model: nn.Module) -> Iterator[Tensor]:
    """ds_tensor: what a rank has of them where ZeRO-3 has partitioned them."""
    for parameter in model.parameters():
        yield local(parameter)
        if isinstance(part := getattr(parameter, "ds_tensor", None), Tensor):
            yield part


def optimizer_states(optimizer: Any) -> Iterator[Tensor]:
    """Moments and, of DeepSpeed, the fp32 copy of the weights."""
    for state in getattr(optimizer, "state", {}).values():
        yield from (local(t) for t in state.values() if isinstance(t, Tensor))
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from (t for t in getattr(optimizer, name, ()) if isinstance(t, Tensor))


def swappers(model: nn.Module, optimizer: Any) -> list[Any]:
    """DeepSpeed's, between memory and NVMe: of the optimizer's states, and of the weights."""
    of_weights = (getattr(parameter, "nvme_swapper", None) for parameter in model.parameters())
    found = [getattr(optimizer, "optimizer_swapper", None), *of_weights]
    return list({id(swapper): swapper for swapper in found if swapper}.values())


def buffers(model: nn.Module, optimizer: Any) -> Iterator[Tensor]:
    """What DeepSpeed collects gradients in before it reduces them: reduce_bucket_size elements, twice if overlapped.

    And what it reads from NVMe and writes there through.
    """
    for swapper in swappers(model, optimizer):
        held = [getattr(swapper, "buffers", None)]
        held += getattr(getattr(swapper, "swap_buffer_manager", None), "all_buffers", [])
        yield from (t for t in held if isinstance(t, Tensor))
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        found = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        yield from (t for t in found if t is not None)


def aside() -> Iterator[Tensor]:
    """What the ranks' speed is measured with."""
    yield from (o.matrix for o in gc.get_objects() if type(o) is Stragglers and o.ranks.world_size > 1)


def count(model: nn.Module, optimizer: Any, device: str) -> dict[str, int]:
    """Bytes on a type of device: parameters, optimizer_states, buffers, and gradients: what else lives now.

    optimizer: torch's, or DeepSpeed's around it (its `optimizer`).
    """
    left = storages(living(), device)
    for address in storages(aside(), device):
        left.pop(address, 0)
    inner = getattr(optimizer, "optimizer", optimizer)
    kinds = {
        "buffers": storages(buffers(model, optimizer), device),
        "parameters": storages(parameters(model), device),
        "optimizer_states": storages([*optimizer_states(inner), *optimizer_states(optimizer)], device),
    }
    found = {kind: sum(left.pop(address, 0) for address in held) for kind, held in kinds.items()}
    return {**found, "gradients": sum(left.values())}
