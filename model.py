"""GPT-2 (Radford et al., 2019) and the Llama kind, under nanoGPT's parameter names: model, loss, generation, weights.

Imports torch only: the model does not know about ranks, strategies or files. A new parameter needs a rule in
`initial_value`; a new buffer is registered in its module's `reset_buffers`, which the constructor calls, and
`GPT.materialize` again for a model that was built on the meta device.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """Shape and options of the model. The defaults are GPT-2's; other families set these:

                GPT-2      Llama 2, 3, Mistral, SmolLM2   Qwen2.5        Qwen3
    norm        layernorm  rmsnorm                        rmsnorm        rmsnorm, qk_norm
    mlp         gelu       swiglu                         swiglu         swiglu
    positions   learned    rope_theta (Llama 3: scaled)   rope_theta     rope_theta
    biases      bias       none                           qkv_bias       none
    attention   n_head     n_kv_head (Llama 2 7B: none)   n_kv_head      n_kv_head, head_size
    lm_head     tied       untied, in small models tied
    """

    block_size: int = 1024  # positions
    vocab_size: int = 50304  # GPT-2's 50,257 rounded up to a multiple of 64, which makes matmuls faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as in GPT-2; False is slightly faster
    gelu: str = "none"  # "none": exact; "tanh": the approximation that OpenAI's GPT-2 was trained with
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more FLOPs
    n_kv_head: int = 0  # heads of keys and values, each for a group of query heads (arXiv:2305.13245); 0: n_head
    head_size: int = 0  # 0: n_embd / n_head
    n_hidden: int = 0  # width inside the MLP; 0: 4 n_embd
    mlp: str = "gelu"  # or swiglu (Shazeer, arXiv:2002.05202), relu2 (So et al., arXiv:2109.08668)
    norm: str = "layernorm"  # or rmsnorm (Zhang & Sennrich, arXiv:1910.07467)
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm of queries and keys
    qkv_bias: bool = False  # biases of queries, keys and values even if the rest has none
    rope_theta: float = 0.0  # base of rotary position embeddings (Su et al., arXiv:2104.09864); 0: learned positions
    rope_factor: float = 1.0  # Llama 3's stretching of slow rotations: 8 in Llama 3.1
    rope_length: int = 8192  # positions before the stretching
    n_expert: int = 0  # MLPs per block, of which a router picks some for each token (arXiv:1701.06538); 0: one, for all
    n_active: int = 2  # experts per token
    tied: bool = True  # whether lm_head shares its matrix with the token embedding

    def __post_init__(self) -> None:
        defaults = {"n_kv_head": self.n_head, "head_size": self.n_embd // max(1, self.n_head)}
        for name, size in {**defaults, "n_hidden": 4 * self.n_embd}.items():
            object.__setattr__(self, name, getattr(self, name) or size)  # the dataclass is frozen

    @cache  # noqa: B019 (equal configs share an entry, which is small)
    def parameter_count(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in GPT(self).parameters())

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward: 6 N + 12 L H Q T (PaLM, appendix B, arXiv:2204.02311).

        N excludes embeddings that are only looked up, as in nanoGPT. Recomputed activations are not counted.
        """
        looked_up = ((0 if self.rope_theta else self.block_size) + (0 if self.tied else self.vocab_size)) * self.n_embd
        idle_experts = self.n_layer * max(0, self.n_expert - self.n_active) * 3 * self.n_embd * self.n_hidden
        n = self.parameter_count() - looked_up - idle_experts
        return 6 * n + 12 * self.n_layer * self.n_head * self.head_size * self.block_size


