"""Prompt -> text embedding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class WordEncoderConfig:
    """Sizes of the small encoder that is trained together with a network."""

    words: int
    length: int
    dim: int
    heads: int = 4
    layers: int = 2


class WordEncoder(nn.Module):
    """A small transformer over word numbers, padding (0) too: [B, L] -> [B, L, E]. All padding means "no prompt"."""

    def __init__(self, config: WordEncoderConfig):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.words, config.dim)
        self.places = nn.Parameter(torch.randn(config.length, config.dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, 4 * config.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(config.dim), enable_nested_tensor=False)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.layers(self.words(tokens_BL) + self.places)

    def no_prompt(self, count: int) -> Tensor:
        """Tokens [count, L] of the absent prompt that guidance compares with."""
        return torch.zeros(count, self.config.length, dtype=torch.long, device=self.places.device)


@dataclass(frozen=True)
class WordText:
    """Text embeddings of prompts, through a tokenizer (which raises ValueError for words it does not know).

    Prompts are padded to the encoder's length; a longer one raises ValueError.
    """

    encoder: WordEncoder
    tokenize: Callable[[str], list[int]]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, E] of B prompts."""
        rows = [self._padded(self.tokenize(prompt)) for prompt in prompts]
        return self.encoder(torch.tensor(rows, device=self.encoder.places.device))

    def prepare(self, prompts: Sequence[str]) -> None:
        """ValueError for a prompt that cannot be read; there is nothing else to do ahead."""
        for prompt in prompts:
            self._padded(self.tokenize(prompt))

    def _padded(self, tokens: list[int]) -> list[int]:
        length = self.encoder.config.length
        if len(tokens) > length:
            raise ValueError(f"the prompt has {len(tokens)} words, at most {length} can be read: say it shorter")
        return tokens + [0] * (length - len(tokens))
