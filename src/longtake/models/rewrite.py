"""Short prompts written out by a chat model, as evaluations of Hybrid Forcing and Wan2.1 have them written out.

Details that a prompt leaves open are inferred, motion is stressed, and the result has 80 to 100 English words
(arXiv 2604.10103, supplement). The wording of the request is ours.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from longtake.models.disk_cache import DiskCache, cache_home

WORDS = range(80, 101)
_TRIES = 3
_SECONDS = 300.0  # to wait for an endpoint
_HUB_SECONDS = 10.0  # to wait for the hub
_NEW_TOKENS = 400  # 100 English words are some 130

INSTRUCTIONS = f"""\
You write prompts for a model that makes videos. You are given a short prompt. Write it out as one paragraph of \
{WORDS[0]} to {WORDS[-1]} English words that says what is seen, whatever language the prompt is in.
Keep all that the prompt says: its subjects and their number, what they do, its style, words in quotation marks.
Infer what it leaves open: how subjects look, their expression and posture, where they are beside each other, the \
place, the light, the framing. Choose a style that suits, where the prompt names none.
Stress motion: say in plain verbs how each subject moves, and how the camera moves.
If you are told what the same shot showed until now, keep its subjects and its place but for what the prompt changes.
Answer with the paragraph alone: no title, no quotation marks around it, no remarks."""

Message = dict[str, str]
"""role: system, user or assistant. content: what is said."""


class Chat(Protocol):
    """A chat model. name: tells it from others. answer: what it says next; ValueError where it cannot."""

    @property
    def name(self) -> str: ...

    def answer(self, messages: Sequence[Message]) -> str: ...


class Rewriter:
    """Writes the prompts of a video out. What was written is kept on disk, so a prompt is written out once.

    cache: a folder; by default one of the user's.
    """

    def __init__(self, chat: Chat, cache: Path | None = None) -> None:
        self._chat = chat
        self._cache = DiskCache(cache or cache_home() / "rewritten")

    def rewrite(self, prompts: Iterable[str]) -> list[str]:
        """The prompts of one video in their order, each written out with the one before it in mind.

        Of three tries the one whose length is nearest to what is asked for. ValueError where the model does not answer.
        """
        written: list[str] = []
        for prompt in prompts:
            written.append(self._written(prompt, written[-1] if written else None))
        return written

    def _written(self, prompt: str, before: str | None) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to show")
        asked = prompt if before is None else f"Until now the shot showed: {before}\nThe prompt from now on: {prompt}"
        key = "\n".join((self._chat.name, INSTRUCTIONS, asked))
        kept = self._cache.get(key)
        if kept is not None:
            return kept.decode()
        text = self._nearest(asked)
        self._cache.put(key, text.encode())
        return text

    def _nearest(self, asked: str) -> str:
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": asked}]
        texts = []
        for _ in range(_TRIES):
            text = as_prompt(self._chat.answer(messages))
            texts.append(text)
            if words_beside(text) == 0:
                break
            again = f"These are {len(text.split())} words. Write it again in {WORDS[0]} to {WORDS[-1]} words."
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": again}]
        if not any(texts):
            raise ValueError(f"{self._chat.name} wrote nothing for {asked!r}")
        return min(filter(None, texts), key=words_beside)


def as_prompt(answer: str) -> str:
    """An answer in one line, without thoughts in front of it and quotation marks around it.

    Empty, where thoughts do not end. They need not begin: some chat templates begin them for the model.
    """
    spoken = answer.rpartition("</think>")[2]
    line = "" if "<think>" in spoken else " ".join(spoken.split())
    quoted = re.fullmatch(r"\"([^\"]*)\"|“([^”]*)”", line)
    return (quoted[1] or quoted[2] or "").strip() if quoted else line


def words_beside(text: str) -> int:
    """How many words a text has beside the 80 to 100 that it should have."""
    count = len(text.split())
    return max(WORDS[0] - count, count - WORDS[-1], 0)


class Endpoint:
    """A chat model behind an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.

    model: unless given, the only one that the endpoint has. A key is taken from OPENAI_API_KEY, if it is set.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._model = model

    @cached_property
    def name(self) -> str:
        return f"{self.model}@{self.url}"

    @cached_property
    def model(self) -> str:
        """ValueError where none is named and there are others than one."""
        if self._model is not None:
            return self._model
        try:
            names = [one["id"] for one in self._asked("models")["data"]]
        except (KeyError, TypeError):
            raise ValueError(f"{self.url} does not list its models: say which, as MODEL@{self.url}") from None
        if len(names) != 1:
            listed = ", ".join(sorted(names)[:5]) or "none"
            raise ValueError(f"{self.url} has {len(names)} models ({listed}): say which, as MODEL@{self.url}")
        return str(names[0])

    def answer(self, messages: Sequence[Message]) -> str:
        reply = self._asked("chat/completions", {"model": self.model, "messages": list(messages), "temperature": 0})
        try:
            return str(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.url} answered, but not with a chat completion") from None

    def _asked(self, what: str, body: Any = None) -> Any:
        """The JSON that the endpoint answers: a GET, or a POST where there is a body."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.url}/{what}", data, headers)
            with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:200]
            raise ValueError(f"{self.url}/{what} answered {error.code} {error.reason}: {said}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise ValueError(f"{self.url} does not answer: {getattr(error, 'reason', error)}") from None
        except ValueError:
            raise ValueError(f"{self.url}/{what} answered, but not with JSON") from None


class LocalChat:
    """A chat model through transformers, by a folder or by a name that its usual cache or the hub has.

    It takes the likeliest word each time, so that the same prompt gives the same text.
    """

    def __init__(self, name: str, device: str | torch.device) -> None:
        self.name = name
        self._device = torch.device(device)

    def answer(self, messages: Sequence[Message]) -> str:
        tokenizer, model = self._loaded
        try:
            given = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
            )
        except ValueError as error:
            raise ValueError(f"{self.name} is not a chat model: {_first_line(error)}") from None
        ids_BT = model.generate(**given.to(self._device), max_new_tokens=_NEW_TOKENS, do_sample=False)
        return str(tokenizer.decode(ids_BT[0, given["input_ids"].shape[1] :], skip_special_tokens=True))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and model."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ValueError("a chat model needs transformers: pip install 'longtake[wan]'") from None
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        try:
            here = not _hub_answers(self.name)  # else the client would ask again and again, and say so each time
            tokenizer = AutoTokenizer.from_pretrained(self.name, local_files_only=here)
            model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype, local_files_only=here)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"no chat model can be read from {self.name}: {_first_line(error)}") from None
        return tokenizer, model.to(self._device).eval()


def chat_named(name: str, device: str | torch.device) -> Chat:
    """The chat model behind http://host/v1 or MODEL@http://host/v1, or else a transformers model's name or folder."""
    endpoint = re.fullmatch(r"(?:(.+)@)?(https?://.+)", name)
    return Endpoint(endpoint[2], endpoint[1]) if endpoint else LocalChat(name, device)


def _hub_answers(name: str) -> bool:
    """Whether the hub can be asked for a model, be it to say that there is none; it is not asked for a folder."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if Path(name).is_dir():
        return False
    try:
        huggingface_hub.model_info(name, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # of several libraries, as the client is switched off, cannot connect, or takes the name for none
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
