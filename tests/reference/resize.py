"""What Pillow makes of pseudo-random RGB images at awkward sizes, as SHA-256 of the resized bytes.

Versions: Pillow 13.0.0.  Run: python tests/reference/resize.py  (writes tests/reference/resize.json)
Image bytes: x <- x * 1664525 + 1013904223 mod 2^32 from x = width * 65536 + height, byte = x >> 24.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image


def noise(width, height):
    x, out = width * 65536 + height, bytearray()
    for _ in range(width * height * 3):
        x = (x * 1664525 + 1013904223) % 2**32
        out.append(x >> 24)
    return np.frombuffer(bytes(out), np.uint8).reshape(height, width, 3)


cases = []
for size in [(1, 1), (7, 5), (64, 48), (31, 97), (120, 3), (133, 57), (40, 200)]:
    image = Image.fromarray(noise(*size))
    for to in [(1, 1), (7, 5), (64, 64), (128, 48), (33, 150), (size[0], 17), (13, size[1]), size, (20, 99)]:
        for resample in [1, 2, 3, 4, 5]:
            resized = image.resize(to, resample)
            cases.append([*size, *to, resample, hashlib.sha256(resized.tobytes()).hexdigest()[:16]])
(Path(__file__).parent / "resize.json").write_text(
    "[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n"
)
print(len(cases), "cases")
