"""Wan's text encoder at a tiny size: prompts to rows, kept on disk, the encoder on the device for a moment only."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.models import umt5
from longtake.models.umt5 import UMT5Files, UMT5Text, clean, encoder_of

pytest.importorskip("transformers")
pytest.importorskip("ftfy")

WORDS = ["</s>", "<pad>", "<unk>", "a", "red", "ball", "blue", "fox", "."]
DIM, HEADS, FFN, LAYERS, LENGTH = 16, 2, 24, 2, 12


def wan_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a tiny encoder, under Wan's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"token_embedding.weight": (len(WORDS), DIM), "norm.weight": (DIM,)}
    for layer in range(LAYERS):
        shapes |= {f"blocks.{layer}.attn.{letter}.weight": (DIM, DIM) for letter in "qkvo"}
        shapes |= {f"blocks.{layer}.{name}.weight": (DIM,) for name in ("norm1", "norm2")}
        shapes |= {f"blocks.{layer}.pos_embedding.embedding.weight": (32, HEADS)}
        shapes |= {f"blocks.{layer}.ffn.{name}.weight": (FFN, DIM) for name in ("gate.0", "fc1")}
        shapes |= {f"blocks.{layer}.ffn.fc2.weight": (DIM, FFN)}
    return {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model in Wan's own layout."""
    folder = tmp_path / "wan"
    write_tokenizer(folder / "google" / "umt5-xxl")
    torch.save(wan_tensors(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


def text_of(folder: Path, **options) -> UMT5Text:
    files = UMT5Files.in_folder(folder)
    return UMT5Text(files, device="cpu", length=LENGTH, cache=folder.parent / "cache", **options)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Numbers of tokens of the prompts that went through an encoder."""
    seen: list[int] = []
    real = umt5.rows_of
    monkeypatch.setattr(umt5, "rows_of", lambda encoder, ids: seen.append(len(ids)) or real(encoder, ids))
    return seen


def test_embeddings_are_the_encoders_rows_and_then_zeros(folder) -> None:
    got = text_of(folder, dtype=torch.float32).encode(["a red ball", "a fox"])
    assert got.shape == (2, LENGTH, DIM) and got.dtype == torch.float32
    encoder = encoder_of(wan_tensors(), torch.float32)
    ids = torch.tensor([[3, 4, 5, 0], [3, 7, 0, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    reference = encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    torch.testing.assert_close(got[:, :4], reference)
    assert not got[0, 4:].any() and not got[1, 3:].any()


def test_the_usual_precision_is_bfloat16(folder) -> None:
    text = text_of(folder)
    assert text.encode(["a red ball"]).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in text._encoder.parameters()} == {torch.bfloat16}


def test_a_prompt_is_encoded_once_however_it_is_spaced(folder, encoded) -> None:
    text = text_of(folder)
    first = text.encode(["a red ball", "  a red\n\tball ", "a&nbsp;fox", "a red ball"])
    assert sorted(encoded) == [3, 4]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[3]) and not torch.equal(first[0], first[2])
    again = text_of(folder)
    assert torch.equal(again.encode(["a red ball"])[0], first[0])
    assert len(encoded) == 2


def test_a_prompt_that_is_kept_needs_no_encoder(folder, monkeypatch) -> None:
    expected = text_of(folder).encode(["a fox"])
    monkeypatch.setattr(umt5, "encoder_of", lambda *_: pytest.fail("the encoder was read"))
    assert torch.equal(text_of(folder).encode(["a fox"]), expected)


def test_prepared_prompts_are_kept(folder, encoded, monkeypatch) -> None:
    text_of(folder).prepare(["a fox", "a ball", "a fox"])
    assert len(encoded) == 2
    monkeypatch.setattr(umt5, "encoder_of", lambda *_: pytest.fail("the encoder was read"))
    text_of(folder).encode(["a ball", "a fox"])


def test_a_damaged_entry_is_made_again(folder, encoded) -> None:
    expected = text_of(folder).encode(["a fox"])
    (entry,) = (folder.parent / "cache").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    assert torch.equal(text_of(folder).encode(["a fox"]), expected)
    assert torch.equal(text_of(folder).encode(["a fox"]), expected)
    assert len(encoded) == 2


def test_another_encoder_or_tokenizer_has_embeddings_of_its_own(folder, encoded) -> None:
    before = text_of(folder).encode(["a fox"])
    torch.save(wan_tensors(seed=1), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    assert not torch.equal(text_of(folder).encode(["a fox"]), before)
    (folder / "google" / "umt5-xxl" / "special_tokens_map.json").write_text("{}")
    text_of(folder).encode(["a fox"])
    text_of(folder, dtype=torch.float32).encode(["a fox"])
    assert len(encoded) == 4


def test_another_kind_of_device_has_embeddings_of_its_own(folder, monkeypatch) -> None:
    text = text_of(folder)
    text.prepare(["a fox"])
    monkeypatch.setattr(umt5, "encoder_of", lambda *_: (_ for _ in ()).throw(ValueError("the encoder was read")))
    text_of(folder).prepare(["a fox"])
    with pytest.raises(ValueError, match="the encoder was read"):
        UMT5Text(text.files, device="cuda", length=LENGTH, cache=folder.parent / "cache").prepare(["a fox"])


@pytest.mark.parametrize("breaks", [False, True])
def test_the_encoder_is_on_the_device_while_it_encodes_and_never_after(folder, monkeypatch, breaks) -> None:
    text = text_of(folder)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in text._encoder.state_dict().items()}
    text.device = torch.device("meta")  # stands for a GPU
    places = []

    def rows_of(encoder, ids):
        places.extend({tensor.device.type for tensor in encoder.state_dict().values()})
        return torch.zeros(len(ids) // (not breaks), DIM)

    monkeypatch.setattr(umt5, "rows_of", rows_of)
    with pytest.raises(ZeroDivisionError) if breaks else nullcontext():
        text.prepare(["a fox", "a ball"])
    assert places == ["meta"] * (1 if breaks else 2)
    for name, tensor in text._encoder.state_dict().items():
        place, value = before[name]
        assert tensor.data_ptr() == place and torch.equal(tensor, value)


def test_what_is_too_long_is_cut_before_the_end_mark(folder) -> None:
    long, longer = text_of(folder).encode(["red " * (LENGTH - 1), "red " * LENGTH])
    assert torch.equal(long, longer)
    assert long[-1].any()


@pytest.mark.parametrize(
    "said, read",
    [
        (" a \u3000 red\r\n ball ", "a red ball"),
        ("a fox &amp;amp; a ball", "a fox & a ball"),
        ("a <big> fox &amp;lt;3", "a <big> fox <3"),
        ("it â€™ s", "it ' s"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_does(said, read) -> None:
    assert clean(said) == read


def test_names_of_transformers_are_read_too(folder, tmp_path) -> None:
    other = tmp_path / "diffusers"
    write_tokenizer(other / "tokenizer")
    (other / "text_encoder").mkdir()
    encoder = encoder_of(wan_tensors(), torch.float32)
    state = {name: tensor for name, tensor in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    first = dict(list(state.items())[:5])
    save_file(first, other / "text_encoder" / "model-00001-of-00002.safetensors")
    rest = {name: tensor for name, tensor in state.items() if name not in first}
    save_file(rest, other / "text_encoder" / "model-00002-of-00002.safetensors")
    assert torch.equal(text_of(other).encode(["a red ball"]), text_of(folder).encode(["a red ball"]))


def test_names_and_sizes_of_the_xxl_encoder() -> None:
    dim, ffn, heads, layers, words = 4096, 10240, 64, 24, 256384
    with torch.device("meta"):
        tensors = {"token_embedding.weight": torch.empty(words, dim), "norm.weight": torch.empty(dim)}
        for layer in range(layers):
            tensors |= {f"blocks.{layer}.attn.{letter}.weight": torch.empty(dim, dim) for letter in "qkvo"}
            tensors |= {f"blocks.{layer}.{name}.weight": torch.empty(dim) for name in ("norm1", "norm2")}
            tensors[f"blocks.{layer}.pos_embedding.embedding.weight"] = torch.empty(32, heads)
            tensors |= {f"blocks.{layer}.ffn.{name}.weight": torch.empty(ffn, dim) for name in ("gate.0", "fc1")}
            tensors[f"blocks.{layer}.ffn.fc2.weight"] = torch.empty(dim, ffn)
    encoder = encoder_of(tensors, torch.bfloat16)
    assert (len(tensors), sum(parameter.numel() for parameter in encoder.parameters())) == (242, 5_680_910_336)
    config = encoder.config
    assert (config.d_kv, config.num_layers, config.num_heads, config.relative_attention_max_distance) == (
        64,
        24,
        64,
        128,
    )
    assert (config.dense_act_fn, config.is_gated_act, config.layer_norm_epsilon) == ("gelu_new", True, 1e-6)


def test_word_embeddings_are_held_once() -> None:
    encoder = encoder_of(wan_tensors(), torch.float32)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


# bad input


def without(folder: Path, name: str) -> None:
    path = folder / name
    path.unlink() if path.is_file() else path.rename(folder / "elsewhere")


@pytest.mark.parametrize(
    "name, says", [("models_t5_umt5-xxl-enc-bf16.pth", "no text encoder in"), ("google/umt5-xxl", "no tokenizer in")]
)
def test_missing_files_are_named(folder, name, says) -> None:
    without(folder, name)
    with pytest.raises(ValueError, match=says):
        text_of(folder)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kept", [0, 100, 4000])
def test_a_file_that_is_not_whole_is_one_line(folder, kept) -> None:
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError) as error:
        text_of(folder).encode(["a fox"])
    assert "models_t5_umt5-xxl-enc-bf16.pth is not a whole file of weights" in one_line(error)


@pytest.mark.parametrize("broken", ["", "{}", "{nonsense"])
def test_a_broken_tokenizer_is_one_line(folder, broken) -> None:
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text(broken)
    with pytest.raises(ValueError) as error:
        text_of(folder).encode(["a fox"])
    assert "does not hold a tokenizer that can be read" in one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        {"blocks.1.norm2.weight": None},
        {"token_embedding.weight": None},
        {"extra.weight": torch.zeros(1)},
        {"blocks.1.norm2.weight": torch.zeros(DIM + 1)},
    ],
)
def test_other_weights_are_refused_by_name(change) -> None:
    tensors = {name: tensor for name, tensor in (wan_tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match="is not a UMT5 encoder") as error:
        encoder_of(tensors, torch.float32)
    assert one_line(error)


def test_without_transformers_it_says_what_to_install(folder, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"pip install 'longtake\[wan\]'"):
        text_of(folder).encode(["a fox"])
