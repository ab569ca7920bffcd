"""Draws by tritonclient, which ddexport's environment lacks: HTTP_PORT GRPC_PORT INPUTS OUTPUTS.

INPUTS: npz of noise and labels of eight images. OUTPUTS: npz of images and tokens of a request for all,
by protocol and ensemble; and of images for 1 and 16 clients, with the answers a second to one image each.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import local

import numpy as np
from tritonclient import grpc, http

*ports, source, target = sys.argv[1:]
noise, labels = (np.load(source)[name] for name in ("noise", "labels"))
own = local()


def draw(rows, name, module=http):
    if not hasattr(own, module.__name__):  # a connection for each thread
        client = module.InferenceServerClient(f"localhost:{ports[module is grpc]}")
        setattr(own, module.__name__, client)
    arrays = {"noise": (noise[rows], "FP32"), "label": (labels[rows, None], "INT64")}
    inputs = [module.InferInput(key, array.shape, kind) for key, (array, kind) in arrays.items()]
    for given, (array, _) in zip(inputs, arrays.values(), strict=True):
        given.set_data_from_numpy(array)
    return getattr(own, module.__name__).infer(name, inputs)


results = {}
for name in ("one_step", "two_steps"):
    for protocol, module in (("http", http), ("grpc", grpc)):
        answer = draw(slice(None), name, module)
        results |= {f"{protocol}_{name}_{what}": answer.as_numpy(what) for what in ("image", "tokens")}
    for clients in (1, 16):
        rows = [slice(n % 8, n % 8 + 1) for n in range(50 * clients)]
        with ThreadPoolExecutor(clients) as pool:
            began = time.perf_counter()
            answers = list(pool.map(draw, rows, [name] * len(rows)))
            results[f"{name}_{clients}_rate"] = len(rows) / (time.perf_counter() - began)
        results[f"{name}_{clients}_image"] = np.concatenate([one.as_numpy("image") for one in answers[:8]])
np.savez(target, **results)
