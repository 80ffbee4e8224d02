"""A synthesis makes images of all of a network's classes from the network alone, and they feed what takes batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gs_algos import PTQ, SCOP, Distill, SimQAT, Synthesis
from gs_algos.distill.memory import ImageMemory, moved
from tests.nets.convolutional import SmallConvNet

SHAPE = (1, 8, 8)
OPTIONS: dict[str, Any] = {"batch_size": 64, "noise": 8, "width": 8}


class Quadrants(nn.Module):
    """Tells which quarter of an image `[B, 1, 8, 8]` is the brightest; with a batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(1, affine=False)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(4, 4)
        self.fc.weight.data.copy_(4 * torch.eye(4))
        self.fc.bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.bn(x)).flatten(1))


@pytest.fixture(scope="module")
def fitted() -> Synthesis:
    return Synthesis(Quadrants(), SHAPE, **OPTIONS).fit(40)


def test_images_are_of_all_classes_and_the_network_is_surer_of_them(fitted):
    before = Synthesis(Quadrants(), SHAPE, **OPTIONS)
    net = Quadrants().eval()
    sure = [net(images).softmax(1).amax(1).mean() for images in (before._images(0), fitted.batch(0))]
    assert fitted.check() > 0.9 and sure[1] > sure[0] + 0.05


def test_images_have_the_statistics_of_images(fitted):
    x = torch.cat(fitted.batches(4))
    assert x.shape == (256, *SHAPE) and abs(x.mean()) < 0.2 and 0.4 < x.std() < 1.3


def test_the_batch_of_a_number_is_the_same_each_time(fitted):
    assert torch.equal(fitted.batch(3), fitted.batch(3)) and not torch.equal(fitted.batch(3), fitted.batch(4))
    assert torch.equal(next(iter(fitted)), fitted.batch(0))


def test_the_loss_is_its_formula():
    net = Quadrants().eval()
    images = Synthesis(net, SHAPE, one_hot=0.5, balance=2.0, activation=0.3, statistics=0.7, **OPTIONS)
    images.generator.train()
    x = images.generator(images._noise(0))
    y = net(x)
    mean = y.softmax(1).mean(0)
    norm = x.mean((0, 2, 3)).abs().item() + abs(x.var(unbiased=False).item() - 1)  # from those of a new batch norm
    want = 0.5 * F.cross_entropy(y, y.argmax(1)) + 2 * (mean * mean.log()).sum()
    want = want - 0.3 * net.pool(net.bn(x)).abs().mean() + 0.7 * norm
    images._read, images._distances = [], []
    assert images._loss(images.teacher(x)).item() == pytest.approx(want.item(), rel=1e-4)


