"""Generates tokens with a key-value cache of fixed size, so that a step of decoding is one CUDA graph on a GPU.

A step takes and gives no Python value: the last tokens, their positions, which rows are finished and what was generated
are buffers on the device, and the attention mask follows from the length that the cache counts there. The host starts
steps; it reads the tokens of one while the next one runs.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.llm.decoder_step import DecoderStep, decoder_step
from gs_algos.llm.libraries import library
from gs_algos.llm.static_cache import cache_argument, lengths, refuse_length, static_cache, why_not_static
from gs_algos.ptq.kv import KVScheme, chosen_kv, recorded_kv, refuse_without_cache
from gs_kernels.runtime.dispatch import UnsupportedError

logger = logging.getLogger(__name__)

WHO = "generate"
CHUNK = 1024  # tokens of a prompt that the model takes at once
WARM_UP = 3  # steps before a capture: kernels are compiled and libraries make their workspaces
STEPS_AHEAD = 1  # that a GPU has to do while the host reads the tokens of one before
DEFAULT_TOP_K = 50  # of Transformers, where a model's settings say nothing
# settings of a generation_config that decoding here follows, or that say nothing of which token is next
FOLLOWED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "max_cache_len", "disable_compile"),
    *("transformers_version", "_from_model_config"),
}

Step = Callable[[], None]
Capture = Callable[[Step, Step], Step]  # takes a step and what undoes it, and returns what runs the step again


@dataclass(frozen=True)
class Sampling:
    """Says how the next token is chosen: the likeliest one, or drawn as Transformers draws it.

    Args:
        temperature: that logits are divided by; 0 takes the likeliest token.
        top_k: how many of the likeliest tokens are drawn from; 0: all.
        top_p: the least probability that those drawn from have together, the likeliest first; 1: all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"Sampling: temperature and top_k must be >= 0 and top_p in (0, 1], "
                f"got {self.temperature}, {self.top_k} and {self.top_p}"
            )

    @staticmethod
    def of(model: Any, temperature: float) -> Sampling:
        """Takes top_k and top_p from the model's generation_config, as `model.generate` does."""
        held = model.generation_config
        top_k = DEFAULT_TOP_K if held.top_k is None else held.top_k
        return Sampling(temperature, top_k, 1.0 if held.top_p is None else held.top_p)

    def choose(self, logits: Tensor) -> Tensor:
        """Chooses tokens `[B]` by logits `[B, vocabulary]` in fp32. Shapes and Python take no value from the device."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p < 1:
            ascending, order = logits.sort(-1)
            below = ascending.softmax(-1).cumsum(-1)[:, :-1] <= 1 - self.top_p
            below = nn.functional.pad(below, (0, 1))  # the likeliest one stays
            logits = logits.masked_fill(below.scatter(1, order, below), -math.inf)
        p = logits.softmax(-1)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)  # as torch.multinomial draws one, without its checks


def cuda_graph(step: Step, undo: Step) -> Step:
    """Runs a step a few times on a stream of its own, captures it as a CUDA graph, and returns the graph's replay.

    The graph has a pool of memory of its own.
    """
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
            undo()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Decoder:
    """Decodes prompts one after the other, each step with the same tensors: `start` reads a prompt, `step` goes on.

    Layers with a sliding window get a cache of the full length too, and a mask: Transformers' own cache of a window
    counts in Python, which a graph would not repeat.

    Args:
        model: a causal language model of Transformers, in eval mode.
        batch: rows of every prompt.
        length: tokens that the cache has room for, of the prompt and those generated.
        sampling: how the next token is chosen.
        stop: tokens that end a row, whose later tokens are `pad`.
        pad: what a finished row is filled with.
        capture: makes the graph of a step, `cuda_graph` on a GPU; None runs each step as it is.
        kv: how keys and values are quantized; None leaves them float. With KIVI each step runs as it is.

    Raises:
        ValueError: if batch or length is not positive, length is more than the model's table of positions has, or kv
            does not fit the model.
        UnsupportedError: if the model cannot decode with a static cache; see `why_not_static`.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int = 1,
        length: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        pad: int = 0,
        capture: Capture | None = None,
        kv: KVScheme | None = None,
    ) -> None:
        if batch < 1 or length < 1:
            raise ValueError(f"{WHO}: batch and length must be positive, got {batch} and {length}")
        reason = why_not_static(model)
        if reason:
            raise UnsupportedError(f"{WHO}: a static cache needs a model that supports one, got {reason}")
        refuse_length(model, length, WHO)
        if kv is not None:
            refuse_without_cache(model, kv, WHO)
            if kv.group and capture is not None:
                logger.warning("%s: no CUDA graph, as %s rounds keys and values when Python counts a group", WHO, kv)
                capture = None
        self.model, self.length, self.capture = model, length, capture
        self.pad, self.sampling = pad, sampling or Sampling()
        self.names = set(inspect.signature(model.forward).parameters)
        self.cache = static_cache(model, length, whole=capture is not None, kv=kv)
        device = self.device = model.device
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # the last token of each row
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # and its position
        self.mask = torch.ones(batch, length, dtype=torch.int64, device=device)  # 0: padding on the left
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.made = torch.zeros(batch, length, dtype=torch.int64, device=device)  # what was generated
        self.count = torch.zeros(1, dtype=torch.int64, device=device)  # and how many tokens of each row
        self.stop = tuple(stop)
        self.ends = torch.tensor(self.stop, dtype=torch.int64, device=device)
        self.used = 0  # of the cache, known without asking the device; 0: nothing was started
        self._run: Step | None = None
        self._logits_of_step: DecoderStep | None = None  # in the place of the model's forward, on a CPU

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @torch.inference_mode()
    def prepare(self) -> None:
        """Makes the graph of a step, if there is to be one and there is none yet; `start` does so too."""
        if self._run is not None:
            return
        self._run = self._step
        if self.capture is not None and self.length > 1:
            with _apart(self.device):
                self._read(torch.zeros_like(self.ids), torch.ones_like(self.ids))
                self._run = self._captured(self.capture)

    def _captured(self, capture: Capture) -> Step:
        state = [self.ids, self.positions, self.finished, self.count, *lengths(self.cache)]
        held = [tensor.clone() for tensor in state]

        def undo() -> None:
            for tensor, value in zip(state, held, strict=True):
                tensor.copy_(value)

        try:
            return capture(self._step, undo)
        except RuntimeError as error:  # what is wrong with the step itself, its next run raises again
            logger.warning("%s: no CUDA graph, as the step cannot be captured: %s", WHO, str(error).partition("\n")[0])
            return self._step

    @torch.inference_mode()
    def start(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Reads a prompt in chunks and chooses the first token. What was decoded before is forgotten.

        Args:
            ids: `[B, T]` int64.
            mask: `[B, T]`, 0 for padding, which must be on the left; None: no padding.

        Raises:
            ValueError: if the prompt is empty, of another batch, longer than the cache, or padded on the right.
        """
        mask = self._checked(ids, mask)
        self.prepare()
        self._read(ids.to(self.device), mask.to(self.device, torch.int64))

    def _read(self, ids: Tensor, mask: Tensor) -> None:
        tokens = ids.shape[1]
        self.cache.reset()
        self.mask.fill_(1)
        self.mask[:, :tokens] = mask
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        for first in range(0, tokens, CHUNK):
            end = min(first + CHUNK, tokens)
            logits = self._logits(ids[:, first:end], positions[:, first:end], self.mask[:, :end])
        self.positions.copy_(positions[:, -1:])
        self.finished.zero_()
        self.count.zero_()
        self.used = tokens
        plain = self.batch == 1 and self.capture is None and self.device.type == "cpu" and bool(self.mask.all())
        self._logits_of_step = decoder_step(self.model, self.cache) if plain else None
        self._append(logits)

    def _checked(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        if ids.dim() != 2 or ids.shape[0] != self.batch or ids.shape[1] < 1 or mask.shape != ids.shape:
            raise ValueError(
                f"{WHO}: the prompt and its mask must be [{self.batch}, T] with at least one token, "
                f"got {list(ids.shape)} and {list(mask.shape)}"
            )
        if ids.shape[1] > self.length:
            raise ValueError(
                f"{WHO}: the prompt must fit into a cache of {self.length} tokens, got {ids.shape[1]}; "
                "give a shorter prompt or a larger length"
            )
        if not bool(mask[:, -1].all()) or bool((mask.diff(dim=-1) < 0).any()):
            raise ValueError(f"{WHO}: padding must be on the left, got a row that ends in it; set padding_side='left'")
        return mask

    @torch.inference_mode()
    def step(self) -> None:
        """Appends a token to each row, without waiting for the device.

        Raises:
            RuntimeError: if nothing was started, or the cache is full.
        """
        if not 0 < self.used < self.length:
            what = "the cache is full" if self.used else "nothing was started"
            raise RuntimeError(f"{WHO}: a step needs a prompt and room in the cache of {self.length}, got {what}")
        assert self._run is not None
        self.used += 1
        self._run()

    def _step(self) -> None:
        if self._logits_of_step is not None:
            self._append(self._logits_of_step(self.ids, self.positions, self.used - 1))
            return
        mask = self.mask if self.capture is not None else self.mask[:, : self.used]
        self._append(self._logits(self.ids, self.positions, mask))

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Returns the logits `[B, vocabulary]` behind the last of these tokens."""
        extra = {"logits_to_keep": 1} if "logits_to_keep" in self.names else {}
        extra[cache_argument(self.model)] = self.cache
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **extra)
        return output.logits[:, -1]

    def _append(self, logits: Tensor) -> None:
        token = self.sampling.choose(logits.float())
        if self.stop:
            token = token.masked_fill(self.finished, self.pad)
            self.finished.logical_or_((token[:, None] == self.ends).any(-1))
        self.ids.copy_(token[:, None])
        self.positions.add_(1)
        self.made.index_copy_(1, self.count, self.ids)
        self.count.add_(1)


