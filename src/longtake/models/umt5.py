"""Prompt -> text embedding as Wan2.1 makes it: the encoder of UMT5-XXL (arXiv 2304.09151), through transformers.

A prompt becomes 512 rows: one for each of its tokens, the last being the end mark, then zeros. The encoder never sees
the zeros. It has 5.7 billion parameters and is used for a moment only, so its answers are kept on disk, it is not even
read for a prompt whose answer is there, and it is on the device for no longer than it takes to encode.
"""

import hashlib
import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_of_tensors
from torch import Tensor, nn
from torch.nn.functional import pad

from longtake.models.disk_cache import DiskCache, cache_home

LENGTH = 512  # rows that Wan's networks were trained with
_MAX_DISTANCE = 128  # from here on all distances look alike: the one size that weights do not tell
_SAMPLES, _SAMPLE_BYTES = 256, 16384

_TO_TRANSFORMERS = (
    (r"token_embedding\.", "shared."),
    (r"norm\.", "encoder.final_layer_norm."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
"""Names of Wan's own file -> transformers' names."""


@dataclass(frozen=True, kw_only=True)
class UMT5Files:
    """Weight files of the encoder, and the folder of its tokenizer."""

    weights: tuple[Path, ...]
    tokenizer: Path

    @classmethod
    def in_folder(cls, folder: str | Path) -> "UMT5Files":
        """Those of a Wan2.1 model, in its own layout or in that of diffusers. ValueError if either is missing."""
        folder = Path(folder)
        weights = sorted(folder.glob("models_t5_umt5*.pth")) or sorted(folder.glob("text_encoder/*.safetensors"))
        if not weights:
            raise ValueError(f"no text encoder in {folder}: it is models_t5_umt5-xxl-enc-bf16.pth, or text_encoder/")
        tokenizers = [path for path in (folder / "google" / "umt5-xxl", folder / "tokenizer") if path.is_dir()]
        if not tokenizers:
            raise ValueError(f"no tokenizer in {folder}: it is the folder google/umt5-xxl, or tokenizer")
        return cls(weights=tuple(weights), tokenizer=tokenizers[0])

    def fingerprint(self) -> str:
        """A hash of the tokenizer's files and of samples spread over the weights, which takes no time to read."""
        digest = hashlib.sha256()
        for path in self.weights:
            size = path.stat().st_size
            digest.update(f"{size}\n".encode())
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        for path in sorted(path for path in self.tokenizer.iterdir() if path.is_file()):
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
        return digest.hexdigest()


class UMT5Text:
    """Text embeddings of prompts, each encoded once.

    A prompt is cleaned as Wan does; what goes beyond the length is cut off, the end mark kept.

    Args:
        files: of the encoder.
        device: where embeddings are wanted, and where the encoder goes while it encodes.
        dtype: of the encoder and of the embeddings.
        length: rows of an embedding, L.
        cache: a folder to keep embeddings in; by default one of the user's.

    Raises: ValueError for files that are not whole or not a UMT5 encoder, or where transformers is not installed.
    """

    def __init__(
        self,
        files: UMT5Files,
        *,
        device: str | torch.device,
        dtype: torch.dtype = torch.bfloat16,
        length: int = LENGTH,
        cache: Path | None = None,
    ) -> None:
        self.files, self.device, self.dtype, self.length = files, torch.device(device), dtype, length
        self._kind = f"{files.fingerprint()} {dtype} {length} {self.device.type}"
        self._cache = DiskCache(cache or cache_home() / "text")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, E] of B prompts, rows beyond a prompt's own are zero."""
        cleaned = [clean(prompt) for prompt in prompts]
        rows = {prompt: kept for prompt in cleaned if (kept := self._kept(prompt)) is not None}
        new = [prompt for prompt in dict.fromkeys(cleaned) if prompt not in rows]
        rows |= zip(new, self._encoded(new), strict=True)
        return torch.stack([padded(rows[prompt], self.length) for prompt in cleaned]).to(self.device)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode what was never encoded before, in one go, so that the encoder needs to come to the device once."""
        new = [prompt for prompt in dict.fromkeys(map(clean, prompts)) if self._kept(prompt) is None]
        for _ in self._encoded(new):
            pass

    def _key(self, prompt: str) -> str:
        return f"{self._kind}\n{prompt}"

    def _kept(self, prompt: str) -> Tensor | None:
        stored = self._cache.get(self._key(prompt))
        return None if stored is None else tensors_from_bytes(stored)["rows"]

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        """Rows [T, E] of each prompt on the host; they are kept at once, whatever comes after."""
        if not prompts:
            return
        with self._at_work() as encoder:
            for prompt in prompts:
                ids = self._tokenizer(prompt, max_length=self.length, truncation=True, return_tensors="pt").input_ids
                rows = rows_of(encoder, ids[0].to(self.device)).cpu()
                self._cache.put(self._key(prompt), bytes_of_tensors({"rows": rows}))
                yield rows

    @contextmanager
    def _at_work(self) -> Iterator[nn.Module]:
        """The encoder on the device. Its weights stay on the host as well, so that nothing has to come back."""
        encoder = self._encoder
        on_host = encoder.state_dict()
        try:
            yield encoder.to(self.device)
        finally:
            _assign(encoder, on_host)

    @cached_property
    def _encoder(self) -> nn.Module:
        return encoder_of(read_tensors(self.files.weights), self.dtype, str(self.files.weights[0]))

    @cached_property
    def _tokenizer(self) -> Any:
        folder = self.files.tokenizer
        try:
            return _wanted("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{folder} does not hold a tokenizer that can be read ({reason})") from None


def clean(prompt: str) -> str:
    """A prompt as Wan reads it: broken Unicode mended, HTML entities resolved, white space of any kind one space."""
    mended = _wanted("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(mended))).strip()


def rows_of(encoder: nn.Module, ids_T: Tensor) -> Tensor:
    """Embeddings [T, E] of a prompt's T tokens. Padding is masked where a batch has any, so none is needed here."""
    return encoder(input_ids=ids_T[None]).last_hidden_state[0]


def padded(rows_TE: Tensor, length: int) -> Tensor:
    """Rows [L, E], those beyond the prompt's own zero."""
    return pad(rows_TE, (0, 0, 0, length - len(rows_TE)))


def read_tensors(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of weight files, mapped into memory. ValueError for a file that is missing or not whole."""
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        yield name, file.get_tensor(name)
            else:
                yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path} is not a whole file of weights ({reason}): fetch it again") from None


def encoder_of(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: str = "this"
) -> nn.Module:
    """The encoder with these weights, under Wan's names or transformers', on the host and in one precision.

    Sizes are read off the weights. source: what they are called in complaints. ValueError for weights that do not make
    a UMT5 encoder, with the first few names that are missing or too many.
    """
    given = tensors.items() if isinstance(tensors, Mapping) else tensors
    state = {_transformers_name(name): tensor.to(dtype) for name, tensor in given}
    transformers = _wanted("transformers")
    try:
        config = transformers.UMT5Config(**_sizes(state))
    except KeyError as error:
        raise ValueError(f"{source} is not a UMT5 encoder: it has no {error.args[0]}") from None
    with torch.device("meta"):
        encoder = transformers.UMT5EncoderModel(config)
    state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
    own = encoder.state_dict()
    misfits = sorted(own.keys() ^ state.keys()) or sorted(name for name in own if own[name].shape != state[name].shape)
    if misfits:
        raise ValueError(
            f"{source} is not a UMT5 encoder: {len(misfits)} tensors do not fit ({', '.join(misfits[:3])})"
        )
    _assign(encoder, state)
    return encoder.requires_grad_(False).eval()


def _assign(encoder: Any, state: Mapping[str, Tensor]) -> None:
    encoder.load_state_dict(state, assign=True)
    encoder.encoder.set_input_embeddings(encoder.shared)  # one tensor again, not two that are equal


def _transformers_name(name: str) -> str:
    for pattern, replacement in _TO_TRANSFORMERS:
        renamed, count = re.subn(rf"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration that the shapes tell. KeyError for a name that is missing."""
    attention, ffn = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    words, dim = state["shared.weight"].shape
    buckets, heads = state[f"{attention}.relative_attention_bias.weight"].shape
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.block.")}
    return {
        "vocab_size": words,
        "d_model": dim,
        "d_kv": state[f"{attention}.q.weight"].shape[0] // heads,
        "d_ff": state[f"{ffn}.wi_0.weight"].shape[0],
        "num_layers": len(layers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": _MAX_DISTANCE,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }


def _wanted(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(f"Wan's text encoder needs {module}: pip install 'longtake[wan]'") from None