def test_the_student_and_the_teacher_stay_as_they_are():
    torch.manual_seed(0)
    teacher, student = Quadrants(), Quadrants()
    student.fc.weight.data.normal_()
    state = [{key: t.clone() for key, t in net.state_dict().items()} for net in (teacher, student)]
    images = Synthesis(teacher, SHAPE, **OPTIONS)
    x = images.step(student)
    assert x.shape == (64, *SHAPE) and not x.requires_grad and student.training and teacher.training
    for net, before in zip((teacher, student), state, strict=True):
        assert all(torch.equal(before[key], t) for key, t in net.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert not any(m._forward_pre_hooks for m in net.modules())


def test_images_on_which_the_student_errs_are_sought():
    torch.manual_seed(0)
    student = Quadrants()
    student.fc.weight.data.copy_(torch.eye(4))  # right, but not as sure
    gaps = []
    for adversarial in (0.0, 20.0):
        images = Synthesis(Quadrants(), SHAPE, adversarial=adversarial, statistics=0.0, **OPTIONS)
        for _ in range(20):
            images.step(student)
        y = images.teacher(x := images._images(0))
        gaps.append(images._divergence(student, x, y).item())
    assert gaps[1] > gaps[0]


def test_a_synthesis_goes_on_bit_for_bit():
    whole = Synthesis(Quadrants(), SHAPE, **OPTIONS)
    images = Synthesis(Quadrants(), SHAPE, **OPTIONS)
    for _ in range(2):
        whole.step()
        images.step()
    state = {key: t.clone() for key, t in images.state_dict().items()}
    again = Synthesis(Quadrants(), SHAPE, **OPTIONS)
    again.load_state_dict(state)
    assert again.steps == 2 and torch.equal(again.step(), whole.step())
    assert torch.equal(again._images(0), whole._images(0))
    with pytest.raises(ValueError, match="must be of this shape, noise and memory"):
        Synthesis(Quadrants(), SHAPE, batch_size=64, noise=9, width=8).load_state_dict(state)


def test_a_student_sees_the_images_of_a_step_and_then_earlier_ones():
    images = Synthesis(Quadrants(), SHAPE, **OPTIONS, shift=0)
    made = []
    for _ in range(3):
        made.append(images.step())
        first, *others = images.replay(3)
        assert torch.equal(first, made[-1]) and len(others) == 2
        known = {tuple(image) for image in torch.cat(made).half().flatten(1).tolist()}
        assert all(x.shape == first.shape and x.dtype == torch.float32 for x in others)
        assert {tuple(image) for x in others for image in x.flatten(1).tolist()} <= known
    again = list(images.replay(3))  # of the same step: nothing is kept twice
    assert len(images.memory) == 3 * 64 and all(torch.equal(a, b) for a, b in zip(again[1:], others, strict=True))


def test_images_are_moved_each_by_itself_and_edges_repeated():
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).repeat(8, 1, 1, 1)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    found = set()
    for image, border in zip(moved(x, 1, torch.Generator().manual_seed(0)), padded, strict=True):
        places = [(i, j) for i in range(3) for j in range(3) if torch.equal(image, border[:, i : i + 4, j : j + 5])]
        found.add(places[0])
    assert len(found) > 4 and torch.equal(moved(x, 0, torch.Generator()), x)


def test_a_memory_keeps_the_newest_images():
    memory = ImageMemory(5)
    for start in (0, 2, 4, 6):
        memory.add(torch.arange(start, start + 2.0).view(2, 1, 1, 1))
    assert len(memory) == 5 and sorted(memory.images.flatten().tolist()) == [3, 4, 5, 6, 7]
    drawn = memory.draw(100, torch.Generator().manual_seed(0))
    assert drawn.shape == (100, 1, 1, 1) and set(drawn.flatten().tolist()) == {3, 4, 5, 6, 7}


