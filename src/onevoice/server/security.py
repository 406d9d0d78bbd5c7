"""Who may use a server: tokens, and pages of other sites that try to use the browser of its user.

- With a token, every request below `/v1` and `/metrics` needs it: as a bearer token (RFC 6750), or as the cookie that
  `POST /v1/session` gives to the page.
- Requests that change something must come from a page of this server, if a browser says where they come from. CORS is
  closed: no answer allows another origin.
- A local server answers only requests that name it by a local name, so that no other name can be pointed at it.
"""

import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onevoice.server.problems import ProblemError, close_with, respond
from onevoice.server.settings import Settings, is_loopback

COOKIE = "onevoice"
GUARDED = ("/v1/", "/metrics")
OPEN = ("/v1/session", "/v1/server")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}
"""On every answer. No page may load anything from elsewhere, or be shown in a frame."""


def is_allowed(headers: Headers, token: str | None) -> bool:
    """Check whether a request names the token, if one is needed."""
    if token is None:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
    is_bearer = scheme.lower() == "bearer" and _is_equal(given.strip(), token)
    return is_bearer or _is_equal(cookie, cookie_of(token))


def is_token(given: str, token: str) -> bool:
    """Compare in a time that tells nothing about the token."""
    return _is_equal(given, token)


def cookie_of(token: str) -> str:
    """Return the cookie that stands for a token; it does not reveal it."""
    return hashlib.sha256(b"onevoice cookie " + token.encode()).hexdigest()


def _is_equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _name_of(host: str) -> str:
    """Return the name in a Host header, without the port; nothing for one that makes no sense."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def guard(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Return an app that passes on only requests that may use `app`, and hardens its answers."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
            return

        async def harden(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"].startswith(GUARDED):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            check(scope, settings)
        except ProblemError as error:
            if scope["type"] == "websocket":
                await receive()  # pages read only the close of a socket that was accepted
                await send({"type": "websocket.accept"})
                await close_with(error.problem, send)
            else:
                await respond(error.problem, error.headers)(scope, receive, harden)
            return
        await app(scope, receive, harden)

    return guarded


def check(scope: Scope, settings: Settings) -> None:
    """Raise `ProblemError` for a request that may not use the server."""
    headers = Headers(scope=scope)
    host = headers.get("host", "")
    if settings.is_local and not is_loopback(_name_of(host)):
        raise ProblemError("host", "Wrong host", 403, "this server answers only to localhost")
    origin = headers.get("origin")
    is_change = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
    if is_change and origin is not None and origin.partition("://")[2] != host:
        raise ProblemError("origin", "Wrong origin", 403, "pages of other sites may not use this server")
    path = scope["path"]
    if path.startswith(GUARDED) and path not in OPEN and not is_allowed(headers, settings.token):
        error = ProblemError("token", "A token is needed", 401, "send the header Authorization: Bearer TOKEN")
        error.headers["WWW-Authenticate"] = "Bearer"
        raise error
