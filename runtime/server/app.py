"""The routes: images in the shape of OpenAI's images endpoint, the models, and what supervisors ask for.

Annotations are evaluated here, because FastAPI makes the checks and the description from them.
"""

import asyncio
import base64
import io
import secrets
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException

from ddexport import runtime
from ddexport.runtime import __version__
from ddexport.runtime.bundle import FULL
from ddexport.runtime.errors import BundleError, DDError, LabelError, ScheduleError
from ddexport.runtime.images import to_pil
from ddexport.runtime.server.batcher import OWN_FAULTS, Batcher, Drawn, Job, QueueFullError
from ddexport.runtime.server.front import Front
from ddexport.runtime.server.service import FAILED, RefusedError, Service, said, size_of
from ddexport.runtime.text import example_prompt

GONE = 499  # nginx's status for a client that left; nobody reads it but logs and figures
QUALITY = 90  # of JPEG and WebP
WEB = Path(runtime.__file__).parent / "web"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}  # whatever this system says
STRICT_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-cache"}
PARAMETERS = {LabelError: "prompt", ScheduleError: "steps", BundleError: "decoder"}

Strict = Annotated[int, Field(strict=True)]


class ImageRequest(BaseModel):
    """OpenAI's parameters that have a meaning here, and `seed`, `steps` and `decoder`."""

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[str, Field(max_length=4000)] = Field(
        description="A label of the model or its number, or a sentence if it draws from sentences."
    )
    model: str | None = Field(None, description="Its id; may be left out if there is one model.")
    size: str | None = Field(None, description="That of the model, or auto.", examples=["auto"])
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png if left out.")
    user: str | None = Field(None, description="Not used.")
    seed: Annotated[Strict, Field(ge=0, lt=2**64)] | None = Field(
        None, description="Image i of a seed is always the same. A random one if left out."
    )
    steps: Annotated[Strict, Field(ge=1)] | Literal["teacher"] | None = Field(
        None, description="A schedule of the model, the fewest steps if left out."
    )
    decoder: str | None = Field(None, description="A decoder of the model, full if left out.")


class Image(BaseModel):
    """A picture in base64."""

    b64_json: str


class Images(BaseModel):
    """What was drawn, and the parameters that draw it again."""

    created: int
    model: str
    data: list[Image]
    size: str
    output_format: str
    seed: int
    steps: int | Literal["teacher"]


class Fault(BaseModel):
    """What is wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Faults(BaseModel):
    """An error in the shape of OpenAI's."""

    error: Fault


