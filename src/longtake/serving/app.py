"""The HTTP side: the page, the socket, and what tools ask a server for."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.base import RequestResponseEndpoint

from longtake.generation.stream import Engine
from longtake.media.mp4 import read_comment
from longtake.serving.access import TOKEN_SECONDS, Access
from longtake.serving.broadcast import Viewer
from longtake.serving.metrics import Metrics
from longtake.serving.protocol import CAPABILITIES, LONGEST_PROMPT, MESSAGES
from longtake.serving.realtime import Behind, Conversation
from longtake.serving.session import Over
from longtake.serving.store import Kept, Store
from longtake.serving.worker import Worker

log = logging.getLogger(__name__)

_FILE_THREADS = 4
_STATIC = resources.files("longtake.serving") / "static"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src blob:; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # what is kept is asked for again: an upgraded page must not run older scripts
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is told of the model: its licence, the versions, and words to begin with. weights: what tells them apart."""

    licence: str
    version: str
    weights: str
    examples: tuple[str, ...]


class House:
    """One server: a worker, who may come in, what is kept for them, and the conversations that go on."""

    def __init__(
        self, worker: Worker, access: Access, served: Served, store: Store, *, log_prompts: bool = False
    ) -> None:  # fmt: skip
        self.worker, self.access, self.store = worker, access, store
        engine: Engine = worker.engine
        self.model = {
            "id": engine.model_name,
            "object": "model",
            "owned_by": "longtake",
            "recipe": engine.recipe.name,
            "levels": len(engine.recipe.steps),
            "base": engine.base_name,
            "codec": engine.codec_name,
            "dtype": engine.circumstances["dtype"],
            "device": engine.circumstances["device"].partition(" ")[0],
            "license": served.licence,
            "weights": served.weights,
            "version": served.version,
            "width": engine.width,
            "height": engine.height,
            "fps": engine.frame_rate,
            "longest_prompt": LONGEST_PROMPT,
            "capabilities": CAPABILITIES,
            "keeps": store.lasts,
            "examples": list(served.examples),
        }
        self.metrics = Metrics(engine.model_name)
        self.first_words = served.examples[0]
        self.ready = self.leaving = False
        self.trouble = ""
        self._behind = Behind(
            worker=worker,
            store=store,
            files=ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="longtake-files"),
            metrics=self.metrics,
            config={"model": self.model["id"]} | {key: self.model[key] for key in ("recipe", "width", "height", "fps")},
            log_prompts=log_prompts,
        )
        self._here: dict[asyncio.Task[None], Conversation] = {}

    @asynccontextmanager
    async def open(self, app: FastAPI) -> AsyncIterator[None]:
        """Warm up beside what is asked meanwhile, and make streams until the server ends."""
        warming = asyncio.create_task(self._warm_up())
        yield
        await self.leave()
        await asyncio.gather(warming, return_exceptions=True)
        await asyncio.to_thread(self.worker.stop)
        await asyncio.to_thread(self._behind.files.shutdown)
        self.store.close()

    async def _warm_up(self) -> None:
        self.worker.start()
        foreseeing = asyncio.create_task(  # in a thread already now: what it imports takes long, too
            asyncio.to_thread(self.worker.foresee, lambda: not self.leaving)
        )
        try:
            await asyncio.wrap_future(self.worker.warm_up(self.first_words))
        except Exception:
            self.trouble = "the model failed when it was warmed up: see the server's log"
            log.exception(self.trouble)
        else:
            self.ready = True
            log.info("ready")
        try:
            await foreseeing
        except Over:
            pass
        except Exception:
            log.exception("what streams take of memory cannot be predicted: one at a time is taken")

    async def leave(self, patience: float = 5.0) -> None:
        """End every stream, and wait for its client to be told."""
        self.leaving = True
        for session in self.worker.sessions():
            self.worker.close(session)
        watching = [task for task, one in self._here.items() if one.session is not None or one.watching]
        if watching:
            await asyncio.wait(watching, timeout=patience)

    def viewers(self, session: str) -> Collection[Viewer]:
        """Who watches a session beside its owner."""
        broadcast = self._behind.on_air.get(session)
        return broadcast.viewers if broadcast else ()

    async def talk(self, socket: WebSocket) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._here[task] = conversation = Conversation(socket, self._behind)
        try:
            await conversation.run()
        finally:
            del self._here[task]


