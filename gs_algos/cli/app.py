"""Declares the commands and their options. Each runs a function in a file of its own: demo.py, language.py, ..."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from gs_algos.analysis.analyze import TOLERANCE
from gs_algos.analysis.latency_table import CHOICES as FORMS_OF_LAYERS
from gs_algos.cli.analyze import Source, check_page, run_analyze, run_report
from gs_algos.cli.compress import run_compress
from gs_algos.cli.demo import DemoOptions, make_algorithm, pick_device, run_demo
from gs_algos.cli.export import TARGETS, run_export, run_import
from gs_algos.cli.info import describe_path
from gs_algos.cli.info_system import describe_system
from gs_algos.cli.language import CalibrationOptions, run_calibrate, run_generate, run_perplexity, run_quantize
from gs_algos.cli.latency import TOKENS, is_language_model, language_model, run_latency
from gs_algos.cli.search import SearchFiles, algorithms_of, read_choices, run_search
from gs_algos.cli.search_data import SAMPLES as SEARCHED_SAMPLES
from gs_algos.cli.serve import run_serve
from gs_algos.cli.tune import LAYER_HELP, LAYERS, ROWS, SHORTLIST_HELP, layers_of, parse_layer, run_tune
from gs_algos.core.arguments import memory_bytes
from gs_algos.core.registry import algorithm_names
from gs_algos.demo.data import DATA, load_data
from gs_algos.demo.imported import import_network, is_imported
from gs_algos.demo.models import MODELS, build
from gs_algos.demo.train import Interrupted
from gs_algos.llm.calibrate import SAMPLES
from gs_algos.ptq.kv import FORMS
from gs_algos.ptq.rounding import NAMES
from gs_algos.ptq.transforms import TRANSFORMS
from gs_algos.search.agent import AGENTS
from gs_algos.search.budget import EXAMPLES
from gs_algos.search.mixed_bits import CHOICES

DATA_HELP = f"One of {', '.join(DATA)}; a folder goes after a colon, e.g. cifar10:DIR. Or package.module:function."
TRAINED_ON_HELP = "A data set in place of the recipe's; synthetic: stages see images made from the float network alone."
MODEL_HELP = f"One of {', '.join(MODELS)}, or package.module:function that builds a network."
ALGORITHM_HELP = f"One of {', '.join(algorithm_names())}."
WEIGHT_HELP = "Scheme of the weights: bits, granularity, observer."
WEIGHTS_HELP = "Scheme, with 1, 2, 4 or 8 bits. Default: int4 with the largest group of 128, 64, 32 that divides all."
LANGUAGE_HELP = "A packed folder, a plain Transformers folder, or a GGUF file."
TRANSFORMS_HELP = f"Of {', '.join(TRANSFORMS)}, with a comma between: they make weights easier to round."
OFFLOAD_HELP = "Keep floats in files while calibrating. Default: if weights take over half of the free memory."
CHOICES_HELP = f"Schemes that --budget chooses from. Default: {','.join(CHOICES)}."
ROUNDING_HELP = f"{', '.join(NAMES)}. Default: nearest, or gptq with --calibration, --act or --transforms."
INFO_HELP = "A folder of gs_algos.save, demo, compress, quantize, export or import, a .pt2 package, or a GGUF file."
DTYPE_HELP = "float32, float16 or bfloat16. Default: what the model is stored in."
DEVICE_HELP = "cpu or cuda. Default: cuda if there is one."
KV_HELP = f"Scheme of the cache: {FORMS}."
OWN_KV_HELP = f"{KV_HELP} Default: what the model was quantized with; none for floats."
INPUT_HELP = "Of package.module:function, e.g. 1,3,224,224; of a language model, e.g. 1,128."
FORMS_HELP = "Forms of layers, with a comma between: a scheme of weights, or weights/inputs. none: only as they are."
ANALYZED_HELP = f"{MODEL_HELP} Or a language model: a Transformers folder, a GGUF file."
PAGE_HELP = "Where to write the page, e.g. page.html."
REPORT_HELP = "Also write a page that shows what was done, e.g. page.html."
ACT_HELP = "Scheme of the activations; none leaves them float."

SEARCHED_HELP = "What has rules to find, such as simqat, ptq, slb or prune; or several in order, with a comma between."
BUDGET_HELP = f"What the network may take: {EXAMPLES}; or two of them, with a comma."
SEARCH_CHOICES_HELP = (
    "Schemes of weights, float, and prune rates, with a comma between. Default: 2, 4, 8 bits; 0 to 0.75."
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def common(debug: Annotated[bool, typer.Option(help="Show the Python traceback of an error.")] = False) -> None:
    """Quantization and compression for PyTorch networks."""


@app.command()
def demo(
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "digits",
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "resnet20",
    algorithm: Annotated[str, typer.Option(help=ALGORITHM_HELP)] = "simqat",
    weight: Annotated[str, typer.Option(help=WEIGHT_HELP)] = "",
    act: Annotated[str, typer.Option(help=ACT_HELP)] = "",
    float_epochs: Annotated[int | None, typer.Option(help="Default: 30 for small sets, 5 for large.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of compressed training. Default: 10 or 2.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: 128, less for small sets.")] = None,
    image_size: Annotated[int, typer.Option(help="Side in pixels to which imagefolder resizes.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the networks and the training state.")] = Path(
        "golden-stick-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of initialization, shuffling and augmentation.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted demo in --out.")] = False,
    report: Annotated[Path | None, typer.Option(help=REPORT_HELP)] = None,
) -> None:
    """Trains a float network, compresses it, converts, saves, reloads, and prints what that did."""
    options = DemoOptions(
        data=data,
        model=model,
        algorithm=algorithm,
        weight=weight,
        act=act,
        float_epochs=float_epochs,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        seed=seed,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    run_demo(options, out, resume, Console(), report)


@app.command()
def compress(
    recipe: Annotated[Path, typer.Option(help="A .toml, .yaml or .json file: network, data, stages.")],
    out: Annotated[Path, typer.Option(help="Folder for the networks and the training state.")] = Path(
        "golden-stick-compress"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")] = False,
    report: Annotated[Path | None, typer.Option(help=REPORT_HELP)] = None,
    data: Annotated[str, typer.Option(help=TRAINED_ON_HELP)] = "",
) -> None:
    """Runs a recipe: trains a float network, then compresses it stage by stage, measuring each."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run_compress(recipe, out, resume, pick_device(name, "compress"), Console(), report, data)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help=f"What the network is built for. {DATA_HELP}")] = "digits",
    input_shape: Annotated[str, typer.Option(help="Of package.module:function, e.g. 1,3,224,224.")] = "",
    algorithm: Annotated[str, typer.Option(help=ALGORITHM_HELP)] = "simqat",
    weight: Annotated[str, typer.Option(help=WEIGHT_HELP)] = "",
    act: Annotated[str, typer.Option(help=ACT_HELP)] = "",
) -> None:
    """Prints what an algorithm would do to every layer of a network, and why not to the others."""
    algo = make_algorithm(algorithm, weight, act)
    net, example = _imported(model, input_shape) if is_imported(model) else _built(model, data, input_shape, "plan")
    print(algo.plan(net, example))