def create_app(service: Service) -> Front:
    """The ASGI application of a server."""
    app = FastAPI(
        title="ddexport",
        version=__version__,
        description="Images from distilled auto-regressive models in one or two steps.",
        responses={"4XX": {"model": Faults}, "5XX": {"model": Faults}},
    )
    # The limit of this server belongs to the checks and to the description.
    count: Any = (
        Annotated[Strict, Field(ge=1, le=service.max_images)] | None,
        Field(None, description="Images, 1 if left out."),
    )
    Limited: Any = create_model("ImageRequest", __base__=ImageRequest, __doc__=ImageRequest.__doc__, n=count)
    first = next(iter(service.batchers.values())).pipe
    names = first.labels.names
    prompt = example_prompt(first.manifest.recipe) if first.texts else names[min(7, len(names) - 1)]
    shown = {"prompt": prompt, "n": 2, "seed": 0, "steps": min(first.manifest.schedules, default="teacher")}
    Limited.model_config["json_schema_extra"] = {"examples": [shown]}

    @app.post("/v1/images/generations", response_model=Images, tags=["images"], summary="Draw images")
    async def generate(body: Limited, request: Request) -> Response:
        batcher = service.batcher(body.model)
        facts = request.state.facts
        facts["model"] = batcher.name
        size = size_of(batcher.pipe.manifest.image.width, batcher.pipe.manifest.image.height)
        if body.size not in (None, "auto", size):
            raise RefusedError(400, f"{batcher.name} draws images of {size}.", "invalid_value", "size")
        seed = secrets.randbits(32) if body.seed is None else body.seed
        job = Job(body.prompt, body.n or 1, seed, body.steps, body.decoder or FULL)
        drawn = await _drawn(batcher, job, request)
        if drawn is None:
            return Response(status_code=GONE)
        facts |= {"images": job.count, "waited": round(drawn.waited, 4)}
        kind = body.output_format or "png"
        data = await asyncio.to_thread(encoded, drawn.images, kind)
        steps = body.steps or min(batcher.pipe.manifest.schedules, default="teacher")
        return JSONResponse({
            "created": int(time.time()), "model": batcher.name, "data": [{"b64_json": text} for text in data],
            "size": size, "output_format": kind, "seed": seed, "steps": steps,
        })  # fmt: skip

    @app.get("/v1/models", tags=["models"], summary="The models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.summary(name) for name in service.batchers]}

    @app.get("/v1/models/{model}", tags=["models"], summary="Labels, schedules and card of a model")
    async def model(model: str) -> dict[str, Any]:
        return service.details(service.batcher(model).name)

    @app.get("/livez", tags=["supervision"], summary="The process runs", response_class=PlainTextResponse)
    async def livez() -> str:
        return "ok\n"

    @app.get(
        "/readyz", tags=["supervision"], summary="Requests are welcome", response_class=PlainTextResponse
    )
    async def readyz() -> Response:
        if service.ready:
            return PlainTextResponse("ok\n")
        raise RefusedError(503, "The server is about to stop.", "stopping")

    @app.get("/metrics", tags=["supervision"], summary="For Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    pages = {path.name: path for path in WEB.iterdir() if path.suffix in TYPES}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    @app.api_route("/{file}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(file: str = "index.html") -> Response:
        """The page of `ddexport web`, which by its site.json knows that a server draws."""
        if file == "site.json":
            return JSONResponse({"server": "v1/"})
        if file not in pages:
            raise HTTPException(404)
        return FileResponse(pages[file], media_type=TYPES[pages[file].suffix], headers=STRICT_HEADERS)

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return error.response()

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return FAILED.response()

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code)
        return RefusedError(
            error.status_code, str(error.detail), code or "bad_request", None, error.headers
        ).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:2] if isinstance(part, str)]
        message = f"{where[0]}: {first['msg']}" if where else first["msg"]
        return RefusedError(400, f"{message}.", "invalid_value", where[0] if where else None).response()

    return Front(app, service)


async def _drawn(batcher: Batcher, job: Job, request: Request) -> Drawn | None:
    """What a request gets; None if its client left before. Raises RefusedError."""
    try:
        batcher.check(job)
        batcher.submit(job)
        waits = asyncio.wrap_future(job.future)
        # All that can come behind the body is that the client left.
        leaves: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
        await asyncio.wait({waits, leaves}, return_when=asyncio.FIRST_COMPLETED)
        leaves.cancel()
        return waits.result() if waits.done() else None
    except QueueFullError as error:
        headers = {"retry-after": str(error.retry_after)}
        raise RefusedError(429, said(error), "queue_full", headers=headers) from error
    except DDError as error:
        if isinstance(error, (*OWN_FAULTS, BundleError)):
            raise RefusedError(
                400, said(error), "invalid_value", PARAMETERS.get(type(error), "prompt")
            ) from error
        if batcher.fault is not None:
            raise RefusedError(503, "The engine has failed.", "engine_failed") from error
        raise FAILED from error
    finally:
        batcher.withdraw(job)


def encoded(images: NDArray[np.uint8], kind: str) -> list[str]:
    """Pictures uint8 (N, H, W, C) as files in base64."""
    texts = []
    for image in to_pil(images):
        stream = io.BytesIO()
        image.save(stream, format=kind, **({} if kind == "png" else {"quality": QUALITY}))
        texts.append(base64.b64encode(stream.getvalue()).decode())
    return texts