def generate(
    model: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    streamer: Any = None,
    kv: str | None = None,
) -> Tensor:
    """Continues prompts: the tokens of `model.generate`, with a static cache, and on a GPU with one CUDA graph a step.

    Where a static cache is not possible, or the model's generation_config asks for more than `Sampling` knows, it calls
    `model.generate`, which uses a cache that grows, and logs why.

    Args:
        model: a causal language model of Transformers, in eval mode.
        ids: `[B, T]` int64.
        mask: `[B, T]`, 0 for padding, which must be on the left; None: no padding.
        max_new_tokens: where to stop at the latest; a row ends at the model's `eos_token_id`.
        sampling: how the next token is chosen; default: the likeliest.
        streamer: with `put(tokens)` and `end()`, as in Transformers: gets the prompt, then the tokens of each step.
        kv: scheme of keys and values, as of `PTQConfig`; None for that of the model's config, `none` for floats.

    Returns:
        `[B, T + generated]` int64: the prompts and what was generated; rows that ended are filled with the padding
        token.

    Raises:
        ValueError: if max_new_tokens is not positive, or as `kv_cache`, `Decoder` and its `start`.
    """
    scheme = chosen_kv(model, kv, WHO)
    sampling = sampling or Sampling()
    if max_new_tokens < 1:
        raise ValueError(f"{WHO}: max_new_tokens must be positive, got {max_new_tokens}")
    reason = why_not_static(model) or unknown_settings(model.generation_config)
    if reason:
        logger.warning("%s: no static cache and no CUDA graph, but model.generate: %s", WHO, reason)
        return _by_transformers(model, ids, mask, max_new_tokens, sampling, streamer, scheme)
    eos, pad = ends_of(model)
    length = ids.shape[1] + max_new_tokens
    capture = cuda_graph if model.device.type == "cuda" else None
    options: dict[str, Any] = {"sampling": sampling, "stop": eos, "pad": pad, "capture": capture, "kv": scheme}
    decoder = Decoder(model, batch=ids.shape[0], length=length, **options)
    made = run(decoder, ids, mask, max_new_tokens=max_new_tokens, streamer=streamer)
    return torch.cat([ids.to(made.device), made], 1)