def create_app(
    worker: Worker, access: Access, served: Served, store: Store | None = None, *, log_prompts: bool = False
) -> FastAPI:
    """The application around a worker that has not been started: it warms up, starts and stops with the app.

    store: for snapshots and recordings, closed with the app; unless given, one that goes with it. log_prompts: whether
    prompts are logged, to `longtake.serving.prompts`; else they are logged nowhere.
    """
    house = House(worker, access, served, store or Store(), log_prompts=log_prompts)
    app = FastAPI(title="longtake", version=served.version, lifespan=house.open, docs_url=None, redoc_url=None)
    app.state.house = house

    @app.middleware("http")
    async def from_here_only(request: Request, call_next: RequestResponseEndpoint) -> Response:
        if not access.comes_from_here(request.headers):
            return JSONResponse({"detail": "this host or origin is not served here"}, 403)
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    app.include_router(_open_to_all(house))
    needs_key = [Depends(_key_of(house))]
    app.include_router(_with_key(house), dependencies=needs_key)
    app.include_router(_kept_files(house), dependencies=needs_key)
    app.add_api_websocket_route("/v1/realtime/video", _realtime(house))
    app.add_api_route("/docs", _reference(app), include_in_schema=False)
    app.mount("/", StaticFiles(directory=str(_STATIC), html=True))
    return app


def _open_to_all(house: House) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the process answers: always 200. It tells what /readyz does, for who takes a 503 for a failure."""
        return {"status": "ok", "ready": house.ready and not house.leaving}

    router.add_api_route("/healthz", health, include_in_schema=False)
    for path in ("/health", "/healthz"):
        router.add_api_route(path, health, methods=["HEAD"], include_in_schema=False)  # as some watchdogs ask

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether the model is warm and streams are taken: 200, or 503."""
        ready = house.ready and not house.leaving
        return JSONResponse({"ready": ready, "trouble": house.trouble}, 200 if ready else 503)

    return router


