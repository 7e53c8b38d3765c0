"""Activations: what forward keeps for backward, in bytes of a rank and micro-batch.

The paper (Korthikanti et al., arXiv:2205.05198, section 4.1) counts s b h (34 + 5 a s / h) bytes a block in 16 bits,
for s tokens a sequence, b sequences, width h, a heads. Here the 5 a s² b are gone, as attention never holds its matrix
(FlashAttention, arXiv:2205.14135: it keeps its output, which is counted, and one number a head and token), and so are
two masks of s b h bytes without dropout: 32 s b h = 16 elements of 2 bytes. By autocast, the two inputs of the layer
norms are the fp32 residual stream: 36 s b h.
"""

from dataclasses import dataclass

from training.plan.shapes import Shape

FP32, IDS = 4, 16  # bytes; of a token and its target, int64 each
LOSS_ROWS = 2048  # of the logits are in fp32 at a time, on a GPU (model.py: CrossEntropy)
LOSS_ELEMENTS = 2**21  # on a CPU


@dataclass(frozen=True)
class Precision:
    """half: matmuls in 2 bytes; autocast: weights, norms and the residual stream stay in fp32."""

    half: bool
    autocast: bool = False
    on_gpu: bool = True

    @property
    def computed(self) -> int:
        return 2 if self.half else FP32

    @property
    def residual(self) -> int:
        return FP32 if self.autocast else self.computed


def of_block(shape: Shape, tokens: int, precision: Precision) -> float:
    """Of one block, its input among it."""
    computed, residual = precision.computed, precision.residual
    if shape.hidden:  # two norms; queries, keys, values before and after the rotation, the output; four of the MLP
        kept = (2 * residual + (2 + 5 + 1) * computed) * shape.n_embd + 4 * computed * shape.hidden
    else:  # inputs of: 2 norms | c_attn, attention (3), its c_proj, c_fc, GELU (4), the MLP's c_proj (4)
        kept = (2 * residual + (1 + 3 + 1 + 1 + 4 + 4) * computed) * shape.n_embd
    if shape.dropout:  # two masks; on a CPU they are numbers, and attention is in fp32 and keeps its matrix, 5 a s² b
        kept += 2 * shape.n_embd * (1 if precision.on_gpu else computed)
        if not precision.on_gpu:
            kept += 3 * shape.n_head * shape.block_size * FP32 + 3 * shape.n_embd * (FP32 - computed)
    statistics = FP32 * (4 + shape.n_head)  # mean and deviation of two norms, logsumexp of each head
    return tokens * (kept + statistics)


def of_head(shape: Shape, tokens: int, precision: Precision) -> float:
    """The last norm, what reads the tokens out, and the logits, whose gradient takes their place."""
    kept = shape.n_embd * (precision.residual + precision.computed) + shape.vocab_size * precision.computed
    return tokens * (kept + 2 * FP32 + IDS)


def in_loss(shape: Shape, tokens: int, precision: Precision) -> float:
    """Of the logits, what is in fp32 for a moment."""
    rows = LOSS_ROWS if precision.on_gpu else LOSS_ELEMENTS // shape.vocab_size
    return FP32 * shape.vocab_size * min(tokens, max(1, rows))


def saved(shape: Shape, batch: int, precision: Precision, checkpointing: bool) -> float:
    """When forward ends. checkpointing: of each block the input only (the paper's 2 s b h, section 5)."""
    tokens = batch * shape.block_size
    kept = tokens * shape.n_embd * precision.residual if checkpointing else of_block(shape, tokens, precision)
    mask = tokens * shape.n_embd * (1 if precision.on_gpu else precision.residual) if shape.dropout else 0
    return shape.n_layer * kept + of_head(shape, tokens, precision) + mask


def peak(shape: Shape, batch: int, precision: Precision, checkpointing: bool) -> float:
    """The most at any moment: in the loss, or when backward is in the last block, and the logits are gone."""
    tokens = batch * shape.block_size
    kept = saved(shape, batch, precision, checkpointing)
    wide = shape.hidden or 4 * shape.n_embd
    backward = tokens * precision.computed * (2 * wide + shape.n_embd)  # gradients of the MLP, and the residual's
    block = of_block(shape, tokens, precision) if checkpointing else 0
    in_backward = kept - of_head(shape, tokens, precision) + block + backward
    # the gradient of the matrix that reads out waits for that of the embedding, through all of backward
    return max(kept + in_loss(shape, tokens, precision), in_backward + shape.head() * precision.computed)
