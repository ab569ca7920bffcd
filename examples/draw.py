"""Draws with ONNX Runtime and NumPy alone, from one file that `ddexport onnx MODEL --pipeline 1` writes.

python examples/draw.py build/digits-var/pipeline_1.onnx digits.png 3 7 7 9
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime


def png(image):
    """The bytes of a PNG of an image, uint8 (H, W, 3)."""
    header = struct.pack(">2I5B", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)  # 8 bits, RGB
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # \0: no filter
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


graph, out, *labels = sys.argv[1:]
session = onnxruntime.InferenceSession(graph)
_, length, width = session.get_inputs()[0].shape
noise = np.random.default_rng(0).standard_normal((len(labels), length, width), np.float32)
images, tokens = session.run(None, {"noise": noise, "label": np.array(labels, np.int64)})
Path(out).write_bytes(png(np.concatenate(images, axis=1)))
