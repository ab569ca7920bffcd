"""What every request passes before the routes: id, keys, limits of the body, log and figures."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddexport.runtime.server.service import RefusedError, Service

MAX_BODY = 64 << 10  # bytes
BODY_SECONDS = 30.0  # a client may take to send it
QUIET = ("/livez", "/readyz", "/metrics")  # asked for every few seconds
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
TOO_LARGE = HTTPException(413, f"A request has at most {MAX_BODY} bytes.")

logger = logging.getLogger(__name__)


class Front:
    """An ASGI application around another one, whose exceptions, which it has answered, end here."""

    def __init__(self, inner: ASGIApp, service: Service) -> None:
        self.inner, self.service = inner, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # its lifespan, of which a host such as Ray Serve tells it
            await self.inner(scope, receive, send)
            return
        began = time.monotonic()
        headers, path = Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        request = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"request_id": request, "method": scope["method"], "path": path}
        scope.setdefault("state", {})["facts"] = facts

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request
            await send(message)

        try:
            if path.startswith("/v1/") and not self.service.lets_in(
                headers.get("authorization", "").encode()
            ):
                raise RefusedError(
                    401, "The API key is missing or wrong.", "invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
            await self.inner(scope, self._limited(headers, receive), answer)
        except RefusedError as refusal:
            await refusal.response()(scope, receive, answer)
        except Exception:
            logger.exception("a request failed", extra={"facts": dict(facts)})
        finally:
            seconds = time.monotonic() - began
            if path.startswith("/v1/"):
                self.service.metrics.answered(facts.get("model", ""), facts.get("status", 499), seconds)
            if path not in QUIET:
                logger.info("answered", extra={"facts": facts | {"seconds": round(seconds, 4)}})

    @staticmethod
    def _limited(headers: Headers, receive: Receive) -> Receive:
        """`receive` that raises HTTPException for a body that is too large or slow; FastAPI passes it on."""
        size, whole = 0, False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is that the client left
                return await receive()
            if (
                headers.get("content-length", "0").isdecimal()
                and int(headers.get("content-length", 0)) > MAX_BODY
            ):
                raise TOO_LARGE
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise HTTPException(408, "The body of the request took too long.") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > MAX_BODY:
                raise TOO_LARGE
            return message

        return limited
