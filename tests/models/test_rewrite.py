"""Prompts written out by a chat model: behind a loopback endpoint, and a tiny one through transformers."""

import http.client
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.chat_server import chat_server
from tests.processes import run

from longtake.cli import main
from longtake.models.rewrite import Endpoint, LocalChat, Rewriter, as_prompt, chat_named, words_beside

NINETY = " ".join(["word"] * 90)


class Scripted:
    """A chat model that gives its answers in turn, and keeps what it was told."""

    name = "scripted"

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.told: list[list[dict]] = []

    def answer(self, messages) -> str:
        self.told.append(list(messages))
        return self.answers.pop(0)


@pytest.fixture(autouse=True)
def no_key(monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_the_request_is_the_papers(tmp_path) -> None:
    chat = Scripted(NINETY)
    assert Rewriter(chat, tmp_path).rewrite(["a red ball"]) == [NINETY]
    ((system, user),) = chat.told
    assert (system["role"], user) == ("system", {"role": "user", "content": "a red ball"})
    assert all(word in system["content"] for word in ("Infer", "motion", "80 to 100 English words"))


def test_what_was_written_is_kept(tmp_path) -> None:
    assert Rewriter(Scripted(NINETY), tmp_path).rewrite(["a red ball"]) == [NINETY]
    assert Rewriter(Scripted(), tmp_path).rewrite(["a red ball"]) == [NINETY]
    other = Scripted(NINETY + " more")
    other.name = "another"
    assert Rewriter(other, tmp_path).rewrite(["a red ball"]) == [NINETY + " more"]


def test_a_later_prompt_of_a_video_knows_what_was_shown_before(tmp_path) -> None:
    chat = Scripted(NINETY, NINETY + " snow")
    assert Rewriter(chat, tmp_path).rewrite(["a red ball", "it snows"]) == [NINETY, NINETY + " snow"]
    asked = chat.told[1][1]["content"]
    assert NINETY in asked and asked.endswith("The prompt from now on: it snows")


def test_a_wrong_length_is_said_and_tried_again(tmp_path) -> None:
    chat = Scripted("too short", NINETY)
    assert Rewriter(chat, tmp_path).rewrite(["a red ball"]) == [NINETY]
    assert chat.told[1][2:] == [
        {"role": "assistant", "content": "too short"},
        {"role": "user", "content": "These are 2 words. Write it again in 80 to 100 words."},
    ]


def test_of_three_tries_the_nearest_is_taken(tmp_path) -> None:
    chat = Scripted("one", " ".join(["word"] * 110), "one two")
    (text,) = Rewriter(chat, tmp_path).rewrite(["a red ball"])
    assert (len(text.split()), chat.answers) == (110, [])


def test_no_text_at_all_is_an_error_and_is_not_kept(tmp_path) -> None:
    with pytest.raises(ValueError, match="scripted wrote nothing for 'a red ball'"):
        Rewriter(Scripted("", ' "" ', "<think>hm</think>"), tmp_path).rewrite(["a red ball"])
    assert Rewriter(Scripted(NINETY), tmp_path).rewrite(["a red ball"]) == [NINETY]
    with pytest.raises(ValueError, match="the prompt is empty"):
        Rewriter(Scripted(NINETY), tmp_path).rewrite([" "])


@pytest.mark.parametrize(
    "answer, prompt",
    [
        ("A red ball\n\n bounces. ", "A red ball bounces."),
        ('"A red ball."', "A red ball."),
        ("“A red ball.”", "A red ball."),
        ('"Yes" says a sign and "no" another', '"Yes" says a sign and "no" another'),
        ('"Yes" and "no"', '"Yes" and "no"'),
        ("<think>What\nnow?</think>\nA red ball.", "A red ball."),
        ("What\nnow?</think>\nA red ball.", "A red ball."),
        ("<think>What now? A red", ""),
        ("<think>What?</think> <think>Or", ""),
    ],
)
def test_answers_become_prompts(answer, prompt) -> None:
    assert as_prompt(answer) == prompt


@given(st.integers(0, 300))
def test_lengths_are_measured_from_both_ends(count) -> None:
    beside = words_beside(" ".join(["word"] * count))
    assert beside == min(abs(count - good) for good in range(80, 101))


# endpoints


def test_an_endpoint_is_asked_as_openai_clients_ask(tmp_path, monkeypatch) -> None:
    with chat_server(answer=lambda messages: NINETY) as server:
        assert Rewriter(Endpoint(server.url + "/"), tmp_path).rewrite(["ein Ball"]) == [NINETY]
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert Rewriter(chat_named(f"other/model@{server.url}", "cpu"), tmp_path).rewrite(["ein Ball"]) == [NINETY]
    assert [body["model"] for body in server.asked] == ["tiny-chat", "other/model"]
    assert server.keys == [None, "Bearer secret"]
    assert server.asked[0]["messages"][1]["content"] == "ein Ball" and server.asked[0]["temperature"] == 0


@pytest.mark.parametrize("models, says", [((), "has 0 models"), (("a", "b"), r"has 2 models \(a, b\): say which")])
def test_the_only_model_is_meant_unless_one_is_named(models, says) -> None:
    with chat_server(models=models) as server, pytest.raises(ValueError, match=says):
        Endpoint(server.url).answer([])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"answer": lambda messages: b"<html>", "status": 200}, "answered, but not with JSON"),
        ({"answer": lambda messages: b"{}", "status": 200}, "answered, but not with a chat completion"),
        ({"answer": lambda messages: b'{"choices": []}', "status": 200}, "answered, but not with a chat completion"),
        ({"answer": lambda messages: b"no such\nkey", "status": 401}, "answered 401 Unauthorized: no such key"),
        ({"answer": lambda messages: b"\xff", "status": 500}, "answered 500 Internal Server Error"),
    ],
)
def test_a_failing_endpoint_is_one_line(options, says) -> None:
    with chat_server(**options) as server, pytest.raises(ValueError) as error:
        Endpoint(server.url, "m").answer([])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_endpoint_that_is_not_there_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ValueError, match=f"{url} does not answer: .*refused"):
            Endpoint(url).answer([])