@app.command()
def latency(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Or the folder or GGUF file of a language model.")],
    data: Annotated[str, typer.Option(help=f"What the network is built for. {DATA_HELP}")] = "digits",
    input_shape: Annotated[str, typer.Option(help=INPUT_HELP)] = "",
    choices: Annotated[str, typer.Option(help=FORMS_HELP)] = ",".join(FORMS_OF_LAYERS),
    batch: Annotated[int | None, typer.Option(help="Samples of a forward. Default: those of the inputs.")] = None,
    seconds: Annotated[float, typer.Option(help="Of timing, for each layer and network in each form.")] = 0.2,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "",
    out: Annotated[Path, typer.Option(help="JSON file of the times, which is read and added to.")] = Path(
        "golden-stick-latency.json"
    ),
) -> None:
    """Times each layer of a network, float and packed, and says how well that predicts. Goes on where it stopped."""
    if model not in MODELS and is_language_model(model):
        shape = _shape(model, input_shape) if input_shape else TOKENS
        net, example = language_model(model, shape)
    elif is_imported(model):
        net, example = _imported(model, input_shape)
    else:
        net, example = _built(model, data, input_shape, "latency")
    where = pick_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), "latency")
    print(run_latency(net, example, choices, batch, seconds, where, out))


@app.command()
def search(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    weights: Annotated[Path | None, typer.Option(help="The trained network: a safetensors file.")] = None,
    data: Annotated[str, typer.Option(help=f"Whose training images policies are measured on. {DATA_HELP}")] = "digits",
    algorithm: Annotated[str, typer.Option(help=SEARCHED_HELP)] = "simqat",
    budget: Annotated[str, typer.Option(help=BUDGET_HELP)] = "40% bytes",
    choices: Annotated[str, typer.Option(help=SEARCH_CHOICES_HELP)] = "",
    acts: Annotated[str, typer.Option(help="Schemes of inputs, with a comma between. Default: the algorithm's.")] = "",
    weight: Annotated[str, typer.Option(help="Scheme of what has no choice.")] = "",
    act: Annotated[str, typer.Option(help=ACT_HELP)] = "",
    agent: Annotated[str, typer.Option(help=f"One of {', '.join(AGENTS)}.")] = "ilp",
    evaluations: Annotated[int, typer.Option(help="Policies that are measured, at most.")] = 200,
    score: Annotated[str, typer.Option(help="Of single choices: kl, gradient, nsr or auto.")] = "auto",
    samples: Annotated[int, typer.Option(help="Training images that policies are measured on.")] = SEARCHED_SAMPLES,
    batch: Annotated[int | None, typer.Option(help="Images of the forward that is timed. Default: 2.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "",
    latency: Annotated[Path | None, typer.Option(help="JSON file of times, as golden-stick latency writes it.")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="JSON lines of all that was measured; goes on from them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help=PAGE_HELP)] = None,
) -> None:
    """Finds bits or prune rates layer by layer that fit a budget and change a network least; prints them as rules."""
    where = pick_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), "search")
    files = SearchFiles(journal, latency, out)
    options = {
        "budget": budget,
        "choices": read_choices(choices),
        "acts": tuple(part.strip() for part in acts.split(",") if part.strip()),
        "agent": agent,
        "evaluations": evaluations,
        "score": score,
        "seed": seed,
    }
    algorithms = algorithms_of(algorithm, weight, act)
    print(run_search(model, weights, data, algorithms, batch, samples, where, files, **options))


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help=ANALYZED_HELP)],
    weights: Annotated[Path | None, typer.Option(help="The trained network: a safetensors file.")] = None,
    data: Annotated[str, typer.Option(help=f"Of a vision network. {DATA_HELP}")] = "digits",
    text: Annotated[Path | None, typer.Option(help="Of a language model, UTF-8. Default: a built-in one.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window of the text. Default: 512.")] = None,
    choices: Annotated[
        str, typer.Option(help="Schemes of weights, the one that layers are raised to last.")
    ] = "int2@channel,int4@channel,int8@channel",
    by: Annotated[str, typer.Option(help="kl, gradient or nsr. Default: kl, gradient from 100 layers on.")] = "auto",
    tolerance: Annotated[float, typer.Option(help="KL divergence in nats that is small enough.")] = TOLERANCE,
    out: Annotated[Path | None, typer.Option(help=PAGE_HELP)] = None,
) -> None:
    """Measures which layers of a float network mind few bits, and which rules mend that."""
    names = [name.strip() for name in choices.split(",") if name.strip()]
    print(run_analyze(model, weights, Source(data, text, context), names, by, tolerance, out))


