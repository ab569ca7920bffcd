"""`ddexport serve`: images over HTTP."""

from __future__ import annotations

from typing import Any

import click

from ddexport.runtime import console
from ddexport.runtime.options import PATH, POSITIVE, option, shared

EPILOG = """
\b
Examples:
  ddexport serve digits-var
  ddexport serve digits-var digits-llamagen --port 9000 --log-json
  ddexport serve build/var-d16 --host 0.0.0.0 --api-key-file keys.txt --max-batch 8 --threads 4
  curl localhost:8000/v1/images/generations --json '{"prompt": "seven", "n": 2, "seed": 0}'
"""


@click.command(name="serve", cls=console.Command, epilog=EPILOG)
@shared("bundle", name="bundles", metavar="[BUNDLE]...", nargs=-1)
@option("--host", metavar="ADDRESS", default="127.0.0.1",
        help="Address to listen on; 0.0.0.0 is every one of this machine.")  # fmt: skip
@option("--port", type=click.IntRange(0, 65535), metavar="N", default=8000,
        help="Port to listen on; 0 is any that is free.")  # fmt: skip
@option("--api-key-file", type=PATH, metavar="FILE",
        help="Keys that clients may use, one a line. Without it everybody may draw.")  # fmt: skip
@option("--max-batch", type=POSITIVE, metavar="N", show_default="16, or as many as fit about 2 GiB",
        help="Number of images of several requests that are drawn at once.")  # fmt: skip
@option("--max-queue", type=POSITIVE, metavar="N", default=128,
        help="Number of images of a bundle that may wait; more are refused (429).")  # fmt: skip
@option("--max-images", type=POSITIVE, metavar="N", default=10, help="Number of images of a request.")
@option("--grace", type=click.FloatRange(min=0), metavar="SECONDS", default=5.0,
        help="How long /readyz says 503 after SIGTERM, before no further request is taken.")  # fmt: skip
@option("--log-json", is_flag=True, help="Write the log as JSON, an object a line.")
@shared("backend", "device", "threads", "precision", "no-verify")
@console.debug_option
def command(**options: Any) -> None:
    """Serve images over HTTP, as OpenAI does.

    The address is printed when the server is ready; /docs there shows the interface, /metrics has figures for
    Prometheus. SIGTERM ends it when all accepted requests are answered.
    """
    if options["max_images"] > options["max_queue"]:
        raise click.UsageError("--max-images must not be above --max-queue: such a request could never wait.")
    from ddexport.runtime.server.process import serve

    serve(**options)
