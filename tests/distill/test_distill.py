"""Distill around an algorithm trains it against a teacher, and nothing of it is left after convert."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gs_algos
from gs_algos import PTQ, SCOP, SLB, Calibrates, Distill, Prune, SimQAT
from gs_algos.core.algorithm import history
from gs_algos.pipeline.pipeline import Pipeline, Stage
from tests.helpers import Untouched
from tests.nets.convolutional import SmallConvNet, images, mlp

TARGET = torch.arange(8) % 4
INNER: dict[str, Any] = {
    "none": lambda: None,
    "simqat": lambda: SimQAT(weight="int4@channel"),
    "slb": lambda: SLB(weight="1bit@channel", total_steps=4),
    "scop": lambda: SCOP(rate=0.5, select_steps=2),
    "prune": lambda: Prune(rate=0.5),
}


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SmallConvNet()


class Wide(SmallConvNet):
    """Is SmallConvNet with a second block of more channels."""

    def __init__(self) -> None:
        super().__init__()
        wider = SmallConvNet()
        wider.block.conv2 = nn.Conv2d(8, 10, 3, 1, 1)
        wider.block.bn2 = nn.BatchNorm2d(10)
        wider.block.project = nn.Sequential(nn.Conv2d(6, 10, 1, 2, bias=False), nn.BatchNorm2d(10))
        self.block, self.fc = wider.block, nn.Linear(10, 4)


def trained(
    net: nn.Module, algo: Any, steps: int = 4, forward: Any = None, target: Tensor | None = TARGET
) -> list[float]:
    """The losses of some steps of plain SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    forward = net if forward is None else forward
    loss_fn, losses = algo.loss(F.cross_entropy), []
    net.train()
    while algo.steps < steps:
        optimizer.zero_grad()
        loss = loss_fn(forward(images(seed=algo.steps)), TARGET)
        loss.backward()
        optimizer.step()
        algo.step()
        losses.append(loss.item())
    return losses


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def wanted(net: nn.Module, teacher: nn.Module, x: Tensor, labels: float, logits: float, t: float) -> Tensor:
    """The loss by its formula."""
    y, taught = net(x), teacher(x).detach()
    kl = F.kl_div((y / t).log_softmax(-1), (taught / t).softmax(-1), reduction="batchmean")
    return labels * F.cross_entropy(y, TARGET) + logits * t**2 * kl


def test_the_loss_is_its_formula_on_the_network_as_it_was_before():
    net, teacher = small(), small().eval()
    algo = Distill(logits=0.7, labels=0.2, temperature=3.0)
    algo.apply(net, images())
    trained(net, algo, 2)  # the teacher does not follow
    want = wanted(copy.deepcopy(net), teacher, images(seed=9), 0.2, 0.7, 3.0)
    assert algo.loss(F.cross_entropy)(net(images(seed=9)), TARGET).item() == pytest.approx(want.item(), rel=1e-4)


def test_without_labels_there_is_no_term_on_labels():
    net, teacher = small(), small(1).eval()
    algo = Distill(teacher=teacher, logits=0.7, labels=0.2, temperature=3.0)
    algo.apply(net, images())
    want = wanted(copy.deepcopy(net), teacher, images(), 0.0, 0.7, 3.0)
    assert algo.loss(F.cross_entropy)(net(images()), None).item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["mse", "attention", "kernel"])
@pytest.mark.parametrize("inner", INNER)
def test_nothing_is_left_after_convert(inner, kind):
    net = small()
    algo = Distill(INNER[inner](), Wide(), features=0.5, kind=kind)
    net = algo.apply(net, images())
    assert hooks(net) >= 3 and not any("teacher" in key for key in net.state_dict())
    trained(net, algo)
    net = algo.convert(net)
    assert hooks(net) == 0 and not any("distill" in key for key in net.state_dict())
    (entry,) = history(net)
    assert (entry["algorithm"], entry["stage"]) == ("distill" if inner == "none" else inner, "converted")
    assert set(entry) & {"pairs", "parameters"} == set()


@pytest.mark.parametrize("inner", INNER)
def test_a_converted_network_is_saved_and_loaded(inner, tmp_path):
    algo = Distill(INNER[inner]())
    net = algo.apply(small(), images())
    trained(net, algo)
    net = algo.convert(net).eval()
    gs_algos.save(net, tmp_path)
    assert torch.equal(gs_algos.load(tmp_path, SmallConvNet).eval()(images()), net(images()))