@app.command()
def report(
    before: Annotated[Path, typer.Argument(help="The float network: a safetensors file, or a language model.")],
    after: Annotated[Path, typer.Argument(help="What was made of it: a folder of gs_algos.save, demo or quantize.")],
    model: Annotated[str, typer.Option(help=f"What both are built by. {MODEL_HELP}")] = "",
    data: Annotated[str, typer.Option(help=f"Of a vision network. {DATA_HELP}")] = "digits",
    text: Annotated[Path | None, typer.Option(help="Of a language model, UTF-8. Default: a built-in one.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window of the text. Default: 512.")] = None,
    tolerance: Annotated[float, typer.Option(help="KL divergence in nats that needs no advice.")] = TOLERANCE,
    out: Annotated[Path | None, typer.Option(help=PAGE_HELP)] = None,
) -> None:
    """Shows what compression did to a network: size, time, accuracy, errors layer by layer, and what to do next."""
    print(run_report(before, after, model, Source(data, text, context), tolerance, out))


@app.command()
def info(
    path: Annotated[Path | None, typer.Argument(help=INFO_HELP)] = None,
    system: Annotated[bool, typer.Option("--system", help="Versions, instruction sets, CPU kernels, GPUs.")] = False,
) -> None:
    """Describes a saved network or model from its files alone: algorithms, layers, bits, bytes."""
    if (path is None) != system:
        raise ValueError(f"info: a path or --system must be given, got {'both' if system else 'neither'}")
    print(describe_system() if path is None else describe_path(path))


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="A Transformers folder or a GGUF file.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the packed model.")],
    weights: Annotated[str, typer.Option(help=WEIGHTS_HELP)] = "",
    embeddings: Annotated[str, typer.Option(help="Scheme of the embeddings. Default: they stay float.")] = "",
    rule: Annotated[list[str] | None, typer.Option(help="PATTERN=SCHEME or PATTERN=none; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="What stays float is cast to it. Default: as it is.")] = "",
    device: Annotated[str, typer.Option(help="Where the weights are rounded. Default: the CPU.")] = "",
    rounding: Annotated[str, typer.Option(help=ROUNDING_HELP)] = "",
    act: Annotated[str, typer.Option(help="int8@token rounds the rows that linears read. Default: floats.")] = "",
    transforms: Annotated[str, typer.Option(help=TRANSFORMS_HELP)] = "",
    budget: Annotated[str, typer.Option(help="Bits chosen layer by layer: '4.5 bits', '80 MB', '30% bytes'.")] = "",
    choices: Annotated[
        str, typer.Option(help=f"Schemes that --budget chooses from. Default: {','.join(CHOICES)}")
    ] = "",
    kv: Annotated[str, typer.Option(help=f"{KV_HELP} Default: floats.")] = "",
    calibration: Annotated[Path | None, typer.Option(help="A text, or JSON lines, to calibrate on.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of signround and adaround. Default: 200 and 2000.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of the calibration text, at most.")] = SAMPLES,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window. Default: 2048, or what the model takes.")
    ] = None,
    offload: Annotated[bool | None, typer.Option(help=OFFLOAD_HELP)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped calibration was.")] = False,
    report: Annotated[Path | None, typer.Option(help=REPORT_HELP)] = None,
) -> None:
    """Packs the weights of a language model: to nearest, one tensor in memory at a time; or calibrated on a text."""
    options = CalibrationOptions(
        rounding, act, transforms, budget, choices, steps, calibration, samples, context, offload, resume
    )
    common = (source, target, weights, embeddings, rule or [], kv, dtype, device)
    options.refuse_unless_given()
    check_page(report, "quantize")
    print(run_calibrate(*common, options) if options.given else run_quantize(*common))
    if report is not None:
        run_report(source, target, "", Source(text=calibration), TOLERANCE, report)
        print(f"report: {report}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A packed language model; for pt2 and onnx the folder of a demo.")],
    target: Annotated[Path, typer.Argument(help="What to write; it must be new.")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")],
) -> None:
    """Writes a compressed model in the format of another library, with the same codes and scales."""
    print(run_export(source, target, to))


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(help="A compressed-tensors, GPTQ or AWQ folder, or a gpt-oss.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the packed model.")],
) -> None:
    """Reads a language model that another library quantized, exactly, into a packed folder of ours."""
    print(run_import(source, target))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A language model's folder, a .pt2 package, or a folder with one.")],
    verify: Annotated[bool, typer.Option(help="Compare the SHA-256 of packed files first.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
) -> None:
    """Starts the engine that fits, vLLM or LitServe, and prints the command. Other options go to the engine."""
    run_serve(path, context.args, verify, dry_run)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help=LANGUAGE_HELP)],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Where to stop at the latest.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, more is livelier.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "",
    kv: Annotated[str, typer.Option(help=OWN_KV_HELP)] = "",
) -> None:
    """Continues a prompt, printing as it goes, and says how fast that was."""
    print(run_generate(model, prompt, max_new_tokens, temperature, seed, dtype, device, kv), file=sys.stderr)


