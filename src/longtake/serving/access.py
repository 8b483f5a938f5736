"""Who may come in: a key, short-lived tokens for sockets, and pages of one's own origin alone."""

import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TOKEN_SECONDS = 60


_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def require_host(text: str) -> str:
    """A host's name as pages of it are known by. ValueError for anything else, which no page could ever match."""
    host = text.lower()
    with suppress(ValueError):
        return str(IPv6Address(host.strip("[]")))
    if not _HOST.fullmatch(host):
        raise ValueError(f"an origin is a host, such as studio.example, without scheme, port or path: got {text!r}")
    return host


_KEY = re.compile(r"[!-~]([ -~]*[!-~])?")


def require_key(text: str) -> str:
    """A key as headers can carry it. ValueError for anything else, with which nobody could ever come in."""
    if not _KEY.fullmatch(text):
        raise ValueError("a key has letters, digits and signs of ASCII alone, and no space at an end")
    return text


@dataclass(kw_only=True)
class Access:
    """What a request must bring.

    key: everybody's, None where none is needed. origins: hosts that pages may come from, besides the server's own.
    loopback: the server is reachable from this machine alone, and answers to this machine's names alone: a page
    elsewhere cannot reach it by a name that it points here.
    """

    key: str | None = None
    origins: tuple[str, ...] = ()
    loopback: bool = True
    clock: Callable[[], float] = time.monotonic
    _tokens: dict[str, float] = field(default_factory=dict)

    def comes_from_here(self, headers: Mapping[str, str]) -> bool:
        """Whether host and origin of a request are ours; programs send no origin."""
        try:
            return self._are_ours(headers)
        except ValueError:  # no host at all, such as "["
            return False

    def _are_ours(self, headers: Mapping[str, str]) -> bool:
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self.loopback and host not in (*LOOPBACK, *self.origins):
            return False
        origin = headers.get("origin")
        if origin is None:
            return True
        asking = urlsplit(origin)
        return asking.hostname in self.origins or asking.netloc == headers.get("host")

    def has_key(self, headers: Mapping[str, str]) -> bool:
        """Whether the bearer key is right, or none is needed."""
        if self.key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), self.key.encode())

    def new_token(self) -> str:
        """A token that opens one socket, for a minute: browsers cannot send a key along with one."""
        now = self.clock()
        self._tokens = {token: end for token, end in self._tokens.items() if end > now}
        token = secrets.token_urlsafe(24)
        self._tokens[token] = now + TOKEN_SECONDS
        return token

    def may_connect(self, headers: Mapping[str, str], token: str | None) -> bool:
        """Whether a socket may be opened, by key or by a token, which is used up."""
        if self.has_key(headers):
            return True
        return token is not None and self._tokens.pop(token, 0.0) > self.clock()