def run(
    decoder: Decoder,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    streamer: Any = None,
    ahead: int | None = None,
) -> Tensor:
    """Starts a decoder and steps until every row has ended; returns the tokens generated, `[B, n]` on its device.

    Args:
        ahead: steps that are started before the tokens of one are read, so that the device never waits for the host;
            they are wasted when the last row ends. Default: 1 on a GPU, 0 on a CPU.

    Raises:
        ValueError: as `Decoder.start`, or if the cache has no room for the new tokens.
    """
    if ids.shape[-1] + max_new_tokens > decoder.length:
        raise ValueError(
            f"{WHO}: the prompt and the new tokens must fit into a cache of {decoder.length} tokens, "
            f"got {ids.shape[-1]} and {max_new_tokens}; give a shorter prompt or a larger length"
        )
    if ahead is None:
        ahead = STEPS_AHEAD if decoder.device.type == "cuda" else 0
    decoder.prepare()
    if streamer is not None:
        streamer.put(ids.cpu())
    decoder.start(ids, mask)
    coming = deque([_to_host(decoder.ids)])
    ended = [False] * decoder.batch
    started, taken = 1, 0
    while taken < max_new_tokens and not all(ended):
        while started < max_new_tokens and started - taken <= ahead:
            decoder.step()
            coming.append(_to_host(decoder.ids))
            started += 1
        tokens = coming.popleft()()
        taken += 1
        ended = [end or token in decoder.stop for end, token in zip(ended, tokens.tolist(), strict=True)]
        if streamer is not None:
            streamer.put(tokens)
    if streamer is not None:
        streamer.end()
    return decoder.made[:, :taken].clone()


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Gives a context with this device as the current one, behind which random numbers go on as if it had not been."""
    gpu = device.type == "cuda"
    with torch.cuda.device(device) if gpu else nullcontext(), torch.random.fork_rng([device] if gpu else []):
        yield


def _to_host(ids: Tensor) -> Callable[[], Tensor]:
    """Starts a copy of `ids [B, 1]` to the host, and returns the function that waits for it and gives `[B]`."""
    if ids.device.type != "cuda":
        copied = ids[:, 0].clone()
        return lambda: copied
    host = torch.empty(ids.shape[0], dtype=ids.dtype, pin_memory=True)
    host.copy_(ids[:, 0], non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait


def _by_transformers(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    streamer: Any,
    kv: KVScheme | None,
) -> Tensor:
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if kv is not None:
        options[cache_argument(model)] = library("gs_algos.llm.kv_cache", "transformers").kv_cache(model, kv)
    elif recorded_kv(model) is not None:
        options[cache_argument(model)] = library("transformers").DynamicCache(config=model.config)
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    ids = ids.to(model.device)
    mask = torch.ones_like(ids) if mask is None else mask.to(model.device)
    made: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, streamer=streamer, **options
    )
    return made


def ends_of(model: Any) -> tuple[tuple[int, ...], int]:
    """Returns the tokens that end a row and the one that pads it, by the model's generation_config."""
    held = model.generation_config
    eos = held.eos_token_id
    ends = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
    pad = held.pad_token_id
    return ends, (ends[0] if ends else 0) if pad is None else int(pad)


def unknown_settings(generation_config: Any) -> str:
    """Names the settings of a generation_config that `Sampling` does not know; "" if there are none."""
    held = generation_config.to_diff_dict()
    unknown = sorted(key for key, value in held.items() if key not in FOLLOWED and value not in (None, False))
    return f"generation_config sets {', '.join(unknown)}" if unknown else ""
