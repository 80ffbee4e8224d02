"""Serves a `.pt2` package over HTTP; `golden-stick serve` starts `python -m gs_algos.serving.litserve_app NET.pt2`.

    POST /predict {"input": [[[0.1, ...], ...], ...]}    what the network takes, without the batch
    POST /predict {"image": "<base64 of a PNG or JPEG>"} a picture, normalized as the package says
    -> {"output": [...], "class": 3}                     class: of the largest output, where outputs are a vector

LitServe (extra `serve`) collects requests into batches. What is wrong with a request is answered with status 413 (too
long), 415 (no JSON) or 422, as soon as it is known: its length while it is read, the shape of lists before numbers are
made of them, and the size of a picture, which its header says, before pixels are.
"""

# no postponed annotations: LitServe looks at that of a request, and with a dict it refuses what is no JSON object

import argparse
import base64
import binascii
import io
import json
import math
import signal
import struct
import warnings
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
import torch
from fastapi import Depends, HTTPException, Request
from litserve.loops.base import LoopResponseType
from litserve.loops.simple_loops import BatchedLoop
from litserve.utils import LitAPIStatus, PickleableHTTPException
from torch import Tensor

from gs_algos.export.torch_package import PackageInput, read_package
from gs_kernels.runtime.torch_private import load_package

WHO = "serve"
MODES = {1: "L", 3: "RGB"}
EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # modes of Pillow
MAX_PAYLOAD = 32 * 2**20  # bytes of a request, at most
MAX_DRAINED = 2**29  # bytes that are read of a longer one, and dropped: clients write all before they read the answer
MAX_PIXELS = 25_000_000  # of a picture that is to be resized
NUMBER_BYTES = 64  # of JSON for each number: its digits, the comma, and spaces of an indented text
FRAME_BYTES = 2**16  # of JSON beside the numbers or the picture
PICTURE_BYTES = 2**20  # of a picture beside its pixels: profiles, previews
EXPECTED = '{"input": [...]} or {"image": "<base64>"}'


def most_bytes(package_input: PackageInput, resize: bool) -> int:
    """Returns the length in bytes of the longest request that can be right."""
    numbers = NUMBER_BYTES * math.prod(package_input.shape)
    picture = 0
    if package_input.pixels is not None:  # 16 bits of four channels, in base64
        picture = MAX_PAYLOAD if resize else (8 * math.prod(package_input.shape[1:]) + PICTURE_BYTES) * 4 // 3
    return min(MAX_PAYLOAD, FRAME_BYTES + max(numbers, picture))