@pytest.mark.parametrize(
    "shape, batch_size, kept", [((1, 8, 8), 64, 50_000), ((1, 1024, 1024), 64, 512), ((1, 1024, 1024), 600, 600)]
)
def test_a_memory_holds_no_more_than_a_gibibyte_unless_told(shape, batch_size, kept):
    pooled = nn.Sequential(nn.AvgPool2d(shape[1] // 8), Quadrants())
    images = Synthesis(pooled, shape, batch_size=batch_size, noise=2, width=2)
    assert images.memory.most == kept


def test_a_replay_goes_on_bit_for_bit():
    def turns(images: Synthesis, count: int) -> list[torch.Tensor]:
        return [x for _ in range(count) for x in (images.step(), *images.replay(3))]

    options = {**OPTIONS, "memory": 100}  # images go after two steps
    whole, stopped, again = (Synthesis(Quadrants(), SHAPE, **options) for _ in range(3))
    want = turns(whole, 4)
    turns(stopped, 2)
    again.load_state_dict(stopped.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(turns(again, 2), want[8:], strict=True))
    with pytest.raises(ValueError, match=r"noise and memory, got images \[100, 1, 8, 8\]"):
        Synthesis(Quadrants(), SHAPE, **{**options, "memory": 99}).load_state_dict(stopped.state_dict())


def test_a_replay_needs_a_step():
    images = Synthesis(Quadrants(), SHAPE, **OPTIONS)
    with pytest.raises(RuntimeError, match="replay: a step must come before, got none"):
        images.replay()
    for count in (0, 2.5, "3", True):
        with pytest.raises(ValueError, match=f"replay: count must be a whole number >= 1, got {count!r}"):
            images.replay(count)


def test_a_collapsed_generator_is_refused():
    images = Synthesis(Quadrants(), SHAPE, **OPTIONS)
    images.generator.images = nn.BatchNorm2d(1)  # with a bias that one quarter gets
    images.teacher.fc.bias.data[2] = 100.0
    with pytest.raises(RuntimeError, match=r"of all classes, got an entropy of 0\.00 of the most, with 3 of 4 classes"):
        images.fit(1)
    with pytest.raises(RuntimeError, match="of all classes"):
        images.batch(0)


def test_a_loss_that_is_not_finite_is_refused():
    images = Synthesis(Quadrants(), SHAPE, **OPTIONS)
    images.generator.start.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"step: the loss must be finite, got nan in step 0"):
        images.step()


class NanNet(Quadrants):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.nan


@pytest.mark.parametrize(
    "teacher, shape, options, words",
    [
        (Quadrants(), (8, 8), {}, r"shape must be \(C, H, W\) with at least 4 pixels"),
        (Quadrants(), (1, 2, 8), {}, r"at least 4 pixels a side, got \(1, 2, 8\)"),
        (Quadrants(), (3, 8, 8), {}, "the inputs must run through the model"),
        (nn.Conv2d(1, 4, 3), SHAPE, {}, r"teacher must give logits \[B, classes\]"),
        (NanNet(), SHAPE, {}, "teacher must give finite logits"),
        (Quadrants(), SHAPE, {"balance": -1.0}, "balance must be finite and >= 0, got -1.0"),
        (Quadrants(), SHAPE, {"batch_size": 1}, "batch_size must be a whole number >= 2, got 1"),
        (Quadrants(), SHAPE, {"lr": 0.0}, "lr must be finite and > 0"),
        (Quadrants(), SHAPE, {"memory": 255}, "memory must be a whole number >= 256, got 255"),
        (Quadrants(), SHAPE, {"memory": 5e4}, "memory must be a whole number >= 256, got 50000.0"),
        (Quadrants(), SHAPE, {"shift": -1}, "shift must be a whole number >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused(teacher, shape, options, words):
    with pytest.raises(ValueError, match=words):
        Synthesis(teacher, shape, **options)


class Fed(SmallConvNet):
    """Is a network of four classes that takes the images."""


@pytest.mark.parametrize("name", ["calibrate", "ptq", "knockoffs", "distill"])
def test_the_images_feed(name, fitted):
    torch.manual_seed(0)
    net, x = Fed(), fitted.batch(0)
    if name == "calibrate":
        algo: Any = SimQAT()
        net = algo.apply(net, x[:2])
        algo.calibrate(net, fitted.batches(2))
    elif name == "ptq":
        algo = PTQ(weight="int8@channel", act="int8@tensor")
        net = algo.apply(net, x[:2])
        algo.calibrate(net, fitted.batches(2))
    else:
        knockoffs = name == "knockoffs"
        algo = SCOP(rate=0.5, select_steps=1, knockoffs=fitted) if knockoffs else Distill(SimQAT(), labels=0.0)
        net = algo.apply(net, x[:2])
        loss_fn = algo.loss(lambda y, target: y.square().mean())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for turn in range(2):
            data = fitted.batch(9) if name == "knockoffs" else fitted.batch(turn)
            loss_fn(net.train()(data), torch.zeros(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            algo.step()
    assert algo.convert(net).eval()(x).isfinite().all()


def test_an_adversary_of_a_student_that_is_being_quantized():
    torch.manual_seed(0)
    teacher = Quadrants()
    algo = Distill(SimQAT(), teacher, labels=0.0)
    net = algo.apply(Quadrants(), torch.zeros(2, *SHAPE))
    images = Synthesis(teacher, SHAPE, **OPTIONS)
    before = [t.clone() for t in net.state_dict().values()]
    x = images.step(net.train())
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    algo.loss(F.cross_entropy)(net(x), None).backward()
    assert net.fc.weight.grad is not None