def _key_of(house: House) -> Callable[[Request], Awaitable[None]]:
    async def key(request: Request) -> None:
        if not house.access.has_key(request.headers):
            raise HTTPException(401, "a key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})

    return key


def _with_key(house: House) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, with its recipe, licence and size."""
        return {"object": "list", "data": [house.model]}

    @router.get("/v1/sessions")
    async def sessions() -> dict[str, Any]:
        """Open sessions, without their prompts."""
        now = house.worker.clock()
        told = [
            {
                "id": session.id,
                "object": "session",
                "state": session.state,
                "seed": session.seed,
                "num_frames": session.pictures,
                "sent_seconds": round(session.playback.sent, 3),
                "age_seconds": round(now - session.opened, 3),
                "viewers": len(house.viewers(session.id)),
            }
            for session in house.worker.sessions()
        ]
        return {"object": "list", "data": told}

    @router.delete("/v1/sessions/{name}")
    async def end_session(name: str) -> dict[str, Any]:
        """End a session; its client is told that it was stopped."""
        session = house.worker.session(name)
        if session is None:
            raise HTTPException(404, "there is no such session")
        house.worker.close(session)
        return {"id": name, "object": "session", "deleted": True}

    @router.post("/v1/realtime/token")
    async def token() -> dict[str, Any]:
        """A token for one socket: connect to /v1/realtime/video?token=... within a minute."""
        return {"token": house.access.new_token(), "expires_in": TOKEN_SECONDS}

    @router.get("/metrics")
    async def metrics() -> Response:
        """Speed, for Prometheus."""
        return Response(house.metrics.text(house.worker), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _kept_files(house: House) -> APIRouter:
    """Snapshots and recordings: what is there, to fetch and to remove. Names are looked up, never made into paths."""
    router, store = APIRouter(), house.store

    def recording(name: str) -> Kept:
        kept = store.find(name, "mp4")
        if kept is None:
            raise HTTPException(404, "there is no such recording")
        return kept

    @router.get("/v1/snapshots")
    async def snapshots() -> dict[str, Any]:
        """Snapshots that are kept, without their prompts; lasts says whether they outlive the server."""
        return {"object": "list", "lasts": store.lasts, "data": [_told_of(kept) for kept in store.kept("take")]}

    @router.get("/v1/recordings")
    async def recordings() -> dict[str, Any]:
        """Recordings that are kept; lasts says whether they outlive the server."""
        return {"object": "list", "lasts": store.lasts, "data": [_told_of(kept) for kept in store.kept("mp4")]}

    @router.get("/v1/recordings/{name}/video.mp4")
    async def video(name: str) -> FileResponse:
        """A recording, which longtake replay makes again."""
        return FileResponse(recording(name).path, media_type="video/mp4", filename="video.mp4")

    @router.get("/v1/recordings/{name}/run.json")
    def run(name: str) -> Response:
        """What a recording was made of, as its mp4 says too: model, weights, recipe, seed, prompts with their times."""
        headers = {"Content-Disposition": 'attachment; filename="run.json"'}
        record = read_comment(recording(name).path)
        if not record:
            raise HTTPException(404, "this recording could not be finished, and says nothing of how it was made")
        return Response(record, media_type="application/json", headers=headers)

    @router.delete("/v1/snapshots/{name}")
    async def remove_snapshot(name: str) -> dict[str, Any]:
        """Keep a snapshot no longer."""
        if not store.remove(name, "take"):
            raise HTTPException(404, "there is no such snapshot")
        return {"id": name, "object": "snapshot", "deleted": True}

    @router.delete("/v1/recordings/{name}")
    async def remove_recording(name: str) -> dict[str, Any]:
        """Keep a recording no longer."""
        if not store.remove(name, "mp4"):
            raise HTTPException(404, "there is no such recording")
        return {"id": name, "object": "recording", "deleted": True}

    return router


def _told_of(kept: Kept) -> dict[str, Any]:
    return {"id": kept.name, "byte_length": kept.bytes, "created": round(kept.created)}


def _realtime(house: House) -> Callable[[WebSocket], Awaitable[None]]:
    async def realtime(socket: WebSocket) -> None:
        token = socket.query_params.get("token")
        if not house.access.comes_from_here(socket.headers) or not house.access.may_connect(socket.headers, token):
            await socket.close(1008)  # before it is accepted: the client sees 403
            return
        await socket.accept()
        if not house.ready or house.leaving:
            text = "the server is ending" if house.leaving else "the model is warming up: try in a few seconds"
            await socket.send_json({"type": "error", "code": "not_ready", "message": text, "retry_after": 3})
            await socket.close(1013)
            return
        await house.talk(socket)

    return realtime


def _reference(app: FastAPI) -> Callable[[], Awaitable[HTMLResponse]]:
    """All routes and messages on one page, which needs nothing from elsewhere."""

    async def docs() -> HTMLResponse:
        routes = [
            (f"{method.upper()} {path}", operation.get("description", ""))
            for path, operations in app.openapi()["paths"].items()
            for method, operation in operations.items()
        ]
        messages = [(one.model_fields["type"].annotation.__args__[0], one.__doc__ or "") for one in MESSAGES]  # type: ignore[union-attr]
        return HTMLResponse(
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            "<title>longtake: interface</title><link rel=icon href=icon.svg><link rel=stylesheet href=style.css>"
            "<main class=reference><a class=brand href=.><img src=icon.svg alt='' width=22 height=22>longtake</a>"
            f"<h1>Interface</h1>{_table(routes)}<h2>Messages to WS /v1/realtime/video</h2>{_table(messages)}"
            "<p>As a schema: <a href=openapi.json>openapi.json</a>.</p></main></html>"
        )

    return docs


def _table(rows: list[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(a)}<td>{escape(b)}" for a, b in rows) + "</table>"