def test_projections_and_widths_are_learned_and_the_teacher_is_not():
    net, teacher = small(), Wide()
    algo = Distill(SimQAT(), teacher, features=1.0, kind="kernel")
    net = algo.apply(net, images())
    state, learned = Untouched(teacher), [p.detach().clone() for p in algo.feature_parameters()]
    assert [list(p.shape) for p in learned] == [[10, 8], [2]]
    trained(net, algo)
    assert state and teacher.training and all(p.grad is None for p in teacher.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(learned, algo.feature_parameters(), strict=True))


def test_a_teacher_in_train_mode_answers_in_eval_mode():
    net, teacher = small(), small(1)
    teacher.train()
    algo = Distill(teacher=teacher, labels=0.0)
    algo.apply(net, images())
    got = algo.loss(F.cross_entropy)(net(images()), None)
    want = wanted(copy.deepcopy(net), copy.deepcopy(teacher).eval(), images(), 0.0, 0.9, 4.0)
    assert got.item() == pytest.approx(want.item(), rel=1e-4) and teacher.training


def test_compiled_and_eager_training_are_the_same():
    losses = []
    for compiled in (False, True):
        net = small()
        algo = Distill(SimQAT(), Wide(), features=1.0)
        net = algo.apply(net, images())
        losses.append(trained(net, algo, 3, torch.compile(net, backend="aot_eager") if compiled else net))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # a weight may round the other way


def test_under_autocast_the_terms_are_fp32():
    net = small()
    algo = Distill(SimQAT(), Wide(), features=1.0, kind="kernel")
    net = algo.apply(net, images())
    with torch.autocast("cpu", torch.bfloat16):
        loss = algo.loss(F.cross_entropy)(net.train()(images()), TARGET)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


