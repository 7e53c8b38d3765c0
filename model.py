"""The whole GPT: GPT-2's architecture (Radford et al., 2019) under nanoGPT's parameter names.

Imports torch and nothing of this repository: the model knows nothing of ranks, strategies or files.
"""

import math
import zlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 64 for the matmuls
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as GPT-2; False is a little faster
    gelu: str = "none"  # "none": exact; "tanh": the approximation that OpenAI's GPT-2 was trained with
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more work

    def parameter_count(self) -> int:
        """The tied matrix counted once."""
        C, biases = self.n_embd, int(self.bias)
        block = 12 * C * C + 2 * C + biases * (2 + 3 + 1 + 4 + 1) * C
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + (1 + biases) * C

    def flops_per_token(self) -> int:
        """Forward and backward: 6 N + 12 L H Q T (PaLM, appendix B, arXiv:2204.02311).

        N leaves out the position embeddings, as nanoGPT does; recomputation does not count.
        """
        n = self.parameter_count() - self.block_size * self.n_embd
        return 6 * n + 12 * self.n_layer * self.n_embd * self.block_size


class Pointwise(torch.autograd.Function):
    """The convolution over one position that a linear layer also is.

    PyTorch gives fp32 matmuls to MKL and convolutions to oneDNN, nearly twice as fast on AMD's cores. What is saved for
    backward is the parameter itself: a view would keep a gathered copy alive where parameters are partitioned.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (1, C_in, 1, N), weight (C_out, C_in), bias (C_out) -> (1, C_out, 1, N)"""
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight[:, :, None, None], bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        settings = ([len(weight)], (1, 1), (0, 0), (1, 1), False, (0, 0), 1, ctx.needs_input_grad)
        x, w, b = torch.ops.aten.convolution_backward(grad, x, weight[:, :, None, None], *settings)
        return x, w.flatten(1), b


class Linear(nn.Linear):
    """A linear layer that trains faster in fp32 on x86."""

    def reset_parameters(self) -> None:
        """Nothing: values come later (`initial_value`)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)"""
        in_fp32 = x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not (in_fp32 and ONEDNN and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return super().forward(x)
        pixels = x.reshape(1, 1, -1, x.size(-1)).permute(0, 3, 1, 2)  # channels last: no copy
        y = Pointwise.apply(pixels, self.weight, self.bias)
        return y.permute(0, 2, 3, 1).view(*x.shape[:-1], -1)


class LayerNorm(nn.LayerNorm):
    """A layer norm whose bias can be left out, in fp32 or in the model's own dtype."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, eps=1e-5, bias=config.bias)


class KVCache:
    """Keys and values of the tokens seen so far, (layers, 2, B, heads, T_max, head_size), for `generate`."""

    def __init__(self, config: GPTConfig, batch: int, dtype: torch.dtype, device: torch.device):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, head_size)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v, (B, heads, T, head_size), and return those of all tokens so far."""
        end = self.length + k.size(2)
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        # A single new token may look at everything; a prefill starts on an empty cache, so is_causal fits both.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=T > 1)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout, self.gelu = config.dropout, config.gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class CrossEntropy(torch.autograd.Function):
    """Mean cross entropy whose gradient overwrites the logits, a few rows at a time.

    The logits stay in the dtype of the matmul; only `rows` of them exist in fp32 at any moment. (PyTorch's own
    function, under autocast, holds three fp32 arrays of the logits' size: 2.4 GiB each for 12 x 1024 tokens of GPT-2.)
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (N, V), overwritten; targets (N,) int64. Returns a scalar in fp32."""
        rows = max(1, 2**21 // logits.size(1)) if logits.device.type == "cpu" else 2048  # on a CPU: stay in cache
        loss = torch.zeros((), device=logits.device)
        for part, target in zip(logits.split(rows), targets.unsqueeze(1).split(rows), strict=True):
            log_p = F.log_softmax(part, dim=1, dtype=torch.float32)
            loss -= log_p.gather(1, target).sum()
            # d loss / d logits = softmax - one-hot(target), over N
            grad = log_p.exp_().scatter_add_(1, target, target.new_full((), -1, dtype=torch.float32).expand_as(target))
            part.copy_(grad.div_(len(targets)))
        ctx.save_for_backward(logits)
        return loss / len(targets)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_loss), None


class Transformer(nn.Module):
    """Tokens to features: embeddings, blocks, the last layer norm."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        C, vocab_size, block_size = config.n_embd, config.vocab_size, config.block_size
        self.wte = nn.Embedding(vocab_size, C, _weight=torch.empty(vocab_size, C))  # given, it is not initialised
        self.wpe = nn.Embedding(block_size, C, _weight=torch.empty(block_size, C))
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = LayerNorm(config)
        self.recompute = partial(checkpoint, use_reentrant=False)  # how, where blocks are: a strategy may have its own

    def forward(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T) int64 -> (B, T, C)."""
        start = cache.length if cache is not None else 0
        T = tokens.size(1)
        assert start + T <= self.config.block_size, f"{start + T} tokens > block_size {self.config.block_size}"
        x = self.wte(tokens) + self.wpe(torch.arange(start, start + T, device=tokens.device))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            if self.config.activation_checkpointing and self.training:
                x = self.recompute(block, x)
            else:
                x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)


