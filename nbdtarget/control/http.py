# SPDX-License-Identifier: Apache-2.0
"""The HTTP behind the control socket: one POST route for each verb of `messages.VERBS`.

A handler decodes the request, calls the registry and encodes the answer; the registry decides
everything. What a user did wrong comes back as a `Failure` with its reason and errno. What we did
wrong is logged with its traceback and comes back as EIO: the server goes on.

Only `api.py` imports this, and only once the process serves: aiohttp takes 140 ms to import.
"""

import errno as errnos
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from aiohttp import web

from nbdtarget.control import messages as m
from nbdtarget.control.verbs import Verbs
from nbdtarget.errors import NbdTargetError

__all__ = ["serve_http"]

_log = logging.getLogger(__name__)

BODY_BYTES_MAX: Final = 16 << 20
SHUTDOWN_S_MAX: Final = 2.0


async def serve_http(
    listener: socket.socket, verbs: Verbs, *, backlog_max: int
) -> Callable[[], Awaitable[None]]:
    """Answer on a listening socket; returns what ends it."""
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    for verb, (request_type, _) in m.VERBS.items():
        app.router.add_post(f"/v1/{verb}", _handler(verbs, verb, request_type))
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S_MAX
    )
    await runner.setup()
    await web.SockSite(runner, listener, backlog=backlog_max).start()
    return runner.cleanup


def _handler(
    verbs: Verbs, verb: str, request_type: type[m.Request]
) -> Callable[[web.Request], Awaitable[web.Response]]:
    # Any: each verb takes its own request; `decode` has just made one of that type.
    call: Callable[[Any], Awaitable[m.Answer]] = getattr(verbs, verb)
    decode = msgspec.json.Decoder(request_type).decode

    async def handle(http: web.Request) -> web.Response:
        body = await http.read()
        try:
            request = decode(body)
        except msgspec.MsgspecError as error:
            return _failure(400, f"bad request: {error}", errnos.EINVAL)
        try:
            return _response(200, await call(request))
        except NbdTargetError as error:
            # ResolveError, ConstructorError and TableError have one; the base has not.
            errno = getattr(error, "errno", errnos.EINVAL)
            return _failure(422, str(error), errno)
        except Exception:
            # The last line of defence: a bug in one verb must not end the server.
            _log.exception("%s %r failed", verb, request)
            return _failure(500, "internal error, see the server's log", errnos.EIO)

    return handle


def _response(status: int, answer: m.Answer) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(answer),
        content_type="application/json",
    )


def _failure(status: int, reason: str, errno: int) -> web.Response:
    return _response(status, m.Failure(reason, errno))