class Checkpointed(SmallConvNet):
    """Runs its block again in the backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.stem(x)))
        return self.fc(checkpoint(self.block, y, use_reentrant=self.reentrant).mean((2, 3)))


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for build in (SmallConvNet, Checkpointed):
        torch.manual_seed(0)
        net = build()
        algo = Distill(None, Wide(), features=1.0)
        algo.apply(net, images())
        algo.loss(F.cross_entropy)(net.eval()(images()), TARGET).backward()  # statistics would be updated twice
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert all(torch.allclose(grad, grads[1][name], atol=1e-6) for name, grad in grads[0].items())


def test_features_that_no_gradient_reaches_are_refused(monkeypatch):
    monkeypatch.setattr(Checkpointed, "reentrant", True)
    net = Checkpointed()
    algo = Distill(None, Wide(), features=1.0, pairs=["block.bn2"])
    algo.apply(net, images())
    with pytest.raises(RuntimeError, match=r"none at block\.bn2; in gradient checkpointing set use_reentrant=False"):
        algo.loss(F.cross_entropy)(net.train()(images()), TARGET)


def test_default_pairs_are_the_last_blocks_of_each_size():
    net = nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        ),
        *(nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.ReLU()), nn.Flatten(), nn.Linear(100, 4)),
    )
    algo = Distill(features=1.0)
    algo.apply(net, images())
    assert history(net)[-1]["pairs"] == [["1", "1"], ["2", "2"]]


def test_what_the_inner_algorithm_has_is_there():
    algo = Distill(SimQAT())
    net = algo.apply(small(), images())
    assert isinstance(algo, Calibrates) and not isinstance(Distill(SCOP()), Calibrates)
    algo.calibrate(net, [images(seed=3)])
    trained(net, algo, 1)
    algo.convert(net)
    assert algo.parity is not None and "int8" in algo.summary(net)
    with pytest.raises(AttributeError, match="no attribute 'calibrate'"):
        Distill().calibrate(net)


def test_language_models_are_distilled_where_the_mask_is():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.embed(input_ids))}

    torch.manual_seed(0)
    net, teacher = Model(), Model()
    ids, mask = torch.arange(12).view(2, 6) % 11, torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    algo = Distill(SimQAT(act=None), teacher, labels=0.0, logits=1.0, temperature=1.0)
    net = algo.apply(net, batch)
    y, taught = net(**batch), teacher(**batch)["logits"].detach()
    kl = (taught.softmax(-1) * (taught.log_softmax(-1) - y["logits"].log_softmax(-1))).sum(-1)[mask.bool()].mean()
    assert algo.loss(lambda output, target: output)(y, None).item() == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("rows, seen", [(3, [3, 3, 2]), (8, [8])])
def test_a_teacher_that_sees_parts_gives_the_same_gradients(rows, seen):
    grads: list[list[Tensor]] = []
    sizes: list[int] = []
    for teacher_rows in (None, rows):
        net, teacher = small(), small(1)
        teacher.fc.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
        algo = Distill(SimQAT(), teacher, temperature=2.0, teacher_rows=teacher_rows)
        net = algo.apply(net, images())
        sizes.clear()
        loss = algo.loss(F.cross_entropy)(net.train()(images(seed=3)), TARGET)
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert sizes == seen
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_parts_take_one_backward():
    net = small()
    algo = Distill(teacher_rows=4)
    algo.apply(net, images())
    loss = algo.loss(F.cross_entropy)(net(images()), TARGET)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward where the teacher sees parts"):
        loss.backward()


def test_a_copy_is_converted_while_the_training_goes_on():
    algo = Distill(SimQAT(), features=1.0, kind="attention")
    net = algo.apply(small(), images())
    trained(net, algo, 2)
    other = algo.convert(copy.deepcopy(net), images())
    assert hooks(other) == 0 and hooks(net) >= 3
    trained(net, algo, 4)
    assert hooks(algo.convert(net)) == 0


def test_a_prepared_network_is_pickled_without_its_teacher():
    algo = Distill(None, small(1))
    net = algo.apply(small(), images())
    trained(net, algo, 1)
    net(images())
    data = pickle.dumps(net)
    assert b"Distill" not in data and len(data) < 2 * len(pickle.dumps(small()))
    assert hooks(algo.convert(pickle.loads(data))) == 0


class Stopped(Exception):
    pass


class Trainer:
    """Saves before each of four steps; stops before step `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop

    def __call__(self, net: nn.Module, stage: Stage) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        loss_fn = stage.algorithm.loss(F.cross_entropy)
        net.train()
        while stage.algorithm.steps < 4:
            if stage.folder is not None:
                stage.save(net)
            if self.stop == stage.algorithm.steps and stage.number == 2:
                raise Stopped
            optimizer.zero_grad()
            loss_fn(net(images(seed=stage.algorithm.steps)), TARGET).backward()
            optimizer.step()
            stage.algorithm.step()


@pytest.mark.parametrize("given", [False, True], ids=["copy", "given"])
def test_an_interrupted_pipeline_goes_on_as_if_nothing_had_been(given, tmp_path):
    def stages() -> list[gs_algos.Algorithm]:
        teacher = small(1) if given else None
        return [Prune(rate=0.5), Distill(SimQAT(), teacher, features=1.0, kind="kernel")]

    whole = Pipeline(stages()).run(small(), images(), Trainer()).eval()
    with pytest.raises(Stopped):
        Pipeline(stages(), tmp_path).run(small(), images(), Trainer(2))
    net = Pipeline(stages(), tmp_path).resume(SmallConvNet, images(), Trainer()).eval()
    assert torch.equal(net(images()), whole(images()))
    assert [entry["algorithm"] for entry in history(net)] == ["prune", "simqat"]
    assert torch.equal(gs_algos.load(tmp_path / "2-simqat", SmallConvNet).eval()(images()), whole(images()))


def test_another_distillation_is_not_resumed(tmp_path):
    with pytest.raises(Stopped):
        Pipeline([Prune(rate=0.5), Distill(SimQAT())], tmp_path).run(small(), images(), Trainer(1))
    for other, words in (
        (Distill(SimQAT(), temperature=2.0), "stage 2 distill with temperature=2.0"),
        (Distill(SimQAT(weight="int4@channel")), "stage 2 distill around .*int4@channel"),
        (SimQAT(), "simqat as stage 2"),
    ):
        with pytest.raises(ValueError, match=words):
            Pipeline([Prune(rate=0.5), other], tmp_path).resume(SmallConvNet, images(), Trainer())


def test_a_resumed_distillation_without_its_teacher_says_so(tmp_path):
    algo = Distill(SimQAT())
    gs_algos.save(algo.apply(small(), images()), tmp_path)
    net = gs_algos.load(tmp_path, SmallConvNet)
    algo = Distill.resume(net)
    with pytest.raises(RuntimeError, match=r"must have its teacher, got none; set algo\.teacher"):
        algo.loss(F.cross_entropy)(net(images()), TARGET)
    algo.teacher = small()
    assert algo.loss(F.cross_entropy)(net(images()), TARGET).isfinite()


def poisoned() -> nn.Module:
    net = small(1)
    net.fc.bias.data[0] = torch.nan
    return net


def other_classes() -> nn.Module:
    net = small(1)
    net.fc = nn.Linear(8, 7)
    return net


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "classes": ({"teacher": other_classes()}, r"student's shape, \[8, 4\], got \[8, 7\]"),
    "nan": ({"teacher": poisoned()}, r"the teacher must be finite, got nan or infinity in fc\.bias"),
    "other inputs": ({"teacher": mlp()}, "the inputs must run through the teacher, got"),
    "student's layer": (
        {"features": 1.0, "pairs": ["blok"]},
        r"the student must have the layers that pairs name, got 'blok'.*did you mean block",
    ),
    "teacher's layer": (
        {"teacher": small(1), "features": 1.0, "pairs": [("block", "stage")]},
        "the teacher must have the layers that pairs name, got 'stage'",
    ),
    "sizes": (
        {"teacher": small(1), "features": 1.0, "pairs": [("block", "stem")]},
        r"outputs of one size, got \[8, 8, 6, 6\] from the student's block and \[8, 6, 12, 12\]",
    ),
    "positions": (
        {"features": 1.0, "pairs": ["fc"], "kind": "attention"},
        r"must compare outputs with positions, got \[8, 4\] from fc",
    ),
}


@pytest.mark.parametrize("options, words", REFUSED.values(), ids=REFUSED)
def test_a_teacher_that_does_not_fit_is_refused_and_the_student_left_alone(options, words):
    net = small()
    before = Untouched(net)
    with pytest.raises(ValueError, match=f"^Distill.apply: .*{words}"):
        Distill(SimQAT(), **options).apply(net, images())
    assert before
    with pytest.raises(ValueError, match=f"^Distill.plan: .*{words}"):
        Distill(SimQAT(), **options).plan(net, images())


def test_the_student_is_no_teacher_of_its_own():
    net = small()
    with pytest.raises(ValueError, match="another network than the student, got one with parameters of the student"):
        Distill(SimQAT(), net).apply(net, images())


def test_wrong_calls_say_what_to_do():
    algo, net = Distill(), small()
    with pytest.raises(RuntimeError, match=r"Distill\.step: must come between apply and convert"):
        algo.step()
    algo.apply(net, images())
    with pytest.raises(RuntimeError, match="a forward of the model must come before, got none"):
        algo.loss(F.cross_entropy)(torch.zeros(8, 4), TARGET)
    with pytest.raises(ValueError, match=r"of the teacher's shape \[8, 4\], got \[4, 4\]"):
        algo.loss(F.cross_entropy)(net(images())[:4], TARGET[:4])
    with pytest.raises(RuntimeError, match="still prepared by distill; convert it"):
        Distill().apply(net, images())
    with pytest.raises(TypeError, match="inner must be an algorithm that trains, got PTQ"):
        Distill(PTQ())
    with pytest.raises(TypeError, match=r"teacher must be a nn\.Module, got str"):
        Distill(SimQAT(), "resnet")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"labels": -1.0}, "labels must be finite and >= 0, got -1.0"),
        ({"logits": 0.0}, "logits or features must be > 0"),
        ({"kind": "cosine"}, "kind must be one of mse, attention, kernel, got 'cosine'"),
        ({"teacher_rows": 0}, "teacher_rows must be >= 1"),
        ({"teacher_rows": 2, "features": 1.0}, "and features 0, which need all rows at once"),
        ({"pairs": ["a"]}, "features must be > 0 where pairs are given"),
        ({"features": 1.0, "pairs": [("a", "b", "c")]}, "every pair must be a name"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Distill(**options)