class GPT(nn.Module):
    """Uninitialised until `init_weights` or loaded weights: so it can be built on meta, sharded, then filled."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One matrix embeds the tokens and reads them out (Press & Wolf, 2017, arXiv:1608.05859)."""
        self.lm_head.weight = self.transformer.wte.weight

    def materialise(self, device: torch.device) -> "GPT":
        """From meta to real, still unfilled, memory."""
        self.to_empty(device=device)
        self.tie_weights()
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> "GPT":
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, self.config, seed))
        return self

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) int64 -> the mean loss in nats if targets (B, T) are given, else logits (B, V) of the last."""
        x = self.transformer(tokens, cache)
        if targets is None:
            return self.lm_head(x[:, -1])
        logits, targets = self.lm_head(x).flatten(0, 1), targets.flatten()
        if torch.compiler.is_compiling() or not logits.requires_grad:  # compiled: the fp32 copy is fused away
            return F.cross_entropy(logits.float(), targets)
        return CrossEntropy.apply(logits, targets)

    @torch.inference_mode()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        vocab_size: int | None = None,
    ) -> Tensor:
        """Continue tokens (B, T) by max_new_tokens: (B, T + new), int64. temperature 0 is greedy.

        ids from vocab_size on (the padding of the vocabulary) are never drawn. While everything fits in block_size
        each token costs one position (KV cache); past it the window slides, and as absolute positions then change
        for every token, each costs a whole forward.
        """
        block_size = self.config.block_size
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(self.parameters()).dtype
        cache = KVCache(self.config, tokens.size(0), dtype, tokens.device)
        for _ in range(max_new_tokens):
            fits = tokens.size(1) <= block_size
            logits = self(tokens[:, cache.length :], cache=cache) if fits else self(tokens[:, -block_size:])
            next_token = draw(logits[:, :vocab_size].float(), temperature, top_k, top_p)
            tokens = torch.cat((tokens, next_token), dim=1)
        return tokens


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """One token a row, (B, V) fp32 -> (B, 1) int64; nucleus sampling after Holtzman et al., arXiv:1904.09751."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = F.softmax(logits, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # keep the token that crosses top_p
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1)


def initial_value(name: str, shape: torch.Size, config: GPTConfig, seed: int) -> Tensor:
    """GPT-2's initial weights, on the CPU, fp32: a pure function of (seed, parameter name).

    Every parameter has its own generator, so any rank can make any parameter, in any order, bit for bit. Residual
    projections are scaled down by sqrt(2 * layers) (Radford et al., 2019, section 2.3).
    """
    module, kind = name.split(".")[-2:]
    if kind == "bias":
        return torch.zeros(shape)
    if module.startswith("ln_"):
        return torch.ones(shape)
    std = 0.02 / math.sqrt(2 * config.n_layer) if module == "c_proj" else 0.02
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.normal(0.0, std, shape, generator=generator)
