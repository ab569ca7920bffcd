"""The server of `ddexport serve` on Ray Serve, with more replicas the more requests wait.

pip install "ddexport[cpu,ray]"
cd examples && serve run ray_serve:images bundle=$PWD/../build/digits-var
curl localhost:8000/v1/images/generations --json '{"prompt": "seven", "seed": 0}'
"""

import os

from ray import serve

from ddexport.runtime.pipeline import load
from ddexport.runtime.server.app import create_app
from ddexport.runtime.server.batcher import Batcher
from ddexport.runtime.server.metrics import Metrics
from ddexport.runtime.server.service import Service

MAX_QUEUE = 64  # images that wait in a replica


def images(arguments):
    """The application; arguments: bundle, a path on all machines, and if need be max_replicas, threads."""
    threads = int(arguments.get("threads", 1))

    def build():
        """The ASGI application of a replica, which ends with its engine: Ray Serve starts another one."""
        pipe, metrics = load(arguments["bundle"], threads=threads), Metrics()
        batcher = Batcher(pipe, None, MAX_QUEUE, metrics, lambda fault: os._exit(1))
        return create_app(Service({batcher.name: batcher}, metrics, max_images=10))

    deployment = serve.deployment(
        name="images",
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=MAX_QUEUE,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": int(arguments.get("max_replicas", 4)),
            "target_ongoing_requests": 16,  # a batch on a CPU
            "upscale_delay_s": 5,
        },
    )
    return deployment(serve.ingress(build)()).bind()