def test_an_address_that_is_none_and_an_answer_that_breaks_off_are_one_line(monkeypatch) -> None:
    with pytest.raises(ValueError, match="http://host:abc/v1 does not answer: nonnumeric port"):
        Endpoint("http://host:abc/v1").answer([])

    def broken(*_, **__):
        raise http.client.IncompleteRead(b"{", 100)

    monkeypatch.setattr("urllib.request.urlopen", broken)
    with pytest.raises(ValueError, match="does not answer: IncompleteRead"):
        Endpoint("http://127.0.0.1:1/v1").answer([])


# through transformers


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory) -> Path:
    """A random chat model of four words."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "red": 2, "ball": 3, "</s>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=4, bos_token_id=None, pad_token_id=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_local_model_answers_the_same_each_time(tiny_chat, monkeypatch) -> None:
    monkeypatch.setattr("longtake.models.rewrite._NEW_TOKENS", 20)
    messages = [{"role": "user", "content": "a red ball"}]
    answers = {LocalChat(str(tiny_chat), "cpu").answer(messages) for _ in range(2)}
    (answer,) = answers
    assert answer and set(answer.split()) <= {"<unk>", "a", "red", "ball"}
    chat = LocalChat(str(tiny_chat), "cpu")
    tokenizer, model = chat._loaded
    ids = tokenizer("user a red ball ", return_tensors="pt").input_ids
    for _ in range(20):  # the slow way: the likeliest word, one after another
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 4:
            break
    assert answer == tokenizer.decode(ids[0, 4:], skip_special_tokens=True)


def test_what_is_no_chat_model_is_one_line(tiny_chat, tmp_path) -> None:
    with pytest.raises(ValueError, match="no chat model can be read from") as error:
        LocalChat(str(tmp_path), "cpu").answer([])
    assert "\n" not in str(error.value)
    tokenizer, model = LocalChat(str(tiny_chat), "cpu")._loaded
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a chat model") as error:
        LocalChat(str(tmp_path), "cpu").answer([{"role": "user", "content": "a"}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["some/chat", "/no/such/folder"])
def test_without_a_network_a_name_that_is_not_cached_is_one_line(name, tmp_path) -> None:
    pytest.importorskip("transformers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        nobody = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        done = run(main, ["generate", "a red ball", "--rewrite", name, "--device", "cpu"], **nobody)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 2 and said.startswith(f"longtake: no chat model can be read from {name}: ")


def test_names_of_chat_models() -> None:
    local = chat_named("Qwen/Qwen2.5-7B-Instruct", "cpu")
    assert isinstance(local, LocalChat) and local.name == "Qwen/Qwen2.5-7B-Instruct"
    named = chat_named("qwen2.5:7b@http://127.0.0.1:11434/v1", "cpu")
    assert isinstance(named, Endpoint) and (named.model, named.url) == ("qwen2.5:7b", "http://127.0.0.1:11434/v1")
