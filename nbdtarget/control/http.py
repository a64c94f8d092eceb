# SPDX-License-Identifier: Apache-2.0
"""The HTTP behind the control socket: one route for each verb of `messages.VERBS`.

    POST /v1/VERB            the request as JSON; no body is an empty request
    GET  /v1/VERB[?name=N]   the verbs that change nothing, for example with a browser
    GET  /v1/openapi.json    a description of all of this for programs
    GET  /                   the live page, see `page.py`
    GET  /metrics            all figures, as Prometheus reads them

A handler decodes the request, calls the registry and encodes the answer; all decisions are the
registry's. A mistake of the user is answered with a `Failure`, which has a reason and an errno, with status
400 (not a request), 401 (no token), 403 (the token allows to look, or a browser sends it for another site), 404 (no such verb or device), 405, 408 (too slow), 409 (in use), 413 (too
large), 415 (compressed) or 422 (refused). Without a token that allows the verb (`tokens.py`) a body is neither kept nor waited for, and a
compressed body never is. The rest of it is dropped, for LINGER_S: if a connection is closed while bytes stand unread in it, TCP
and unix sockets tell the client of a reset, and it may never see the answer.
`doorkeeper.py` bounds the number of connections and the time that a request may take. A bug in the server is logged with its
traceback and answered with 500 and EIO; the server goes on.

How a verb is carried out: `calls.py`.

Only `api.py` imports this module, and only when the first client connects: aiohttp takes 140 ms to import.
"""

import asyncio
import errno as errnos
import logging
import socket
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.words import printable
from nbdtarget.control import messages as m
from nbdtarget.control.bodies import BODY_BYTES_MAX, body_bytes_max, encode
from nbdtarget.control.calls import Calls, errno_of
from nbdtarget.control.doorkeeper import BODY_S, Doorkeeper
from nbdtarget.control.page import add_page, is_page, why_refused
from nbdtarget.control.programs import refuse_programs
from nbdtarget.control.tokens import NO_TOKENS, RIGHTS_HEADER, ControlTokens, Rights
from nbdtarget.control.verbs import Verbs

__all__ = ["HttpServer"]

log = logging.getLogger(__name__)

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
REASON_LENGTH_MAX: Final = 4000  # characters
SHUTDOWN_S_MAX: Final = 2.0
LINGER_S: Final = 2.0  # for the rest of a body that was refused
_RIGHTS: Final = web.RequestKey("rights", Rights)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Log a client that has gone, or does not speak HTTP, in one line: it is not a bug of the server."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ConnectionError):
        log.info("control socket: the client has gone: %s", error)
    elif isinstance(error, HttpProcessingError):
        log.info("control socket: not HTTP: %s", " ".join(error.message.split()))
    else:
        return True
    return False


_http_log = logging.getLogger("nbdtarget.control.http.library")
_http_log.addFilter(_without_traceback)