class Linear(nn.Linear):
    """nn.Linear without nn.Linear's own initialization, which `initial_value` or a checkpoint would overwrite."""

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialized."""


def make_norm(config: GPTConfig) -> nn.LayerNorm | nn.RMSNorm:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


def rotations(config: GPTConfig) -> Tensor:
    """Cosines and sines of each position's angles, (2, block_size, head_size), fp32."""
    # From integers, because within DeepSpeed's zero.Init a floating-point arange is in bf16.
    frequencies = 1 / config.rope_theta ** (torch.arange(0, config.head_size, 2).float() / config.head_size)
    if config.rope_factor != 1:  # between 1 and 4 rotations within rope_length partly stretched, as in Llama 3.1
        share = ((frequencies * config.rope_length / (2 * math.pi) - 1) / 3).clamp(0, 1)
        frequencies = frequencies * (share + (1 - share) / config.rope_factor)
    angles = torch.outer(torch.arange(config.block_size).float(), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, heads, T, head_size), rotation (2, T, head_size) -> the same shape; halves are rotated together."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache:
    """Keys and values of the tokens so far, each (B, heads, T, head_size), by layer, for `generate`."""

    def __init__(self) -> None:
        self.length, self.layers = 0, dict[int, tuple[Tensor, Tensor]]()

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v, and return the layer's keys and values of all tokens so far."""
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and to earlier tokens, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        heads, kv_heads, size = config.n_head, config.n_kv_head, config.head_size
        self.c_attn = Linear(config.n_embd, (heads + 2 * kv_heads) * size, bias=config.bias or config.qkv_bias)
        self.c_proj = Linear(heads * size, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.group, self.size = heads // kv_heads, size  # query heads for each head of keys and values
        self.dropout, self.layer = config.dropout, layer
        self.attend = F.scaled_dot_product_attention  # sequence parallelism replaces it

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (-1, self.size)).transpose(1, 2)  # a rank may have some of the heads only
        kv_heads = qkv.size(1) // (self.group + 2)
        q, k, v = qkv.split((self.group * kv_heads, kv_heads, kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        # A single new token attends to the whole cache. Longer inputs start with an empty cache: the plain causal mask.
        dropout, causal = self.dropout if self.training else 0.0, x.size(1) > 1
        y = self.attend(q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=self.group > 1)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with an activation between them, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = (2 if config.mlp == "swiglu" else 1) * config.n_hidden  # swiglu: gate and value, one above the other
        self.c_fc = Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout, self.kind, self.gelu = config.dropout, config.mlp, config.gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.kind == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.relu(x).square() if self.kind == "relu2" else F.gelu(x, approximate=self.gelu)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Router(nn.ModuleDict):
    """Has `gate`, which scores the experts, (N, C) -> (N, n_expert). DeepSpeed's router has the same names."""

    @property
    def weight(self) -> Tensor:
        return self["gate"].weight  # type: ignore[return-value]


class Experts(nn.Module):
    """SwiGLU MLPs, stacked: gates w1 and values w3 (n_expert, n_hidden, C), projections w2 (n_expert, C, n_hidden)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        shape = config.n_expert, config.n_hidden, config.n_embd
        self.w1, self.w3 = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x (N, C), sorted by expert; counts (n_expert,): the number of rows of each."""
        w1, w2, w3 = (w.to(x.dtype).mT for w in (self.w1, self.w2, self.w3))
        multiply = partial(F.grouped_mm, offs=counts.cumsum(0, dtype=torch.int32))
        return multiply(F.silu(multiply(x, w1)) * multiply(x, w3), w2)


class MoE(nn.Module):
    """Mixture of experts, (B, T, C) -> (B, T, C): each token goes through its n_active best; none is dropped."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.router = Router({"gate": Linear(config.n_embd, config.n_expert, bias=False)})
        self.experts, self.n_active = Experts(config), config.n_active

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = self.router["gate"](tokens)
        weights, chosen = F.softmax(scores.float(), dim=-1).topk(self.n_active)  # (N, n_active)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=scores.size(-1))
        sorted_y = self.experts(tokens.to(scores.dtype)[order // self.n_active], counts)  # under autocast: its dtype
        y = torch.empty_like(sorted_y).index_copy(0, order, sorted_y).unflatten(0, chosen.shape)
        return (y * weights.unsqueeze(-1)).sum(1).type_as(x).view_as(x)


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MoE(config) if config.n_expert else MLP(config)

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation, cache)
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
    """Embeddings, blocks and the final norm: everything but the output projection."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        C, vocab_size, block_size = config.n_embd, config.vocab_size, config.block_size
        # With _weight given, nn.Embedding skips its own initialization.
        self.wte = nn.Embedding(vocab_size, C, _weight=torch.empty(vocab_size, C))
        if config.rope_theta:
            self.reset_buffers()
        else:
            self.wpe = nn.Embedding(block_size, C, _weight=torch.empty(block_size, C))
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = make_norm(config)
        self.first_position = 0  # under sequence parallelism, of this rank's part of the sequence
        self.recompute = partial(checkpoint, use_reentrant=False)  # train_deepspeed.py may replace it by DeepSpeed's

    def reset_buffers(self) -> None:
        self.rotations: Tensor
        self.register_buffer("rotations", rotations(self.config), persistent=False)

    def forward(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T) int64 -> (B, T, C)"""
        start = self.first_position + (cache.length if cache is not None else 0)
        T = tokens.size(1)
        assert start + T <= self.config.block_size, f"{start + T} tokens > block_size {self.config.block_size}"
        x, rotation = self.wte(tokens), None
        if self.config.rope_theta:
            rotation = self.rotations[:, start : start + T]
        else:
            x = x + self.wpe(torch.arange(start, start + T, device=tokens.device))
        x = F.dropout(x, self.config.dropout, self.training)
        checkpointing = self.config.activation_checkpointing and self.training
        for block in self.h:
            x = self.recompute(block, x, rotation) if checkpointing else block(x, rotation, cache)
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
        if self.config.tied:
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
    def generate(self, tokens: Tensor, max_new_tokens: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Append tokens to tokens (B, T): (B, T + max_new_tokens), int64. choose: logits (B, V) -> the next ids (B, 1).

        The KV cache makes a token cost one position until block_size is full; after that the window slides, and each
        token costs a full forward. cuDNN's attention is left out, because it plans anew for every length of the keys.
        """
        block_size, cache = self.config.block_size, KVCache()
        for _ in range(max_new_tokens):
            fits = tokens.size(1) <= block_size
            logits = self(tokens[:, cache.length :], cache=cache) if fits else self(tokens[:, -block_size:])
            tokens = torch.cat((tokens, choose(logits)), dim=1)
        return tokens


def initial_value(name: str, shape: torch.Size, config: GPTConfig, seed: int) -> Tensor:
    """Initial value of a parameter, fp32, on the CPU: a pure function of (seed, parameter name).

    Every parameter has its own generator, so that any rank can create any parameter, in any order, bit-identical.
    Raises ValueError for a parameter without a rule below.
    """
    module, kind = ["", *name.split(".")][-2:]
    stds = dict.fromkeys(("wte", "wpe", "lm_head", "c_attn", "c_fc", "gate", "w1", "w3"), 0.02)
    stds |= dict.fromkeys(("c_proj", "w2"), 0.02 / math.sqrt(2 * config.n_layer))  # Radford et al., 2019, section 2.3
    matrix = kind if module == "experts" else module if kind == "weight" else ""
    if matrix in stds:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        return torch.normal(0.0, stds[matrix], shape, generator=generator)
    norms = ("ln_1", "ln_2", "ln_f", "q_norm", "k_norm")
    if kind == "weight" and module in norms:
        return torch.ones(shape)
    if kind == "bias" and (module in stds or module in norms):
        return torch.zeros(shape)
    raise ValueError(f"parameter {name!r} has no initial value: add a rule for {module!r} to initial_value in model.py")
