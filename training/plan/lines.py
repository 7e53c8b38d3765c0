"""What to paste: a config and the command that starts it."""

from training.plan.choice import Option
from training.plan.strategies import FLAGS

CONFIG = "config/planned.py"


def config(option: Option) -> list[str]:
    shape, wish = option.wish.shape, option.wish
    lines = [
        f"batch_size = {option.batch}",
        f"gradient_accumulation_steps = {option.accumulation}  # of all {wish.system.ranks} ranks",
        f"block_size = {shape.block_size}  # {wish.tokens_per_step:,} tokens per step",
        f"activation_checkpointing = {option.checkpointing}",
        f"dtype = '{str(wish.system.dtype).removeprefix('torch.')}'",
        f"max_iters = {-(-int(wish.tokens) // wish.tokens_per_step)}  # {wish.tokens:.3g} tokens",
    ]
    if not shape.hidden and not shape.given:
        lines += [f"{name} = {getattr(shape, name)}" for name in ("n_layer", "n_head", "n_embd", "bias")]
    return lines


def command(option: Option) -> str:
    strategy, system = option.case.strategy, option.wish.system
    flags = [flag.format(shard=option.case.shard) for flag in FLAGS.get(strategy.name, ())]
    hostfile = "HOSTFILE=hostfile " if system.nodes > 1 else ""
    ranks = [str(system.gpus)] if system.nodes == 1 and strategy.name != "single" else []
    device = [] if system.on_gpu else ["--device=cpu"]
    return hostfile + " ".join([strategy.launch, *ranks, CONFIG, *flags, *device])
