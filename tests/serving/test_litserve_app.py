"""`golden-stick serve`: a package behind real HTTP, the command for vLLM, and what cannot be served."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import SimQAT, save
from gs_algos.cli import serve as serve_module
from gs_algos.cli.app import run
from gs_algos.export.torch_package import export_package, read_package
from gs_algos.llm.quantize_checkpoint import quantize_checkpoint
from tests.nets.language_models import save_folder, tiny_llama

MEAN, DEVIATION = (0.25,), (0.5,)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6 * 7, 5)).eval()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of `small`."""
    path = tmp_path_factory.mktemp("package") / "net.pt2"
    return export_package(small(), torch.randn(2, 1, 6, 7), path, pixels=(MEAN, DEVIATION)).parent


def post(port: int, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_for(port: int, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            assert server.poll() is None, server.communicate()
            time.sleep(0.2)
    raise AssertionError("no answer")


@pytest.fixture(scope="module")
def served(package: Path) -> Iterator[tuple[int, str]]:
    """(port, the command that was printed) of a server that waits for four requests, or a fifth of a second."""
    pytest.importorskip("litserve", reason="litserve is not installed; it is in the extra serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--max-batch-size", "4", "--batch-timeout", "0.2"]
    command = [sys.executable, "-m", "gs_algos.cli.main", "serve", str(package), *options]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        said = server.stdout.readline().strip()
        wait_for(port, server)
        yield port, said
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def png(pixels: torch.Tensor, mode: str = "L", kind: str = "PNG") -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).convert(mode).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def test_the_command_that_is_printed_is_the_one_that_runs(served: tuple[int, str], package: Path):
    port, said = served
    words = shlex.split(said)
    assert words[:4] == [sys.executable, "-m", "gs_algos.serving.litserve_app", str(package / "net.pt2")]
    assert words[4:6] == ["--port", str(port)]


def test_lists_and_pictures_get_what_the_network_computes(served: tuple[int, str]):
    port, _ = served
    x = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(1))
    status, answer = post(port, {"input": x.tolist()})
    with torch.no_grad():
        want = small()(x[None])[0]
    assert status == 200, answer
    assert torch.allclose(torch.tensor(answer["output"]), want, atol=1e-6)
    assert answer["class"] == max(range(5), key=answer["output"].__getitem__)
    pixels = torch.randint(0, 256, (6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = small()(((pixels / 255 - MEAN[0]) / DEVIATION[0])[None, None])[0]
    for text in (png(pixels), png(pixels, "RGB"), f"data:image/png;base64,{png(pixels)}"):
        status, answer = post(port, {"image": text})
        assert status == 200
        assert torch.allclose(torch.tensor(answer["output"]), want, atol=1e-5)


def test_a_wrong_request_spoils_no_other_of_its_batch(served: tuple[int, str]):
    port, _ = served
    x = torch.randn(3, 1, 6, 7)
    bodies = [{"input": x[0].tolist()}, {"input": [[1.0]]}, {"input": x[1].tolist()}, {"input": x[2].tolist()}]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: post(port, body), bodies))
    assert [status for status, _ in answers] == [200, 422, 200, 200]
    with torch.no_grad():
        want = small()(x)
    got = torch.tensor([answer["output"] for status, answer in answers if status == 200])
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe"], ids=str)
def test_what_is_no_json_object_is_refused(body: Any, served: tuple[int, str]):
    assert post(served[0], body)[0] in (400, 422)