async def read_request(request: Request) -> dict[str, Any]:
    """Reads the JSON object of a request, and refuses lists of another shape than the package takes.

    `request.app.state` has `package_input` and `limit`.

    Raises:
        HTTPException: of status 413, 415 or 422.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(415, f"{WHO}: the request must be application/json, got {kind:.60}")
    limit = request.app.state.limit
    length, body = 0, bytearray()
    async for part in request.stream():
        length += len(part)
        if length <= limit:
            body += part
        elif length > MAX_DRAINED:
            break
    if length > limit:
        got = f"{length:,}{' and more' if length > MAX_DRAINED else ''}"
        raise HTTPException(413, f"{WHO}: a request of this package must be at most {limit:,} bytes, got {got}")
    return parse_request(bytes(body), request.app.state.package_input)


def parse_request(body: bytes, package_input: PackageInput) -> dict[str, Any]:
    """Parses the bytes of a request, as `read_request` does.

    Raises:
        HTTPException: of status 422.
    """
    try:
        value = json.loads(body, object_pairs_hook=_object)
    except RecursionError as error:
        raise _refusal(f"the request must be {EXPECTED}, got JSON that is nested too deeply") from error
    except ValueError as error:
        got = f"{error!s:.200}" if body.strip() else "nothing"
        raise _refusal(f"the request must be JSON such as {EXPECTED}, got: {got}") from error
    if not isinstance(value, dict):
        raise _refusal(f"the request must be {EXPECTED}, got JSON's {type(value).__name__}")
    if _key(value) == "input":
        _flat(value["input"], package_input)
    elif not isinstance(value["image"], str):
        raise _refusal(_no_text(value["image"]))
    return value


def _key(request: dict[str, Any]) -> str:
    keys = sorted(request)
    if keys not in (["input"], ["image"]):
        raise _refusal(f"the request must be {EXPECTED}, got {keys!s:.200}")
    return keys[0]


def _no_text(value: Any) -> str:
    return f"image must be the base64 of a PNG or JPEG, got {type(value).__name__}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object that has a key twice")
    return found


class OneByOne(BatchedLoop):
    """Decodes each request by itself: one that is wrong is answered at once, and is no part of the batch.

    In LitServe's own loop every request of the batch would get the answer to the wrong one.
    """

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        requests, late = super().get_batch_requests(lit_api, request_queue, transport)
        samples = []
        for queue, uid, request in requests:
            try:
                samples.append((queue, uid, decode(request, lit_api.package_input, lit_api.resize)))
            except HTTPException as error:
                answer = PickleableHTTPException.from_exception(error)
                self.put_response(transport, queue, uid, answer, LitAPIStatus.ERROR, LoopResponseType.REGULAR)
        return samples, late


class PackageAPI(litserve.LitAPI):
    """Serves a package: one sample a request, any number of samples in one call of the network."""

    def __init__(self, package: str, package_input: PackageInput, resize: bool, **batching: Any) -> None:
        super().__init__(loop=OneByOne(), **batching)
        self.package, self.package_input, self.resize = package, package_input, resize

    def setup(self, device: str) -> None:
        index = torch.device(device).index
        self.run = load_package(self.package, -1 if index is None else index)
        self.place = torch.device(device)

    def decode_request(self, request: Annotated[dict[str, Any], Depends(read_request)], **kwargs: Any) -> Any:
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


def decode(request: dict[str, Any], package_input: PackageInput, resize: bool = False) -> Tensor:
    """Makes the sample of a request, in the shape and dtype that the package takes.

    Raises:
        HTTPException: of status 422, if it is wrong.
    """
    if _key(request) == "input":
        return _numbers(request["input"], package_input)
    return _picture(request["image"], package_input, resize)


def _numbers(value: Any, package_input: PackageInput) -> Tensor:
    dtype = getattr(torch, package_input.dtype)
    if not dtype.is_floating_point:
        return _whole_numbers(_flat(value, package_input), package_input, dtype)
    try:
        x = torch.from_numpy(np.array(_flat(value, package_input), dtype=np.float64)).view(package_input.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise _refusal(
            f"input must be nested lists of numbers of shape {list(package_input.shape)}, got: {error}"
        ) from error
    if not bool(x.to(dtype).isfinite().all()):
        raise _refusal(f"input must be of finite numbers, got NaN, infinity or more than {package_input.dtype} holds")
    return x.to(dtype)


def _whole_numbers(values: list[Any], package_input: PackageInput, dtype: torch.dtype) -> Tensor:
    """Makes a tensor of exactly these numbers: not by way of a float, which has no more than 53 bits."""
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not all(low <= v <= high and v == int(v) for v in values):  # NaN is in no range
        raise _refusal(f"input must be of whole numbers that {package_input.dtype} holds, got others")
    return torch.tensor([int(v) for v in values], dtype=dtype).view(package_input.shape)


def _flat(value: Any, package_input: PackageInput) -> list[Any]:
    """Flattens nested lists of the package's shape into one list of numbers.

    Raises:
        HTTPException: if they are others. It looks no deeper than the shape is, and stops at the first wrong length.
    """
    wanted, rows = list(package_input.shape), [value]
    must = f"input must be nested lists of numbers of shape {wanted}"
    for depth, size in enumerate(wanted):
        if any(not isinstance(row, list) for row in rows):
            wrong = next(row for row in rows if not isinstance(row, list))
            raise _refusal(f"{must}, got {type(wrong).__name__} at depth {depth}")
        if any(len(row) != size for row in rows):
            got = _shape(value)
            if len(got) > depth and got[depth] != size:
                raise _refusal(f"input must be of shape {wanted}, got {got}")
            raise _refusal(f"{must}, got lists of several lengths")
        rows = [item for row in rows for item in row]
    if any(isinstance(item, list) for item in rows):
        raise _refusal(f"input must be of shape {wanted}, got {_shape(value)}")
    others = sorted({type(item).__name__ for item in rows if type(item) not in (int, float)})
    if others:
        raise _refusal(f"{must}, got {', '.join(others)}")
    return rows


def _shape(value: Any, deepest: int = 16) -> list[int]:
    """Returns the lengths of the first list, of its first, and so on."""
    sizes: list[int] = []
    while isinstance(value, list) and len(sizes) < deepest:
        sizes.append(len(value))
        value = value[0] if value else None
    return sizes


def _picture(text: Any, package_input: PackageInput, resize: bool) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if package_input.pixels is None or len(package_input.shape) != 3 or package_input.shape[0] not in MODES:
        raise _refusal(f'the package takes no pictures, as it knows no mean and deviation; send {{"input": [...]}} '
                       f"of shape {list(package_input.shape)}")  # fmt: skip
    channels, height, width = package_input.shape
    if not isinstance(text, str):
        raise _refusal(_no_text(text))
    if len(text) > most_bytes(package_input, resize):
        raise _refusal(f"image must be at most {most_bytes(package_input, resize):,} characters, got {len(text):,}")
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
            warnings.simplefilter("ignore")  # of pictures between MAX_PIXELS and what Pillow refuses
            _check_header(opened, package_input, resize)
            if resize:
                opened.draft(None, (width, height))  # a JPEG can be decoded smaller
            image = opened.convert(MODES[channels])
    except (
        ValueError,
        binascii.Error,
        UnidentifiedImageError,
        OSError,
        EOFError,
        SyntaxError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        got = "other bytes" if isinstance(error, UnidentifiedImageError) else f"{error!s:.200}"
        raise _refusal(f"image must be the base64 of a PNG or JPEG, got: {got}") from error
    if resize:
        image = ImageOps.fit(image, (width, height))
    pixels = torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)
    mean, deviation = (torch.tensor(part).view(-1, 1, 1) for part in package_input.pixels)
    return ((pixels.float() / 255 - mean) / deviation).to(getattr(torch, package_input.dtype))


def _check_header(image: Any, package_input: PackageInput, resize: bool) -> None:
    """Refuses a picture by what its header says."""
    _, height, width = package_input.shape
    got = f"{image.width}x{image.height}"
    if not resize and image.size != (width, height):
        raise _refusal(
            f"image must be {width}x{height} pixels, got {got}; resize it, or start the server with --resize"
        )
    if image.width * image.height > MAX_PIXELS:
        raise _refusal(f"image must have at most {MAX_PIXELS:,} pixels, got {got}; resize it")
    if image.mode not in EIGHT_BITS:
        raise _refusal(f"image must have 8 bits a channel, got mode {image.mode}")
    if image.format == "PNG" and getattr(image, "is_animated", False):
        raise _refusal("image must be one picture, got an animation")


def _refusal(message: str) -> HTTPException:
    return HTTPException(422, f"{WHO}: {message}")


def make_server(package: Path, options: argparse.Namespace) -> litserve.LitServer:
    """Makes the server of a package, whose file is read but not yet loaded.

    Raises:
        ValueError: as `read_package`.
    """
    package_input = read_package(package, WHO)
    batching = {"max_batch_size": options.max_batch_size, "batch_timeout": options.batch_timeout}
    api = PackageAPI(str(package), package_input, options.resize, **batching)
    server = litserve.LitServer(
        api,
        accelerator=package_input.device,
        devices=options.devices,
        workers_per_device=options.workers_per_device,
    )
    server.app.state.package_input, server.app.state.limit = package_input, most_bytes(package_input, options.resize)
    return server


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
