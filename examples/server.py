"""Answer GET /?label=9 with a new image; requests that wait meanwhile are drawn in one batch.

python examples/server.py exported/fashion-onnx/one_step.onnx 8000

It needs onnxruntime, numpy and pillow, but neither flowmaps nor PyTorch: the file says all that is known of the model.
"""

import io
import json
import queue
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import onnxruntime
from PIL import Image

MOST = 64  # images in a batch
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
info, base_std = json.loads(facts["info"]), float(facts["base_std"])
waiting: "queue.Queue[tuple[int, Future[np.ndarray]]]" = queue.Queue()


def draw_batches() -> None:
    random = np.random.default_rng()
    while True:
        batch = [waiting.get()]
        while len(batch) < MOST and not waiting.empty():
            batch.append(waiting.get())
        noise = np.float32(base_std) * random.standard_normal((len(batch), *info["shape"]), dtype=np.float32)
        label = np.array([label for label, _ in batch], dtype=np.int64)
        for (_, answer), image in zip(batch, session.run(None, {"noise": noise, "label": label})[0], strict=True):
            answer.set_result(image)  # uint8 [height, width, channels]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        label = parse_qs(urlsplit(self.path).query).get("label", ["0"])[0]
        if not (label.isdecimal() and int(label) < info["num_classes"]):
            return self.send_error(400, f"label must be 0 .. {info['num_classes'] - 1}")
        answer: Future[np.ndarray] = Future()
        waiting.put((int(label), answer))
        png = io.BytesIO()
        Image.fromarray(answer.result().squeeze()).save(png, "PNG")
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(png.getvalue())


threading.Thread(target=draw_batches, daemon=True).start()
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
print(f"http://127.0.0.1:{server.server_port}/?label=0", flush=True)
server.serve_forever()
