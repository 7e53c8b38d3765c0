"""The command line of plan.py: its options, and one message for what is wrong with them."""

import argparse
import difflib
from typing import Any, NoReturn

from training.errors import UserError
from training.plan import hardware, shapes, strategies
from training.plan.assumptions import ASSUMPTIONS

STEP = 2**19  # tokens: half a million, as GPT-3's smaller models (arXiv:2005.14165, table 2.1)
CHINCHILLA = 20  # tokens a parameter (Hoffmann et al., arXiv:2203.15556)
DTYPES = ("bfloat16", "float16", "float32")
DEVICE = "A100-80GB"
# group -> option -> (meaning, what argparse needs to know besides)
GROUPS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "model": {
        "model": (", ".join(shapes.SHAPES), {}),
        "parameters": ("or their number, 7.5e9: a GPT of so many", {}),
        "n-layer": ("or a shape of your own: blocks", {"type": int}),
        "n-head": ("attention heads per block", {"type": int}),
        "n-embd": ("width", {"type": int}),
        "vocab-size": ("instead of the model's", {"type": int}),
        "block-size": ("tokens per sequence, instead of the model's", {"type": int}),
        "dropout": ("default: 0", {"type": float, "default": 0.0}),
    },
    "machines": {
        "gpus": ("of a node, 8; CPU ranks where FILE of --machine is of those", {"type": int, "default": 8}),
        "nodes": ("1", {"type": int, "default": 1}),
        "device": (f"{', '.join(hardware.TABLE)}; default: {DEVICE}", {}),
        "gpu-memory": ("80GB; default: the device's", {}),
        "tflops": ("peak of dense matmuls in dtype, of a device that is not in the table", {}),
        "memory-bandwidth": ("2TB, of a device that is not in the table", {}),
        "link": (f"of a node to the others: 400Gb (default), 8x400Gb, 50GB, {', '.join(hardware.LINKS)}", {}),
        "node-link": ("between the GPUs of a node; default: the device's", {}),
        "host-memory": ("of a node, 1TB; without it, host memory is told and not checked", {}),
        "machine": ("what --calibrate measured, in place of table and assumptions", {"metavar": "FILE"}),
    },
    "step": {
        "dtype": ("default: bfloat16", {"choices": DTYPES}),
        "global-batch": (f"sequences in a step; default: about {STEP:,} tokens", {"type": int}),
        "batch-size": ("sequences of a rank and micro-step; default: the best", {"type": int, "default": 0}),
        "activation-checkpointing": ("default: whichever is better", {"choices": ("True", "False")}),
        "strategies": (f"{','.join(strategies.STRATEGIES)}; default: all", {}),
        "shard-ranks": ("of fsdp_hsdp: ranks that share one copy; default: a node's", {"type": int, "default": 0}),
        "tokens": (f"of the whole run, 300e9; default: {CHINCHILLA} a parameter", {}),
    },
    "output": {
        "all": ("every micro-batch, with and without activation checkpointing", {"action": "store_true"}),
        "explain": ("formulas with their sources, and every assumption", {"action": "store_true"}),
        "json": ("all of it, for programs", {"action": "store_true"}),
        "curve": ("from 1 to 1,024 GPUs; as a figure, too", {"nargs": "?", "const": "", "metavar": "FILE.png"}),
        "calibrate": ("measure this machine with --gpus ranks, and write FILE", {"metavar": "FILE"}),
        "probe": (argparse.SUPPRESS, {}),  # a rank of --calibrate is given it: where it writes what it finds
    },
    "assumptions (--explain says where they come from)": {
        name: (f"{known.meaning} ({known.default})", {}) for name, known in ASSUMPTIONS.items()
    },
}


class Parser(argparse.ArgumentParser):
    """--gpu_memory and --gpu-memory are the same; an error is one message, with the nearest option."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            name = unknown.split()[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            message = f"{name}: unknown option; {f'did you mean {near[0]}?' if near else '--help lists all'}"
        raise UserError(message)


def spelled(argv: list[str]) -> list[str]:
    """Keys of the settings are written with _, options of other programs with -: here both will do."""
    found = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        found.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return found


def parse(argv: list[str], usage: str) -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = Parser("plan.py", description=usage, formatter_class=text, allow_abbrev=False)
    for group, options in GROUPS.items():
        of_group = parser.add_argument_group(group)
        for name, (meaning, more) in options.items():
            metavar: dict[str, Any] = {} if {"metavar", "action", "choices"} & more.keys() else {"metavar": "X"}
            of_group.add_argument(f"--{name}", help=meaning, **{**metavar, **more})
    return parser.parse_args(spelled(argv))