class HttpServer:
    """Answers on a listening socket, which stays its owner's.

    Args:
        tokens: what requests carry, in an `Authorization: Bearer` header.
        has_verbs: False: metrics are all that there is.
        is_tcp: other machines may be the clients: see `programs.py`.
    """

    def __init__(
        self,
        verbs: Verbs,
        *,
        tokens: ControlTokens = NO_TOKENS,
        backlog_max: int = 64,
        has_verbs: bool = True,
        is_tcp: bool = False,
    ) -> None:
        self._backlog_max = backlog_max
        self._keepers: list[Doorkeeper] = []
        self._server: asyncio.Server | None = None
        middlewares: list[Middleware] = [_watched(self._keepers), _failures_are_json]
        has_token = has_verbs and tokens.are_needed(is_tcp=is_tcp)
        middlewares.append(_refuse_other_sites(has_token=has_token))
        if has_verbs:
            middlewares.append(_check_rights(tokens, is_tcp=is_tcp))
        middlewares.append(_check_encoding)
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=middlewares)
        calls = Calls(verbs)
        app.router.add_get("/metrics", _metrics(verbs))
        for verb, (request_type, _) in m.VERBS.items() if has_verbs else ():
            handle = _handler(calls, verb, request_type, verbs if is_tcp else None)
            app.router.add_post(f"/v1/{verb}", handle)
            if verb in m.READING_VERBS:
                app.router.add_get(f"/v1/{verb}", handle)
        if has_verbs:
            app.router.add_get("/v1/openapi.json", _openapi)
            add_page(app)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            logger=_http_log,
            shutdown_timeout=SHUTDOWN_S_MAX,
            auto_decompress=False,  # a megabyte could be inflated to a gigabyte on the loop
            lingering_time=LINGER_S,
        )

    async def start(self, listener: socket.socket) -> None:
        """Accept connections; `pause` ends that."""
        if not self._keepers:
            await self._runner.setup()
            assert self._runner.server is not None
            self._keepers.append(Doorkeeper(self._runner.server))
        self._server = await asyncio.get_running_loop().create_server(
            self._keepers[0], sock=listener.dup(), backlog=self._backlog_max
        )

    def pause(self) -> None:
        """Accept no more connections. Those that are there are answered."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def end(self) -> None:
        """Accept no more connections, and end those that are there."""
        self.pause()
        await self._runner.cleanup()


def _metrics(verbs: Verbs) -> Handler:
    async def metrics(_: web.Request) -> web.Response:
        if verbs.monitor is None:
            raise web.HTTPNotFound
        text = await verbs.monitor.metrics()
        return web.Response(body=text, headers={"Content-Type": METRICS_TYPE})

    return metrics


def _handler(
    calls: Calls, verb: str, request_type: type[m.Request], guarded: Verbs | None
) -> Handler:
    """Args: guarded: of a socket whose clients may not start programs, unless these verbs say so."""
    decode = msgspec.json.Decoder(request_type).decode
    bytes_max = body_bytes_max(verb)

    changes = verb not in m.LOOKING_VERBS

    async def handle(http: web.Request) -> web.Response:
        if changes and http[_RIGHTS] is not Rights.ALL:
            return _cut_off(403, f"{verb}: this token may look, and not change")
        if (http.content_length or 0) > bytes_max:
            return _too_large(bytes_max)
        try:
            async with timeout(BODY_S):
                body = await http.read() or b"{}"
        except TimeoutError:
            return _cut_off(408, f"no request within {BODY_S:g} s")
        if len(body) > bytes_max:  # one without a Content-Length
            return _too_large(bytes_max)
        try:
            if http.method == "POST":
                request = decode(body)
            else:
                request = msgspec.convert(_query(http), request_type)
        except msgspec.MsgspecError as error:
            return _failure(400, f"bad request: {error}", errnos.EINVAL)
        try:
            if guarded is not None and not guarded.tcp_starts_programs:
                refuse_programs(request)
            answer = await calls.carry_out(verb, request)
        except NbdTargetError as error:
            errno = errno_of(error)
            return _failure(_STATUS.get(errno, 422), str(error), errno)
        except Exception:  # `calls` has logged it
            return _failure(500, "internal error, see the server's log", errnos.EIO)
        return _response(200, await encode(answer))

    return handle


def _too_large(bytes_max: int) -> web.Response:
    """The library drops what is left of the body, so that the client comes to read the answer."""
    reason = f"the request is larger than {bytes_max} bytes"
    return _failure(413, reason, errnos.E2BIG)


_STATUS: Final = {errnos.ENXIO: 404, errnos.EBUSY: 409}


def _query(http: web.Request) -> dict[str, tuple[str, ...]]:
    """Return the request of a reading verb. An unknown key is refused when this is converted."""
    query = {key: tuple(http.query.getall(key)) for key in http.query}
    if "name" in query:
        query["names"] = query.pop("name")
    return query


async def _openapi(_: web.Request) -> web.Response:
    from nbdtarget.control.openapi import (
        openapi,
    )  # imported here because it is rarely needed

    return web.Response(
        body=msgspec.json.encode(openapi()), content_type="application/json"
    )


@web.middleware
async def _failures_are_json(
    request: web.Request, handler: Handler
) -> web.StreamResponse:
    """Answer with a reason in JSON also where the library refuses a request."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        verbs = ", ".join(m.VERBS)
        reason = f"{request.path}: no such verb; /v1/ has: {verbs}"
        return _failure(404, reason, errnos.ENOENT)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        reason = f"{request.path}: takes {allowed}, not {request.method}"
        return _failure(405, reason, errnos.EINVAL)
    except web.HTTPRequestEntityTooLarge:
        return _too_large(BODY_BYTES_MAX)
    except web.RequestPayloadError as error:
        reason = " ".join(str(error).split())
        return _failure(400, f"bad request: {reason}", errnos.EINVAL)


def _refuse_other_sites(*, has_token: bool) -> Middleware:
    @web.middleware
    async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
        why = why_refused(request, has_token=has_token)
        return await handler(request) if why is None else _cut_off(403, why)

    return refuse


def _check_rights(tokens: ControlTokens, *, is_tcp: bool) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_page(request.path):
            return await handler(request)
        given = request.headers.get("Authorization", "")
        rights = tokens.rights(given, is_tcp=is_tcp)
        if rights is None:
            return _cut_off(401, "the token is missing or wrong")
        wanted = request.headers.get(RIGHTS_HEADER, Rights.ALL.value)
        if wanted != Rights.ALL.value:
            rights = Rights.LOOK
        request[_RIGHTS] = rights
        answer = await handler(request)
        answer.headers[RIGHTS_HEADER] = rights.value
        return answer

    return check


@web.middleware
async def _check_encoding(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        return _cut_off(415, "no Content-Encoding is accepted")
    return await handler(request)


def _watched(keepers: list[Doorkeeper]) -> Middleware:
    """Tell the doorkeeper of each request."""

    @web.middleware
    async def watched(request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        keepers[0].request_begins(transport)
        try:
            return await handler(request)
        finally:
            keepers[0].request_ends(transport)

    return watched


def _cut_off(status: int, reason: str) -> web.Response:
    """Answer. The library drops what is left of the body, for LINGER_S."""
    return _failure(status, reason, _CUT_OFF_ERRNOS[status])


_CUT_OFF_ERRNOS: Final = {
    401: errnos.EACCES,
    403: errnos.EACCES,
    408: errnos.ETIMEDOUT,
    415: errnos.EINVAL,
}


def _response(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")


def _failure(status: int, reason: str, errno: int) -> web.Response:
    failure = m.Failure(printable(reason, REASON_LENGTH_MAX), errno)
    return _response(status, msgspec.json.encode(failure))
