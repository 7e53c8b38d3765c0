"""GPT-2 (Radford et al., 2019) with nanoGPT's parameter names: model, loss, generation, initial weights.

Imports torch only: the model does not know about ranks, strategies or files.

A new parameter needs a rule in `initial_value`. A new buffer is registered in a method `reset_buffers` of its module,
called by the constructor and, for a model that was built on the meta device, again by `GPT.materialize`.
"""

import math
import zlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """Shape and options of the model."""

    block_size: int = 1024  # positions
    vocab_size: int = 50304  # GPT-2's 50,257 rounded up to a multiple of 64, which makes matmuls faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as in GPT-2; False is slightly faster
    gelu: str = "none"  # "none": exact; "tanh": the approximation that OpenAI's GPT-2 was trained with
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more FLOPs

    def parameter_count(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        C, biases = self.n_embd, int(self.bias)
        block = 12 * C * C + 2 * C + biases * (2 + 3 + 1 + 4 + 1) * C
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + (1 + biases) * C

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward: 6 N + 12 L H Q T (PaLM, appendix B, arXiv:2204.02311).

        N excludes the position embeddings, as in nanoGPT. Recomputed activations are not counted.
        """
        n = self.parameter_count() - self.block_size * self.n_embd
        return 6 * n + 12 * self.n_layer * self.n_embd * self.block_size


class Linear(nn.Linear):
    """nn.Linear without nn.Linear's own initialization, which `initial_value` or a checkpoint would overwrite."""

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialized."""


class KVCache:
    """Attention keys and values of the tokens so far, (layers, 2, B, heads, block_size, head_size), for `generate`."""

    def __init__(self, config: GPTConfig):
        self.config, self.length = config, 0
        self.kv: Tensor | None = None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v, (B, heads, T, head_size), and return the layer's keys and values of all tokens so far."""
        if self.kv is None:
            batch, heads, _, head_size = k.shape
            self.kv = k.new_empty(self.config.n_layer, 2, batch, heads, self.config.block_size, head_size)
        keys, values = self.kv[layer, ..., : self.length + k.size(2), :]
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        return keys, values


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and to earlier tokens, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        assert config.n_head > 0 and config.n_embd % config.n_head == 0, "n_embd must be divisible by n_head"
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        # A single new token attends to the whole cache. Longer inputs start with an empty cache: the plain causal mask.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=T > 1)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout, self.gelu = config.dropout, config.gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class CrossEntropy(torch.autograd.Function):
    """Mean cross entropy that computes its gradient in forward and stores it in place of the logits, to save memory.

    Only `rows` rows at a time are in fp32; the logits keep the dtype of the matmul. F.cross_entropy under autocast
    keeps three fp32 tensors of the logits' size: 2.4 GiB each for 12 x 1024 tokens of GPT-2.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (N, V), overwritten for the gradient; targets (N,) int64. Returns the loss, an fp32 scalar."""
        rows = max(1, 2**21 // logits.size(1)) if logits.device.type == "cpu" else 2048  # on a CPU: fits the cache
        loss = torch.zeros((), device=logits.device)
        for part, target in zip(logits.split(rows), targets.unsqueeze(1).split(rows), strict=True):
            log_p = F.log_softmax(part, dim=1, dtype=torch.float32)
            log_p_target = log_p.gather(1, target)
            loss -= log_p_target.sum()
            if ctx.needs_input_grad[0]:  # N d loss / d logits = softmax(logits) - one_hot(target)
                torch.exp(log_p, out=part)
                part.scatter_(1, target, log_p_target.expm1().to(part.dtype))
        ctx.save_for_backward(logits)
        return loss / len(targets)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        """Divides by N only here, with fp16's loss scale in grad_loss: 1 / (N V) alone underflows in fp16."""
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_loss / len(grad)), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats, an fp32 scalar; logits (N, V), overwritten; targets (N,) int64."""
    if torch.compiler.is_compiling():  # the compiler fuses the fp32 copy away
        return F.cross_entropy(logits.float(), targets)
    return CrossEntropy.apply(logits, targets)


class Transformer(nn.Module):
    """Embeddings, blocks and the final layer norm: everything but the output projection."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        C, vocab_size, block_size = config.n_embd, config.vocab_size, config.block_size
        # With _weight given, nn.Embedding skips its own initialization.
        self.wte = nn.Embedding(vocab_size, C, _weight=torch.empty(vocab_size, C))
        self.wpe = nn.Embedding(block_size, C, _weight=torch.empty(block_size, C))
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(C, bias=config.bias)
        self.recompute = partial(checkpoint, use_reentrant=False)  # train_deepspeed.py may replace it by DeepSpeed's

    def forward(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T) int64 -> (B, T, C)"""
        start = cache.length if cache is not None else 0
        T = tokens.size(1)
        assert start + T <= self.config.block_size, f"{start + T} tokens > block_size {self.config.block_size}"
        x = self.wte(tokens) + self.wpe(torch.arange(start, start + T, device=tokens.device))
        x = F.dropout(x, self.config.dropout, self.training)
        checkpointing = self.config.activation_checkpointing and self.training
        for block in self.h:
            x = self.recompute(block, x) if checkpointing else block(x, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)


class GPT(nn.Module):
    """Language model whose parameters are uninitialized until they get an `initial_value` or those of a checkpoint."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss = cross_entropy
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share one matrix between token embedding and output projection (Press & Wolf, 2017, arXiv:1608.05859)."""
        self.lm_head.weight = self.transformer.wte.weight

    def compile_parts(self) -> None:
        """Compile each block and the loss by itself, so that a block's gradients are reduced while backward goes on."""
        for block in self.transformer.h:  # forward only: hooks of FSDP2 and DeepSpeed stay outside
            block.forward = torch.compile(block.forward, fullgraph=True)
        self.loss = torch.compile(cross_entropy, fullgraph=True)

    def materialize(self, device: torch.device, buffer_device: torch.device | None = None) -> "GPT":
        """Allocate a model that was built on meta: uninitialized parameters, and buffers with their values.

        buffer_device: where buffers go, if not to device, as when parameters are offloaded.
        """
        self.to_empty(device=device)
        self.tie_weights()
        with buffer_device or device:
            for name, module in self.named_modules():
                if list(module.buffers(recurse=False)):
                    assert hasattr(module, "reset_buffers"), f"{name} has buffers: compute them in reset_buffers()"
                    module.reset_buffers()
        return self

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) int64 -> mean loss in nats if targets (B, T) are given, else the last token's logits (B, V)."""
        x = self.transformer(tokens, cache)
        if targets is None:
            return self.lm_head(x[:, -1])
        return self.loss(self.lm_head(x).flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        vocab_size: int | None = None,
    ) -> Tensor:
        """Append max_new_tokens sampled tokens to tokens (B, T): (B, T + max_new_tokens), int64.

        temperature: below 1 sharper, above 1 more random, 0 greedy. vocab_size: ids from here on, the padding of the
        vocabulary, are never sampled. The KV cache makes a token cost one position until block_size is full; after
        that the window slides, all positions change with every token, and each token costs a full forward.
        cuDNN's attention is left out, because it plans anew for every length of the keys.
        """
        block_size = self.config.block_size
        cache = KVCache(self.config)
        for _ in range(max_new_tokens):
            fits = tokens.size(1) <= block_size
            logits = self(tokens[:, cache.length :], cache=cache) if fits else self(tokens[:, -block_size:])
            next_token = sample(logits[:, :vocab_size].float(), temperature, top_k, top_p)
            tokens = torch.cat((tokens, next_token), dim=1)
        return tokens


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Sample one token per row: (B, V) fp32 -> (B, 1) int64. top_p: nucleus sampling (Holtzman et al., 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = F.softmax(logits, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # keeps the token that crosses top_p
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1)


def initial_value(name: str, shape: torch.Size, config: GPTConfig, seed: int) -> Tensor:
    """Initial value of a parameter, fp32, on the CPU: a pure function of (seed, parameter name).

    Every parameter has its own generator, so that any rank can create any parameter, in any order, bit-identical.
    Raises ValueError for a parameter without a rule below.
    """
    module, kind = ["", *name.split(".")][-2:]
    residual = 0.02 / math.sqrt(2 * config.n_layer)  # Radford et al., 2019, section 2.3
    stds = {"wte": 0.02, "wpe": 0.02, "c_attn": 0.02, "c_fc": 0.02, "c_proj": residual}
    if kind == "weight" and module in stds:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        return torch.normal(0.0, stds[module], shape, generator=generator)
    norms = ("ln_1", "ln_2", "ln_f")
    if kind == "weight" and module in norms:
        return torch.ones(shape)
    if kind == "bias" and (module in stds or module in norms):
        return torch.zeros(shape)
    raise ValueError(f"parameter {name!r} has no initial value: add a rule for {module!r} to initial_value in model.py")
