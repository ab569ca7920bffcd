"""What the routes of a server share: its bundles, limits and keys, and the errors that it answers with."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fastapi.responses import JSONResponse

from ddexport.runtime.bundle import FULL, TEACHER
from ddexport.runtime.errors import DDError
from ddexport.runtime.server.batcher import Batcher
from ddexport.runtime.server.metrics import Metrics

CARD = "README.md"
KINDS = {401: "authentication_error", 429: "rate_limit_error"}  # OpenAI's words


class RefusedError(Exception):
    """An answer that is an error, in the shape of OpenAI's."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """code, param: for programs; param: the parameter that is at fault."""
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def response(self) -> JSONResponse:
        """What is sent."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, dict(self.headers or {}))


FAILED = RefusedError(500, "The server failed on this request; its log says why.", "server_error")


@dataclass
class Service:
    """The state of a server. batchers: by the id of the model. keys: as clients send them; none
    lets everybody in. max_images: of a request. draining: the server is about to stop."""

    batchers: Mapping[str, Batcher]
    metrics: Metrics
    max_images: int
    keys: tuple[bytes, ...] = ()
    draining: bool = False
    cards: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        files = {name: batcher.pipe.root / CARD for name, batcher in self.batchers.items()}
        self.cards = {
            name: file.read_text(encoding="utf-8") if file.is_file() else "" for name, file in files.items()
        }

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return not self.draining and all(batcher.fault is None for batcher in self.batchers.values())

    def lets_in(self, authorization: bytes) -> bool:
        """Whether the header has one of the keys. All are compared, each in constant time."""
        scheme, _, key = authorization.partition(b" ")
        same = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        return not self.keys or (scheme.lower() == b"bearer" and any(same))

    def batcher(self, model: str | None) -> Batcher:
        """That of a model, of the only one if none is named. Raises RefusedError."""
        if model is None and len(self.batchers) == 1:
            return next(iter(self.batchers.values()))
        if model is None:
            names = ", ".join(self.batchers)
            raise RefusedError(400, f"Name a model: {names}.", "missing_parameter", "model")
        if model not in self.batchers:
            raise RefusedError(404, f"There is no model {model!r}.", "model_not_found", "model")
        return self.batchers[model]

    def summary(self, name: str) -> dict[str, Any]:
        """A model as the list of models shows it."""
        manifest = self.batchers[name].pipe.manifest
        created = datetime.fromisoformat(manifest.created.replace("Z", "+00:00"))
        return {
            "id": name, "object": "model", "created": int(created.timestamp()), "owned_by": "ddexport",
            "title": manifest.title,
        }  # fmt: skip

    def details(self, name: str) -> dict[str, Any]:
        """All that a client may know of a model."""
        pipe = self.batchers[name].pipe
        manifest, chosen = pipe.manifest, pipe.backend.configuration
        numbers: list[int | str] = [*sorted(manifest.schedules), *([TEACHER] if manifest.teacher else [])]
        schedules = [(steps, manifest.schedule(steps)) for steps in numbers]
        return self.summary(name) | {
            "size": size_of(manifest.image.width, manifest.image.height),
            "prompts": "labels" if manifest.text is None else "sentences",
            "labels": list(pipe.labels.names),
            "aliases": dict(pipe.labels.aliases),
            "max_images": self.max_images,
            "schedules": [
                {
                    "steps": steps,
                    "passes": manifest.number_of_steps(schedule),
                    "teacher": bool(schedule.teacher),
                }
                for steps, schedule in schedules
            ],
            "decoders": [FULL, *manifest.decoders],
            "engine": {
                "backend": chosen.backend,
                "device": chosen.device,
                "precision": chosen.precision,
                "max_batch": self.batchers[name].max_batch,
            },
            "random_weights": manifest.weights.kind == "random",
            "licence": dict(manifest.licence),
            "card": self.cards[name],
        }


def size_of(width: int, height: int) -> str:
    """As OpenAI spells it: 256x256."""
    return f"{width}x{height}"


def said(error: DDError) -> str:
    """An error of a request in a sentence, with the hint unless that is about the command line."""
    hint = "" if "--" in error.hint else f" {error.hint}"
    return f"{error.message}.{hint}"
