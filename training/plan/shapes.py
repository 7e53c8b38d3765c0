"""Shapes of models by name: how many parameters, how much work, by arithmetic.

GPT-2: Radford et al. (2019), table 2. GPT-3: arXiv:2005.14165, table 2.1. LLaMA: arXiv:2302.13971, table 2, and
arXiv:2307.09288 for the second; their MLP has three matrices (SwiGLU), the norms no biases, the output its own matrix.
"""

import difflib
from dataclasses import dataclass

from model import GPTConfig
from training.errors import UserError

GPT2_IDS, GPT3_CONTEXT, LLAMA_IDS = 50257, 2048, 32000
ASPECT = 128  # width / layers of a model of which only the size is known; GPT-3's from 6.7B on are near it


@dataclass(frozen=True)
class Shape:
    name: str
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = GPT2_IDS
    block_size: int = 1024
    bias: bool = True
    hidden: int = 0  # width of LLaMA's MLP; 0: a GPT, with 4 n_embd
    given: int = 0  # parameters, where only their number is known
    dropout: float = 0.0

    def gpt(self) -> GPTConfig:
        shape = self.vocab_size, self.n_layer, self.n_head, self.n_embd
        return GPTConfig(self.block_size, *shape, dropout=self.dropout, bias=self.bias)

    def parameter_count(self) -> int:
        if self.given:
            return self.given
        if not self.hidden:
            return self.gpt().parameter_count()
        return 2 * self.head() + self.n_layer * (4 * self.n_embd**2 + 3 * self.n_embd * self.hidden) + self.vectors()

    def head(self) -> int:
        """Parameters of the matrix that reads the tokens out; a GPT's embeds them as well."""
        return self.vocab_size * self.n_embd

    def vectors(self) -> int:
        """Parameters with one dimension, norms and biases: ZeRO-3 leaves these whole on every rank."""
        biases = 0 if self.hidden else int(self.bias)
        return (self.n_layer * (2 + biases * 11) + 1 + biases) * self.n_embd

    def block(self) -> int:
        """Parameters of a block."""
        outside = 2 * self.head() if self.hidden else self.head() + self.block_size * self.n_embd
        return max(1, self.parameter_count() - outside) // self.n_layer

    def flops_per_token(self) -> float:
        """Forward and backward, 6 N + 12 L H Q T (PaLM, appendix B, arXiv:2204.02311); N: what matmuls multiply by."""
        looked_up = 0 if self.given else self.head() if self.hidden else self.block_size * self.n_embd
        return 6 * (self.parameter_count() - looked_up) + 12 * self.n_layer * self.n_embd * self.block_size


def gpt3(name: str, n_layer: int, n_head: int, n_embd: int) -> Shape:
    return Shape(f"gpt3-{name}", n_layer, n_head, n_embd, block_size=GPT3_CONTEXT)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2", 12, 12, 768),
        Shape("gpt2-medium", 24, 16, 1024),
        Shape("gpt2-large", 36, 20, 1280),
        Shape("gpt2-xl", 48, 25, 1600),
        gpt3("125m", 12, 12, 768),
        gpt3("350m", 24, 16, 1024),
        gpt3("760m", 24, 16, 1536),
        gpt3("1.3b", 24, 16, 2048),  # the paper's 24 heads of 128 would be wider than the model
        gpt3("2.7b", 32, 32, 2560),
        gpt3("6.7b", 32, 32, 4096),
        gpt3("13b", 40, 40, 5120),  # the paper's width of 5140 is not 40 heads of 128
        gpt3("175b", 96, 96, 12288),
        Shape("llama2-7b", 32, 32, 4096, LLAMA_IDS, 4096, False, 11008),
        Shape("llama2-13b", 40, 40, 5120, LLAMA_IDS, 4096, False, 13824),
        Shape("llama-65b", 80, 64, 8192, LLAMA_IDS, 2048, False, 22016),
    )
}


def named(name: str) -> Shape:
    """UserError with the nearest name where there is none such."""
    if name.lower() not in SHAPES:
        near = difflib.get_close_matches(name.lower(), SHAPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SHAPES)}; or --parameters=7.5e9"
        raise UserError(f"model = {name!r}: unknown; {hint}")
    return SHAPES[name.lower()]


def sized(parameters: int) -> Shape:
    """Of a GPT with so many parameters: 12 n_layer n_embd² of them, n_embd = 128 n_layer, in heads of 128."""
    n_layer = max(1, round((parameters / (12 * ASPECT**2)) ** (1 / 3)))
    name = f"{parameters / 1e9:,.3g}B parameters"
    return Shape(name, n_layer, n_layer, ASPECT * n_layer, block_size=GPT3_CONTEXT, given=parameters)
