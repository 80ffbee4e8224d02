"""Decoding with a static cache gives the tokens of `model.generate`, also as a graph that runs no Python again."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from gs_algos import quantize_weights
from gs_algos.llm.decode import Decoder, Sampling, generate, run
from gs_algos.llm.static_cache import why_not_static
from gs_kernels.runtime.dispatch import INTERPRET, UnsupportedError
from tests.llm.recorded_graph import RecordedGraphs
from tests.nets.transformers_models import LANGUAGE_MODELS, tiny_language_model

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: nothing here is a kernel")

OTHERS = ("BloomConfig", "MambaConfig")
STATIC = [name for name in LANGUAGE_MODELS if name not in OTHERS]
NEW = 20  # more than a sliding window of 8


def padded() -> tuple[Tensor, Tensor]:
    """Two prompts of 12 tokens, the second with padding on the left: longer than a sliding window, and its mask."""
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return ids, mask


def wanted(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


def without_end(name: str = "LlamaConfig", **options: Any) -> Any:
    """A model whose rows never end."""
    return tiny_language_model(name, eos_token_id=None, **options)


@pytest.mark.parametrize("name", STATIC)
def test_tokens_are_those_of_transformers(name: str):
    model = tiny_language_model(name)
    ids, mask = padded()
    assert why_not_static(model) == ""
    assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW), wanted(model, ids, mask))
    assert torch.equal(generate(model, ids[:1], max_new_tokens=NEW), wanted(model, ids[:1]))


@pytest.mark.parametrize("name", STATIC)
def test_a_step_that_is_recorded_once_gives_all_the_tokens(name: str):
    model, graphs = without_end(name), RecordedGraphs()
    ids, mask = padded()
    decoder = Decoder(model, batch=2, length=12 + NEW, capture=graphs)
    made = run(decoder, ids, mask, max_new_tokens=NEW)
    assert torch.equal(made, wanted(model, ids, mask)[:, 12:])
    assert (graphs.made, graphs.replays) == (1, NEW - 1)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_packed_layers_are_recorded_as_ops(bits: int):
    model, graphs = without_end(), RecordedGraphs()
    quantize_weights(model, f"int{bits}@group:8", embeddings="int8@group:8", progress=False)
    ids, mask = padded()
    made = run(Decoder(model, batch=2, length=12 + NEW, capture=graphs), ids, mask, max_new_tokens=NEW)
    assert torch.equal(made, wanted(model, ids, mask)[:, 12:])
    assert sum(str(call[0]) == "gs_kernels.qmatmul.default" for call in graphs.recorder.calls) == 15


def test_a_graph_serves_one_prompt_after_the_other_in_the_same_memory():
    model, graphs = without_end(), RecordedGraphs()
    decoder = Decoder(model, length=32, capture=graphs)
    decoder.prepare()
    layers = decoder.cache.layers
    places = [t.data_ptr() for t in (decoder.ids, decoder.made, *(layer.keys for layer in layers))]
    for length in (3, 9, 1):
        ids = torch.arange(3, 3 + length)[None]
        assert torch.equal(run(decoder, ids, max_new_tokens=NEW), wanted(model, ids)[:, length:])
    assert places == [t.data_ptr() for t in (decoder.ids, decoder.made, *(layer.keys for layer in layers))]
    assert (graphs.made, graphs.replays) == (1, 3 * (NEW - 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.sum().item(), "Python reads a value"),
        (lambda x: torch.tensor([1.0]), "made of a Python value"),
        (lambda x: x[x > 0], "depends on values"),
    ],
)
def test_the_recorder_refuses_what_a_graph_cannot_hold(make: Any, words: str):
    with pytest.raises(RuntimeError, match=words):
        RecordedGraphs()(lambda: make(torch.ones(3)), lambda: None)


def test_the_static_cache_of_transformers_for_windows_cannot_be_captured():
    from transformers import StaticCache

    model = without_end("MistralConfig")
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = padded()[0]
    with torch.no_grad():
        model(ids, cache=cache)
        with pytest.raises(RuntimeError, match="made of a Python value"):
            RecordedGraphs()(lambda: model(ids[:, :1], cache=cache), lambda: None)


def test_a_step_that_cannot_be_captured_runs_as_it_is(caplog: pytest.LogCaptureFixture):
    model = without_end("MixtralConfig", experts_implementation="eager")
    ids, mask = padded()
    with caplog.at_level(logging.WARNING, "gs_algos"):
        decoder = Decoder(model, batch=2, length=12 + NEW, capture=RecordedGraphs())
        made = run(decoder, ids, mask, max_new_tokens=NEW)
    assert torch.equal(made, wanted(model, ids, mask)[:, 12:])
    line = "generate: no CUDA graph, as the step cannot be captured: capture: the shape of aten.nonzero.default depends"
    assert [r.message for r in caplog.records] == [f"{line} on values"]


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.0, top_k=5), Sampling(1.5, 40, 0.9)])
def test_draws_are_those_of_transformers(sampling: Sampling):
    model = without_end()
    ids, mask = padded()
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        want = wanted(model, ids, mask, do_sample=True, **options)
        torch.manual_seed(3)
        assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW, sampling=sampling), want)
        torch.manual_seed(3)
        decoder = Decoder(model, batch=2, length=12 + NEW, sampling=sampling, capture=RecordedGraphs())
        assert torch.equal(run(decoder, ids, mask, max_new_tokens=NEW), want[:, 12:])


def test_what_is_unlikely_is_never_drawn():
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]])  # p: 0.035, 0.70, 0.26, 0.013
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for sampling, tokens in (
            (Sampling(1.0, 2), {1, 2}),
            (Sampling(1.0, 0, 0.5), {1}),
            (Sampling(2.0, 9), {0, 1, 2, 3}),
        ):
            assert {int(sampling.choose(logits)) for _ in range(200)} == tokens


@pytest.mark.parametrize(
    "values", [(-1.0, 0, 1.0), (float("nan"), 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.1)]
)
def test_sampling_of_no_sense_is_refused(values: tuple[float, int, float]):
    with pytest.raises(ValueError, match=r"Sampling: temperature and top_k must be >= 0 and top_p in \(0, 1\]"):
        Sampling(*values)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_rows_end_and_are_filled_whatever_runs_ahead(ahead: int):
    model = without_end()
    ids, mask = padded()
    free = wanted(model, ids, mask)[:, 12:]
    stop = (int(free[0, 4]), int(free[1, 9]))
    ends = [next(i for i, token in enumerate(row.tolist()) if token in stop) for row in free]
    decoder = Decoder(model, batch=2, length=12 + NEW, stop=stop, pad=7)
    made = run(decoder, ids, mask, max_new_tokens=NEW, ahead=ahead)
    assert made.shape[1] == max(ends) + 1 < NEW
    for row, end, got in zip(free, ends, made, strict=True):
        assert torch.equal(got, torch.where(torch.arange(made.shape[1]) <= end, row[: made.shape[1]], 7))


class Heard:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.heard.append([])


@pytest.mark.parametrize("name", ["LlamaConfig", "BloomConfig"])
def test_a_streamer_gets_the_prompt_then_each_token(name: str):
    model, streamer = without_end(name), Heard()
    made = generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=4, streamer=streamer)
    assert streamer.heard == [[5, 6, 7], *([token] for token in made[0, 3:].tolist()), []]


def test_long_prompts_are_read_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gs_algos.llm.decode.CHUNK", 5)
    for name in ("LlamaConfig", "Gemma2Config"):
        model = without_end(name)
        ids, mask = padded()
        assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW), wanted(model, ids, mask))
        decoder = Decoder(model, batch=2, length=12 + NEW, capture=RecordedGraphs())
        assert torch.equal(run(decoder, ids, mask, max_new_tokens=NEW), wanted(model, ids, mask)[:, 12:])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("BloomConfig", "BloomForCausalLM, which takes no cache with positions"),
        ("MambaConfig", "MambaForCausalLM, which Transformers does not decode with a static cache"),
    ],
)
def test_models_without_a_static_cache_are_left_to_transformers(name: str, why: str, caplog: pytest.LogCaptureFixture):
    model = tiny_language_model(name)
    ids, mask = padded()
    with caplog.at_level(logging.WARNING, "gs_algos"):
        assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW), wanted(model, ids, mask))
    line = f"generate: no static cache and no CUDA graph, but model.generate: {why}"
    assert [r.message for r in caplog.records if r.name == "gs_algos.llm.decode"] == [line]
    with pytest.raises(UnsupportedError, match=f"a static cache needs a model that supports one, got {why}"):
        Decoder(model, length=32)


def test_settings_that_are_not_followed_are_left_to_transformers(caplog: pytest.LogCaptureFixture):
    model = without_end()
    model.generation_config.repetition_penalty = 1.7
    ids, mask = padded()
    with caplog.at_level(logging.WARNING, "gs_algos"):
        assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW), wanted(model, ids, mask))
    assert "generation_config sets repetition_penalty" in caplog.text


def test_top_k_and_top_p_are_those_of_the_generation_config():
    model = without_end()
    assert Sampling.of(model, 0.5) == Sampling(0.5, 50, 1.0)
    model.generation_config.update(top_k=7, top_p=0.8)
    assert Sampling.of(model, 0.5) == Sampling(0.5, 7, 0.8)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (torch.ones(1, 17, dtype=torch.int64), None, "must fit into a cache of 16 tokens, got 17; give a shorter"),
        (torch.ones(1, 0, dtype=torch.int64), None, r"must be \[1, T\] with at least one token, got \[1, 0\]"),
        (torch.ones(2, 3, dtype=torch.int64), None, r"must be \[1, T\] with at least one token, got \[2, 3\]"),
        (torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]]), "padding must be on the left"),
        (torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]]), "padding must be on the left"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(ids: Tensor, mask: Tensor | None, words: str):
    decoder = Decoder(without_end(), length=16)
    with pytest.raises(ValueError, match=f"generate: .*{words}"):
        decoder.start(ids, mask)
    with pytest.raises(
        RuntimeError, match="a step needs a prompt and room in the cache of 16, got nothing was started"
    ):
        decoder.step()


def test_new_tokens_without_room_are_refused_before_anything_runs():
    model = without_end()
    with pytest.raises(ValueError, match="must fit into a cache of 16 tokens, got 10 and 7; give a shorter prompt"):
        run(Decoder(model, length=16), torch.ones(1, 10, dtype=torch.int64), max_new_tokens=7)
    decoder = Decoder(model, length=4)
    decoder.start(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="got the cache is full"):
        decoder.step()
    with pytest.raises(ValueError, match="max_new_tokens must be positive, got 0"):
        generate(model, torch.ones(1, 4, dtype=torch.int64), max_new_tokens=0)


@pytest.mark.parametrize("name", ["GPT2Config", "OPTConfig"])
def test_more_positions_than_the_model_has_a_table_for_are_refused(name: str):
    model = without_end(name)
    ids = torch.full((1, 44), 5)
    assert generate(model, ids, max_new_tokens=20).shape == (1, 64)
    with pytest.raises(ValueError, match="must be at most 64, all positions that the model has, got 65"):
        generate(model, ids, max_new_tokens=21)
