"""The messages of `WS /v1/realtime/video`: vLLM-Omni's dialect, and a few additions that `video.start` announces.

Clients send JSON text; what is not listed here is refused by name, never passed over.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

LARGEST_MESSAGE = 64 * 1024
"""Characters of one message."""
LONGEST_PROMPT = 2000
"""Characters of one prompt."""

CAPABILITIES = {"endless": True, "pause": True, "methods": ["cut"], "transition_chunks": 0, "stats_seconds": 1.0}

Prompt = Annotated[str, Field(max_length=LONGEST_PROMPT)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Start(_Message):
    """Begin a stream. Without num_frames it never ends; a seed of -1 draws one. Sizes can only be the model's."""

    type: Literal["session.start"]
    prompt: Prompt
    model: str | None = None
    format: Literal["m4s"] = "m4s"
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    num_frames: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-1, lt=2**63)] = 42
    extra_params: Annotated[dict[str, Any], Field(max_length=0)] = {}


class _PromptEvent(_Message):
    prompt: Prompt


class _Change(_Message):
    event: _PromptEvent
    event_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    transition_chunks: Annotated[int, Field(ge=0, le=0)] | None = None
    method: Literal["cut"] | None = None


class Interaction(_Message):
    """Go on under other words, from the next block; with method "cut", in a new shot."""

    type: Literal["session.interaction"]
    interaction: _Change


class Pause(_Message):
    """Send and make nothing until session.resume."""

    type: Literal["session.pause"]


class Resume(_Message):
    """Go on where session.pause stopped."""

    type: Literal["session.resume"]


class Ping(_Message):
    """Say that somebody is still there."""

    type: Literal["session.ping"]


class Stop(_Message):
    """End the stream."""

    type: Literal["session.stop"]


MESSAGES = (Start, Interaction, Pause, Resume, Ping, Stop)
Message = Start | Interaction | Pause | Resume | Ping | Stop
_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


class Refused(Exception):
    """A message that cannot be followed. code: for programs; the text: for people."""

    def __init__(self, code: str, text: str, event_id: str | None = None, **more: object) -> None:
        super().__init__(text)
        self.code = code
        self.event_id = event_id
        self.more = more

    def message(self) -> dict[str, object]:
        of_event = {"event_id": self.event_id} if self.event_id is not None else {}
        return {"type": "error", "code": self.code, "message": str(self), **of_event, **self.more}


def parse(text: str) -> Message:
    """A message of a client. Refused, with what is wrong in one line, for anything else."""
    if len(text) > LARGEST_MESSAGE:
        raise Refused("message_too_large", f"a message has at most {LARGEST_MESSAGE} characters, got {len(text)}")
    try:
        return _ANY.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"][1:]))
        raise Refused("invalid_message", f"{where}: {first['msg']}" if where else first["msg"]) from None