@app.command()
def perplexity(
    model: Annotated[Path, typer.Argument(help=LANGUAGE_HELP)],
    text: Annotated[Path, typer.Option(help="A text file, UTF-8.")],
    context: Annotated[int | None, typer.Option(help="Tokens of a window. Default: 1024, or all positions.")] = None,
    stride: Annotated[int | None, typer.Option(help="From one window to the next. Default: a window.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read so much of the text. Default: all.")] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "",
    kv: Annotated[str, typer.Option(help=OWN_KV_HELP)] = "",
) -> None:
    """Measures how well a language model expects a text: lower is better."""
    print(run_perplexity(model, text, context, stride, max_tokens, dtype, device, kv))


@app.command()
def tune(
    layer: Annotated[list[str] | None, typer.Option(help=LAYER_HELP)] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Of x, or pixels of y; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="package.module:function: the layers of that network instead.")] = "",
    input_shape: Annotated[str, typer.Option(help="Of the network, e.g. 32,3,224,224.")] = "",
    bits: Annotated[list[int] | None, typer.Option(help="Of the weights: 1, 2, 4 or 8; may be repeated.")] = None,
    x_bits: Annotated[list[int] | None, typer.Option(help="16 for floats, 8 for codes; may be repeated.")] = None,
    training: Annotated[bool, typer.Option(help="Also fake-quant and SLB for these layers.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or h200, h100, a100, b200: predict without a GPU.")] = "",
    keep: Annotated[int, typer.Option(help="Tiles of each problem that are timed, or printed.")] = 12,
    jobs: Annotated[int, typer.Option(help="Processes that compile. Default: one per processor.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the table. Default: GS_TUNING_DIR.")] = None,
    shortlist: Annotated[Path | None, typer.Option(help=SHORTLIST_HELP)] = None,
) -> None:
    """Finds the fastest tiles of our kernels on this GPU, and writes its table. Goes on where it stopped."""
    if model:
        layers = layers_of(*_imported(model, input_shape))
    else:
        layers = list(itertools.product(map(parse_layer, layer or LAYERS), sorted(set(rows or ROWS))))
    rest = (training, device, keep, jobs, out, shortlist, Console())
    run_tune(layers, bits or [4], x_bits or [16], *rest, strict=not model)


