"""The messages of `WS /v1/realtime/video`: vLLM-Omni's dialect, and a few additions that `video.start` announces.

Clients send JSON text; what is not listed here is refused by name, never passed over.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

LARGEST_MESSAGE = 64 * 1024
"""Characters of one message."""
LONGEST_PROMPT = 2000
"""Characters of one prompt."""

LONGEST_TRANSITION = 64
"""Chunks that words may go over in."""

SEED = 42
"""Of a stream that says nothing of its own."""

STATS_SECONDS = 1.0
CAPABILITIES: dict[str, Any] = {
    "endless": True,
    "pause": True,
    "methods": ["lerp", "slerp", "cut"],
    "transition_chunks": LONGEST_TRANSITION,
    "stats_seconds": STATS_SECONDS,
    "snapshot": True,
    "rewind": True,
    "seek": True,
    "fork": True,
    "reset": True,
    "resume_from": True,
    "record": True,
    "watch": True,
}

Prompt = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Event = Annotated[str, Field(min_length=1, max_length=128)]
Name = Annotated[str, Field(max_length=64)]
"""Of a snapshot or a session, as the server gave it."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)  # else true and "1" are whole numbers


class Start(_Message):
    """Begin a stream, or go on from a snapshot (resume_from), under other words if there is a prompt.

    Without num_frames it never ends; a seed of -1 draws one. Sizes can only be the model's.
    """

    type: Literal["session.start"]
    prompt: Prompt | None = None
    resume_from: Name | None = None
    model: str | None = None
    format: Literal["m4s"] = "m4s"
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    num_frames: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    extra_params: Annotated[dict[str, Any], Field(max_length=0)] = {}

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.prompt is None and self.resume_from is None:
            raise PydanticCustomError("missing", "a prompt is needed, or a snapshot in resume_from")
        if self.seed is not None and self.resume_from is not None:
            raise PydanticCustomError("seed", "a snapshot has a seed of its own: leave seed out")
        return self


class _PromptEvent(_Message):
    prompt: Prompt


class _Change(_Message):
    event: _PromptEvent
    event_id: Event | None = None
    transition_chunks: Annotated[int, Field(ge=0, le=LONGEST_TRANSITION)] | None = None
    method: Literal["lerp", "slerp", "cut"] | None = None

    @model_validator(mode="after")
    def _goes_over_or_cuts(self) -> Self:
        if self.method == "cut" and (self.transition_chunks or 0) > 1:
            raise PydanticCustomError("method", "a cut is at once: leave transition_chunks out")
        if self.method in ("lerp", "slerp") and self.transition_chunks is None:
            raise PydanticCustomError("method", "words go over in transition_chunks: say how many")
        return self


class Interaction(_Message):
    """Go on under other words, from the next block; over transition_chunks, along a line (method "lerp") or a sphere
    ("slerp"); with method "cut", in a new shot."""

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


class Watch(_Message):
    """See what another socket's session is sent, from its next chunk on; only who started it can steer."""

    type: Literal["session.watch"]
    session: Name


class Snapshot(_Message):
    """Keep the stream as it stands, between two blocks; session.snapshot.done has its name, for rewinds and forks."""

    type: Literal["session.snapshot"]
    event_id: Event | None = None


class Fork(_Message):
    """Keep a snapshot for another stream to start from: session.fork.done has its resume_from. This one goes on."""

    type: Literal["session.fork"]
    event_id: Event | None = None


class Rewind(_Message):
    """Go on from a snapshot; what is made and not sent is dropped."""

    type: Literal["session.rewind"]
    snapshot: Name
    event_id: Event | None = None


class Seek(_Message):
    """Rewind to this session's latest snapshot at or before a moment of its video."""

    type: Literal["session.seek"]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    event_id: Event | None = None


class Reset(_Message):
    """Begin the stream anew with its seed, under the words in force; what is made and not sent is dropped."""

    type: Literal["session.reset"]
    event_id: Event | None = None


class Record(_Message):
    """Record what is sent from now on; session.record.done says where it can be fetched."""

    type: Literal["session.record"]


class RecordStop(_Message):
    """End the recording; so does the end of the session."""

    type: Literal["session.record.stop"]


MESSAGES = (
    Start, Watch, Interaction, Pause, Resume, Snapshot, Fork, Rewind, Seek, Reset, Record, RecordStop, Ping, Stop
)  # fmt: skip
Message = (
    Start | Watch | Interaction | Pause | Resume | Snapshot | Fork | Rewind | Seek | Reset
    | Record | RecordStop | Ping | Stop
)  # fmt: skip
_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


_LONGEST_COMPLAINT = 1000  # characters


class Refused(Exception):
    """A message that cannot be followed. code: for programs; the text: for people."""

    def __init__(self, code: str, text: str, event_id: str | None = None, **more: object) -> None:
        super().__init__(text)
        self.code = code
        self.event_id = event_id
        self.more = more

    def message(self) -> dict[str, object]:
        of_event = {"event_id": self.event_id} if self.event_id is not None else {}
        text = str(self)  # which may repeat what the client said
        told = text if len(text) <= _LONGEST_COMPLAINT else f"{text[:_LONGEST_COMPLAINT]} ..."
        return {"type": "error", "code": self.code, "message": told, **of_event, **self.more}


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