def post_raw(port: int, body: bytes, kind: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


JSON = "application/json"
RAW: dict[str, tuple[bytes, str, int, str]] = {
    "nested 900 deep": (b'{"input": ' + b"[" * 900 + b"]" * 900 + b"}", JSON, 422, "must be of shape [1, 6, 7]"),
    "nested 9000 deep": (b'{"input": ' + b"[" * 9000 + b"]" * 9000 + b"}", JSON, 422, "nested"),
    "another key 900 deep": (b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}", JSON, 422, "got ['x']"),
    "a long list": (b'{"input": [' + b"0," * 2**20 + b"0]}", JSON, 413, "must be at most"),
    "nothing": (b"", JSON, 422, "must be JSON such as"),
    "a list": (b"[1]", JSON, 422, "got JSON's list"),
    "a key twice": (b'{"input": 1, "input": 2}', JSON, 422, "a key twice"),
    "a form": (b"input=1", "application/x-www-form-urlencoded", 415, "must be application/json"),
    "text": (b'{"input": 1}', "text/plain", 415, "must be application/json"),
    "infinity": (
        b'{"input": [[[1e999' + b",0" * 6 + b"]" + b",[0,0,0,0,0,0,0]" * 5 + b"]]}",
        JSON, 422, "must be of finite numbers",
    ),
    "a picture 900 deep": (b'{"image": ' + b"[" * 900 + b"]" * 900 + b"}", JSON, 422, "PNG or JPEG, got list"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_a_wrong_body_is_answered_with_a_sentence(case: str, served: tuple[int, str]):
    body, kind, status, words = RAW[case]
    got, answer = post_raw(served[0], body, kind)
    assert (got, words in answer["detail"]) == (status, True), answer


ROW = [0.0] * 7
BAD: dict[str, tuple[Any, str]] = {
    "another shape": ({"input": [[ROW] * 5]}, "input must be of shape [1, 6, 7], got [1, 5, 7]"),
    "a batch": ({"input": [[[ROW] * 6]]}, "input must be of shape [1, 6, 7], got [1, 1, 6, 7]"),
    "ragged": ({"input": [[ROW] * 5 + [[0.0]]]}, "input must be nested lists of numbers of shape [1, 6, 7]"),
    "words": ({"input": "cat"}, "input must be nested lists of numbers"),
    "NaN": ({"input": [[ROW] * 5 + [[float("nan")] * 7]]}, "input must be of finite numbers"),
    "more than float32 holds": ({"input": [[ROW] * 5 + [[1e300] * 7]]}, "got NaN, infinity or more than float32 holds"),
    "a number of 400 digits": ({"input": [[ROW] * 5 + [[10**400] * 7]]}, "input must be nested lists of numbers"),
    "strings": ({"input": [[ROW] * 5 + [["1"] * 7]]}, "nested lists of numbers of shape [1, 6, 7], got str"),
    "truths": ({"input": [[ROW] * 5 + [[True] * 7]]}, "nested lists of numbers of shape [1, 6, 7], got bool"),
    "nothing in a list": (
        {"input": [[ROW] * 5 + [[None] * 7]]},
        "nested lists of numbers of shape [1, 6, 7], got NoneType",
    ),
    "an empty list": ({"input": []}, "input must be of shape [1, 6, 7], got [0]"),
    "an object": ({"input": {"a": 1}}, "nested lists of numbers of shape [1, 6, 7], got dict at depth 0"),
    "no key": ({"x": 1}, "the request must be"),
    "two keys": ({"input": 1, "image": "a"}, "got ['image', 'input']"),
    "no base64": ({"image": "cat"}, "image must be the base64 of a PNG or JPEG"),
    "no picture": ({"image": base64.b64encode(b"cat").decode()}, "image must be the base64 of a PNG or JPEG"),
    "a number": ({"image": 3}, "image must be the base64 of a PNG or JPEG"),
    "another size": (
        {"image": png(torch.zeros(7, 7, dtype=torch.uint8))},
        "image must be 7x6 pixels, got 7x7; resize it, or start the server with --resize",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_request_is_told_what_is_wrong(case: str, package: Path):
    litserve_app = pytest.importorskip("gs_algos.serving.litserve_app", reason="litserve is not installed")
    package_input = read_package(package / "net.pt2", "test")
    body, words = BAD[case]
    with pytest.raises(litserve_app.HTTPException) as refused:
        litserve_app.decode(body, package_input)
    assert refused.value.status_code == 422
    assert words in refused.value.detail


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def headed(width: int, height: int, bits: int = 8, color: int = 2, rest: bytes = b"") -> str:
    """The base64 of a PNG that has a header and no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + rest + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


HEADERS: dict[str, tuple[str, bool, str]] = {
    "another size": (headed(9000, 9000), False, "must be 7x6 pixels, got 9000x9000"),
    "too large to resize": (headed(9000, 9000), True, "must have at most 25,000,000 pixels, got 9000x9000"),
    "16 bits": (headed(7, 6, 16, 0), False, "must have 8 bits a channel, got mode I;16"),
    "an animation": (
        headed(7, 6, rest=chunk(b"acTL", struct.pack(">II", 3, 0))), False, "must be one picture, got an animation"
    ),
    "too long": ("A" * 2**21, False, "image must be at most"),
    "no pixels": (headed(7, 6), False, "image must be the base64 of a PNG or JPEG, got"),
    "no width": (headed(0, 6), False, "image must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_picture_is_refused_by_its_header(case: str, package: Path):
    litserve_app = pytest.importorskip("gs_algos.serving.litserve_app", reason="litserve is not installed")
    text, resize, words = HEADERS[case]
    with pytest.raises(litserve_app.HTTPException) as refused:
        litserve_app.decode({"image": text}, read_package(package / "net.pt2", "test"), resize)
    assert refused.value.status_code == 422
    assert words in refused.value.detail


def test_damaged_pictures_are_refused_whatever_is_damaged(package: Path):
    litserve_app = pytest.importorskip("gs_algos.serving.litserve_app", reason="litserve is not installed")
    package_input, generator = read_package(package / "net.pt2", "test"), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 7), dtype=torch.uint8, generator=generator)
    for kind in ("PNG", "JPEG"):
        whole = base64.b64decode(png(pixels, kind=kind))
        for trial in range(300):
            data = bytearray(
                whole[: int(torch.randint(1, len(whole), (), generator=generator))] if trial % 2 else whole
            )
            data[int(torch.randint(0, len(data), (), generator=generator))] ^= 255
            with contextlib.suppress(litserve_app.HTTPException):  # and nothing else
                litserve_app.decode({"image": base64.b64encode(data).decode()}, package_input)


def test_a_picture_of_another_size_can_be_resized(package: Path):
    litserve_app = pytest.importorskip("gs_algos.serving.litserve_app", reason="litserve is not installed")
    package_input = read_package(package / "net.pt2", "test")
    grey = png(torch.full((60, 90), 128, dtype=torch.uint8), kind="JPEG")
    x = litserve_app.decode({"image": grey}, package_input, resize=True)
    assert x.shape == (1, 6, 7)
    assert torch.allclose(x, torch.full_like(x, (128 / 255 - MEAN[0]) / DEVIATION[0]), atol=0.02)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    save_folder(base / "float", tiny_llama())
    quantize_checkpoint(base / "float", base / "packed", "int4@group:32", progress=False, shard_bytes=20_000)
    return base


@pytest.mark.parametrize("name", ["packed", "float"])
def test_a_language_model_becomes_vllm_with_the_options_given(
    name: str, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "vllm").write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\nexit 7\n')
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    folder = language_model / name
    command = [sys.executable, "-m", "gs_algos.cli.main", "serve", str(folder), "--tensor-parallel-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = ["vllm", "serve", str(folder), "--served-model-name", name, "--host", "127.0.0.1"]
    words += ["--tensor-parallel-size", "2"]
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == [shlex.join(words), *(f"<{word}>" for word in words[1:])]


def test_only_the_command_is_printed_in_a_dry_run(package: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["serve", str(package), "--dry-run", "--port", "9"]) == 0
    assert (
        capsys.readouterr().out.strip().endswith("gs_algos.serving.litserve_app " + f"{package / 'net.pt2'} --port 9")
    )


def test_a_vllm_of_another_name_is_started_as_a_module(language_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve_module.shutil, "which", lambda name: "/usr/bin/vllm")
    monkeypatch.setattr(serve_module, "_installed", lambda name: False)
    command = serve_module.serve_command(language_model / "packed")
    assert command[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


def refused(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    """The one line that serving a path fails with."""
    assert run(["serve", str(path), "--dry-run"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", ["package", "packed"])
def test_a_missing_engine_is_named_with_what_installs_it(
    name: str,
    package: Path,
    language_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(serve_module.shutil, "which", lambda name: None)
    wanted = {
        "package": (package, "needs litserve, got none; pip install 'golden-stick-triton[serve]'"),
        "packed": (language_model / "packed", "needs vLLM, got none; pip install vllm"),
    }
    path, words = wanted[name]
    assert words in refused(capsys, path)


def a_package(path: Path, said: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data/aotinductor/model/a.wrapper_metadata.json", json.dumps(said))


def a_network(path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    save(SimQAT().apply(net, torch.randn(2, 4)), path)


def changed_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.find(b"\x7fELF") + 2000
    data[at] ^= 1
    path.write_bytes(data)


SAYS = {"version": 1, "shape": [1, 8, 8], "dtype": "float32", "device": "cpu", "pixels": None}
KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda p: p.rmdir(), "got nothing there"),
    "an empty folder": (lambda p: None, "must be the folder of a language model, a .pt2 package or .*, got neither"),
    "a demo": (lambda p: (p / "demo.json").write_text("{}"), r"got a demo; golden-stick export .* --to pt2"),
    "a network": (a_network, "got a network of gs_algos.save; .*export_package"),
    "two packages": (
        lambda p: [a_package(p / name, {}) for name in ("a.pt2", "b.pt2")],
        r"must hold one \.pt2 package, got a\.pt2, b\.pt2",
    ),
    "another's package": (lambda p: a_package(p / "a.pt2", {}), "must say what it takes, got a package that .* did no"),
    "a newer package": (
        lambda p: a_package(p / "a.pt2", {"golden_stick": json.dumps({**SAYS, "version": 3})}),
        "version must be 1, got 3; update golden-stick",
    ),
    "a package of several inputs": (
        lambda p: a_package(
            p / "a.pt2", {"golden_stick": json.dumps({"version": 2, "inputs": ["x", "mask"], "outputs": ["y"]})}
        ),
        "must take one tensor and give one, got x, mask to y; call it with torch._inductor.aoti_load_package",
    ),
    "a package with another field": (
        lambda p: a_package(p / "a.pt2", {"golden_stick": json.dumps({**SAYS, "layout": "nhwc"})}),
        "must say what it takes, got .* it is damaged",
    ),
    "no package": (lambda p: (p / "a.pt2").write_text("text"), r"must be a whole \.pt2 package, got File is not"),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_is_no_model_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make, words = KINDS[case]
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    line = refused(capsys, folder)
    assert re.search(words, line), line


@pytest.mark.parametrize(
    ("name", "words"), [("a.onnx", "got an ONNX file"), ("a.gguf", "got a GGUF file"), ("a.txt", "neither")]
)
def test_files_of_other_kinds_are_named(name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / name).write_bytes(b"GGUF")
    assert words in refused(capsys, tmp_path / name)


@pytest.mark.parametrize("spoil", [changed_byte, lambda path: path.write_bytes(path.read_bytes()[:-100])])
def test_a_damaged_package_is_not_served(
    spoil: Callable[[Path], Any], package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(package / "net.pt2", tmp_path / "net.pt2")
    spoil(tmp_path / "net.pt2")
    assert "must be a whole .pt2 package" in refused(capsys, tmp_path / "net.pt2")


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_field(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"][name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def with_another_byte(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard missing": (without_a_shard, r"model-00002-of-\d+\.safetensors must be there"),
    "a changed byte": (with_another_byte, r"model-00002-of-\d+\.safetensors must have SHA-256 .* damaged"),
    "a newer version": (with_field("version", 2), "version must be at most 1, got 2; update golden-stick"),
    "an unknown field": (with_field("rotation", 1), "fields must be of .*, got 'rotation'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_language_model_is_not_served(
    case: str, language_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spoil, words = DAMAGE[case]
    folder = Path(shutil.copytree(language_model / "packed", tmp_path / "copy"))
    spoil(folder)
    line = refused(capsys, folder)
    assert re.search(words, line), line
