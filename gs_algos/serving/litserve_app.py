"""A `.pt2` package behind HTTP: `python -m gs_algos.serving.litserve_app NET.pt2`, which `golden-stick serve` starts.

    POST /predict {"input": [[[0.1, ...], ...], ...]}    what the network takes, without the batch
    POST /predict {"image": "<base64 of a PNG or JPEG>"} a picture, normalized as the package says
    -> {"output": [...], "class": 3}                     class: of the largest output, where outputs are a vector

LitServe (extra `serve`) collects requests into batches. What is wrong with a request is answered with status 422.
"""

# no postponed annotations: LitServe looks at that of a request, and with a dict it refuses what is no JSON object

import argparse
import base64
import binascii
import io
import signal
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import torch
from fastapi import HTTPException
from litserve.loops.base import LoopResponseType
from litserve.loops.simple_loops import BatchedLoop
from litserve.utils import LitAPIStatus, PickleableHTTPException
from torch import Tensor

from gs_algos.export.package import PackageInput, read_package

WHO = "serve"
MODES = {1: "L", 3: "RGB"}
MAX_PAYLOAD = 32 * 2**20  # bytes of a request


class OneByOne(BatchedLoop):
    """Reads each request by itself: one that is wrong is answered at once, and is no part of the batch.

    In LitServe's own loop every request of the batch would get the answer to the wrong one.
    """

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        requests, late = super().get_batch_requests(lit_api, request_queue, transport)
        samples = []
        for queue, uid, request in requests:
            try:
                samples.append((queue, uid, decode(request, lit_api.about, lit_api.resize)))
            except HTTPException as error:
                answer = PickleableHTTPException.from_exception(error)
                self.put_response(transport, queue, uid, answer, LitAPIStatus.ERROR, LoopResponseType.REGULAR)
        return samples, late


class PackageAPI(litserve.LitAPI):
    """One sample a request, any number of them a call of the network."""

    def __init__(self, package: str, about: PackageInput, resize: bool, **batching: Any) -> None:
        super().__init__(loop=OneByOne(), **batching)
        self.package, self.about, self.resize = package, about, resize

    def setup(self, device: str) -> None:
        index = torch.device(device).index
        self.run = torch._inductor.aoti_load_package(self.package, device_index=-1 if index is None else index)
        self.place = torch.device(device)

    def decode_request(self, request: dict[str, Any], **kwargs: Any) -> Any:
        return request  # the loop has made a sample of it

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def predict(self, x: Tensor, **kwargs: Any) -> Tensor:
        y: Tensor = self.run(x.to(self.place))
        return y.cpu()

    def unbatch(self, output: Tensor) -> list[Tensor]:
        return list(output)

    def encode_response(self, output: Tensor, **kwargs: Any) -> dict[str, Any]:
        answer: dict[str, Any] = {"output": output.tolist()}
        return {**answer, "class": int(output.argmax())} if output.dim() == 1 else answer


def decode(request: dict[str, Any], about: PackageInput, resize: bool = False) -> Tensor:
    """The sample of a request, in the shape and dtype that the package takes.

    Raises:
        HTTPException: of status 422, if it is wrong.
    """
    keys = sorted(request)
    if keys == ["input"]:
        return _numbers(request["input"], about)
    if keys == ["image"]:
        return _picture(request["image"], about, resize)
    raise _refusal(f'the request must be {{"input": [...]}} or {{"image": "<base64>"}}, got {keys}')


def _numbers(value: Any, about: PackageInput) -> Tensor:
    wanted = list(about.shape)
    try:
        x = torch.from_numpy(np.asarray(value, dtype=np.float64))
    except (ValueError, TypeError, OverflowError) as error:
        raise _refusal(f"input must be nested lists of numbers of shape {wanted}, got: {error}") from error
    if list(x.shape) != wanted:
        raise _refusal(f"input must be of shape {wanted}, got {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise _refusal("input must be of finite numbers, got NaN or infinity")
    return x.to(getattr(torch, about.dtype))


def _picture(text: Any, about: PackageInput, resize: bool) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if about.pixels is None or len(about.shape) != 3 or about.shape[0] not in MODES:
        raise _refusal(f'the package takes no pictures, as it knows no mean and deviation; send {{"input": [...]}} '
                       f"of shape {list(about.shape)}")  # fmt: skip
    channels, height, width = about.shape
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
            image = opened.convert(MODES[channels])
    except (
        AttributeError,
        TypeError,
        ValueError,
        binascii.Error,
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise _refusal(f"image must be the base64 of a PNG or JPEG, got: {error}") from error
    if resize:
        image = ImageOps.fit(image, (width, height))
    if image.size != (width, height):
        got = f"{image.width}x{image.height}"
        raise _refusal(
            f"image must be {width}x{height} pixels, got {got}; resize it, or start the server with --resize"
        )
    pixels = torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)
    mean, deviation = (torch.tensor(part).view(-1, 1, 1) for part in about.pixels)
    return ((pixels.float() / 255 - mean) / deviation).to(getattr(torch, about.dtype))


def _refusal(message: str) -> HTTPException:
    return HTTPException(422, f"{WHO}: {message}")


def make_server(package: Path, options: argparse.Namespace) -> litserve.LitServer:
    """The server of a package, which is read but not yet loaded.

    Raises:
        ValueError: as `read_package`.
    """
    about = read_package(package, WHO)
    batching = {"max_batch_size": options.max_batch_size, "batch_timeout": options.batch_timeout}
    api = PackageAPI(str(package), about, options.resize, **batching)
    return litserve.LitServer(
        api,
        accelerator=about.device,
        devices=options.devices,
        workers_per_device=options.workers_per_device,
        max_payload_size=MAX_PAYLOAD,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gs_algos.serving.litserve_app", description=__doc__.splitlines()[0]
    )
    parser.add_argument("package", type=Path)
    parser.add_argument("--host", default="127.0.0.1", choices=("127.0.0.1", "0.0.0.0", "::"), help="where to listen")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch-size", type=int, default=16, help="requests that one call of the network takes")
    parser.add_argument("--batch-timeout", type=float, default=0.002, help="seconds to wait for more of them")
    parser.add_argument("--devices", type=int, default=1, help="GPUs to use, each with the whole network")
    parser.add_argument("--workers-per-device", type=int, default=1, help="processes with the network")
    parser.add_argument("--resize", action="store_true", help="cut pictures to a square and scale them to the network")
    options = parser.parse_args(argv)
    if options.max_batch_size < 1 or options.batch_timeout <= 0:
        parser.error("--max-batch-size must be >= 1 and --batch-timeout > 0")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    for stop in (signal.SIGINT, signal.SIGTERM):  # else its other processes would outlive this one
        signal.signal(stop, signal.default_int_handler)
    make_server(options.package, options).run(
        host=options.host, port=options.port, generate_client_file=False, pretty_logs=False
    )


if __name__ == "__main__":
    main()