def run(arguments: list[str] | None = None) -> int:
    """Runs the command line; the exit code. An error is one line on stderr and 2, an interrupt one line and 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments, prog_name="golden-stick")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Interrupted as stop:
        print(f"{stop}; continue with --resume", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if "--debug" in arguments:
            raise
        print(f"golden-stick: {error}", file=sys.stderr)
        return 2
    return 0


def _built(model: str, data: str, input_shape: str, who: str) -> tuple[nn.Module, Tensor]:
    if input_shape:
        raise ValueError(f"{who}: --input-shape goes with package.module:function, got {model}; use --data")
    if model not in MODELS:
        build(model, in_channels=1, num_classes=2, image_size=32)
    images = load_data(data)
    net = build(model, in_channels=images.channels, num_classes=images.classes, image_size=images.image_size)
    return net, images.example()


def _shape(path: str, input_shape: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in input_shape.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(
            f"{path} needs --input-shape with positive sizes such as 1,3,224,224, got {input_shape[:60]!r}"
        )
    return shape


def _imported(path: str, input_shape: str) -> tuple[nn.Module, Tensor]:
    """Returns the network that `package.module:function` makes, and random inputs of the given shape."""
    shape = _shape(path, input_shape)
    nbytes, most = 4 * math.prod(shape), memory_bytes()
    if nbytes > most:
        raise ValueError(
            f"{path} needs --input-shape of a tensor that fits into memory, {most:,} bytes, got {input_shape[:60]!r} "
            "of more"
        )
    net = import_network(path)
    return net, torch.randn(shape, generator=torch.Generator().manual_seed(0))
