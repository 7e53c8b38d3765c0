"""torch's compiler, left out of runs that compile nothing: to load it takes every rank 1 to 2 s and 70 MB.

PyTorch's optimizers and DeepSpeed's hooks load it only to tell it to leave them alone; DeepSpeed's Muon compiles as it
is imported, whether anybody wants Muon or not.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Adam, Optimizer


def leave_out(unless: bool) -> None:
    """For the whole process, before DeepSpeed is imported and an optimizer made."""
    if unless:
        return
    for method in vars(Optimizer).values():
        if inner := getattr(method, "__wrapped__", None):
            inner.__dynamo_disable = inner  # where torch._compile._disable_dynamo looks for its answer
    names: Any = torch
    Adam.step = torch.no_grad()(inspect.unwrap(Adam.step))  # type: ignore[method-assign]  # AdamW's, too
    names.compile = names.compiler.disable = names._disable_dynamo = as_it_is


def as_it_is(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    """A decorator, with arguments or without, that changes nothing."""
    return as_it_is if function is None else function  # an empty module counts as false
