"""Synthesizes images from a trained network alone: a generator learns what the network takes for its data.

Chen et al. 2019, arXiv:1904.01186 (DAFL): images of which the network is certain, that move its last features, and that
are of all classes together. Statistics of batch norms: Yin et al. 2020, arXiv:1912.08795. Images on which a student
still errs: Fang et al. 2022, arXiv:2112.06448, whose weights are the defaults. Earlier images shown to a student again:
Fang et al. 2021, arXiv:2105.08584; differs from it: they are moved by some pixels, not cropped and flipped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gs_algos.core.algorithm import run, without_parameter_gradients
from gs_algos.core.arguments import as_seed
from gs_algos.core.batches import device_of
from gs_algos.core.network import network_of
from gs_algos.core.progress import progress
from gs_algos.core.untouched import untouched
from gs_algos.distill.generator import SMALLEST, ImageGenerator
from gs_algos.distill.memory import ImageMemory, moved
from gs_algos.distill.teacher import logits_of, teacher_from
from gs_kernels.runtime.torch_private import _BatchNorm

WHO = "Synthesis"
CHECKED = 1024  # images whose classes tell whether the generator has collapsed
MEMORY, MEMORY_BYTES = 50_000, 2**30  # images that `replay` keeps unless told, and what they may take
DIVERSE = 0.8  # the least entropy of their classes, of the most there can be


class Synthesis:
    """Trains a generator of images against a network, without data. Its images feed all that takes batches.

    ```python
    images = Synthesis(teacher, (3, 32, 32)).fit(2000)
    algo.calibrate(net, images.batches(4))  # calibration, PTQ
    SCOP(knockoffs=images)  # knock-offs
    for turn in range(steps):  # training, with the teacher's answers in place of labels
        loss_fn(net(images.batch(turn)), None).backward()

    images = Synthesis(teacher, (3, 32, 32))  # or the generator and a student in turns, which is better
    for turn in range(steps):
        images.step(net)
        for x in images.replay(4):
            loss_fn(net(x), None).backward()
    ```
    The loss of a step is `one_hot * CE(y, argmax y) + balance * sum_c m_c log m_c - activation * mean |f|
    + statistics * S - adversarial * KL(teacher || student)`, with y the network's logits, m the mean of its
    probabilities over the batch, f what its last linear layer reads, and S the sum over its batch norms of how far mean
    and variance of the batch are from the running ones; the divergence counts where both networks are of one opinion.
    `one_hot=1, statistics=0, adversarial=0` is what DAFL takes for MNIST. To calibrate a network with batch norms,
    `distilled_images` takes less time, and large images.

    Args:
        teacher: gives logits `[B, classes]`; it is copied.
        shape: `(C, H, W)` of an image, at least 4 pixels a side. Images have mean 0 and standard deviation 1.
        noise: numbers that an image is made from.
        width: channels of the generator.
        lr: of the generator's Adam.
        memory: images that `replay` keeps, the newest, 2 bytes a number; at least `batch_size`. None for 50,000, or as
            many as 1 GiB holds where that is less: 3,566 of `(3, 224, 224)`.
        shift: pixels by which `replay` moves images at most.
        seed: of the generator and its noise.

    steps: of the generator so far.
    """

    def __init__(
        self,
        teacher: nn.Module,
        shape: tuple[int, int, int],
        *,
        one_hot: float = 0.5,
        balance: float = 5.0,
        activation: float = 0.1,
        statistics: float = 10.0,
        adversarial: float = 1.1,
        batch_size: int = 256,
        noise: int = 100,
        width: int = 64,
        lr: float = 1e-3,
        memory: int | None = None,
        shift: int = 2,
        seed: int = 0,
    ) -> None:
        weights = {"one_hot": one_hot, "balance": balance, "activation": activation}
        weights |= {"statistics": statistics, "adversarial": adversarial}
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{WHO}: {name} must be finite and >= 0, got {value}")
        if not any(weights.values()):
            raise ValueError(f"{WHO}: a weight of the loss must be > 0, got 0 for all")
        counts = {"batch_size": (batch_size, 2), "noise": (noise, 2), "width": (width, 2), "shift": (shift, 0)}
        if memory is not None:
            counts |= {"memory": (memory, batch_size)}
        for name, (count, least) in counts.items():
            if type(count) is not int or count < least:
                raise ValueError(f"{WHO}: {name} must be a whole number >= {least}, got {count}")
        if not 0 < lr < math.inf:
            raise ValueError(f"{WHO}: lr must be finite and > 0, got {lr}")
        shape = tuple(shape)  # type: ignore[assignment]
        if len(shape) != 3 or min(shape) < 1 or min(shape[1:]) < SMALLEST:
            raise ValueError(f"{WHO}: shape must be (C, H, W) with at least {SMALLEST} pixels a side, got {shape}")
        self.weights, self.shape, self.batch_size, self.seed = weights, shape, batch_size, as_seed(seed, f"{WHO}: seed")
        self.teacher = teacher_from(network_of(teacher, WHO))
        device = device_of(self.teacher) or torch.device("cpu")
        self.classes = self._classes(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.generator = ImageGenerator(shape, noise, width).to(device)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr, betas=(0.5, 0.999))
        self.steps = 0
        if memory is None:
            memory = max(batch_size, min(MEMORY, MEMORY_BYTES // (2 * math.prod(shape))))
        self.memory, self.shift = ImageMemory(memory), shift
        self._last: Tensor | None = None  # images of the last step
        self._remembered = False  # they are in the memory
        self._checked = -1  # steps at which the classes were looked at
        self._read: list[Tensor] = []  # by the last linear layer
        self._distances: list[Tensor] = []  # of the batch norms
        for module in self.teacher.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._keep_read)
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.register_forward_pre_hook(self._keep_distance)

    def step(self, student: nn.Module | None = None) -> Tensor:
        """Trains the generator by one batch; returns its images `[batch_size, C, H, W]`. `replay` shows them a student.

        student: for the adversarial term, a network for the same classes; it is run in eval mode and stays as it is.

        Raises:
            RuntimeError: if the loss is not finite.
        """
        self.generator.train()
        x = self.generator(self._noise(2 * self.steps))
        self._read, self._distances = [], []
        logits = logits_of(self.teacher(x), WHO)
        loss = self._loss(logits)
        if student is not None and self.weights["adversarial"]:
            loss = loss - self.weights["adversarial"] * self._divergence(student, x, logits)
        if not loss.isfinite():
            raise RuntimeError(f"{WHO}.step: the loss must be finite, got {loss.item()} in step {self.steps}; lower lr")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        self._last, self._remembered = x.detach(), False
        return self._last

    def replay(self, count: int = 4) -> Iterator[Tensor]:
        """Yields so many batches to train a student on: images of the last step, then of all steps that were replayed.

        Images of a step are few, and a student forgets those of before: to see them again costs much less than to make
        others. Each is moved by up to `shift` pixels, another way each time.

        Raises:
            RuntimeError: if no step came before.
            ValueError: if count is no whole number >= 1.
        """
        if type(count) is not int or count < 1:
            raise ValueError(f"{WHO}.replay: count must be a whole number >= 1, got {count!r:.60}")
        if self._last is None:
            raise RuntimeError(f"{WHO}.replay: a step must come before, got none; call step(student) first")
        if not self._remembered:
            self.memory.add(self._last)
            self._remembered = True
        return self._replayed(self._last, count)

    def _replayed(self, last: Tensor, count: int) -> Iterator[Tensor]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
        yield moved(last, self.shift, random)
        for _ in range(count - 1):
            yield moved(self.memory.draw(self.batch_size, random), self.shift, random)

    def fit(self, steps: int = 2000, on_step: Callable[[int, int], None] | None = None) -> Synthesis:
        """Trains the generator until it has had so many steps, and looks at its classes.

        on_step: called with the steps so far, and all of them.

        Raises:
            RuntimeError: if the loss is not finite, or the generator has collapsed: see `check`.
        """
        for _ in progress(range(self.steps, steps), "training the generator of images"):
            self.step()
            if on_step is not None:
                on_step(self.steps, steps)
        self.check()
        return self

    def check(self) -> float:
        """Returns the entropy of the classes of 1,024 images, as a share of the most that there can be.

        Raises:
            RuntimeError: if it is below 0.8: the generator makes the images of few classes, or was not trained.
        """
        made = -(-CHECKED // self.batch_size)
        found = [self.teacher(self._images(number)).argmax(1) for number in range(made)]
        counts = torch.bincount(torch.cat(found)[:CHECKED].cpu(), minlength=self.classes).double()
        entropy = float(torch.special.entr(counts / counts.sum()).sum() / math.log(self.classes))
        if not entropy >= DIVERSE:
            raise RuntimeError(
                f"{WHO}: the images must be of all classes, got an entropy of {entropy:.2f} of the most, with "
                f"{int((counts == 0).sum())} of {self.classes} classes missing after {self.steps} steps; train longer, "
                "raise balance or lower one_hot"
            )
        self._checked = self.steps
        return entropy

    def batch(self, number: int) -> Tensor:
        """Makes the images of this number, `[batch_size, C, H, W]`: the same each time, for a generator as it is now.

        Raises:
            RuntimeError: if the generator has collapsed: see `check`.
        """
        if self._checked != self.steps:
            self.check()
        return self._images(number)

    def batches(self, count: int) -> list[Tensor]:
        """Makes the first so many batches."""
        return [self.batch(number) for number in range(count)]

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.batch, itertools.count())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what goes on from here: generator, optimizer, steps, the images of `replay`. All tensors."""
        state = {f"generator.{key}": value for key, value in self.generator.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
        if len(self.memory):
            state |= {"memory.images": self.memory.images[: len(self.memory)]}
            state |= {"memory.added": torch.tensor(self.memory.added)}
        return {**state, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: if it is not of a synthesis of this shape, noise and memory.
        """
        slots: dict[int, dict[str, Tensor]] = {}
        own: dict[str, Tensor] = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "generator":
                own[rest] = value
            elif kind == "optimizer":
                index, _, slot = rest.partition(".")
                slots.setdefault(int(index), {})[slot] = value
        try:
            self.generator.load_state_dict(own)
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
            self.steps = int(state["steps"])
            self.memory, self._last = ImageMemory(self.memory.most), None
            if "memory.images" in state:
                images = state["memory.images"].to(self.generator.start.weight.device)
                self.memory.restore(images, int(state["memory.added"]), self.shape)
        except (RuntimeError, KeyError, ValueError) as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"{WHO}.load_state_dict: the state must be of this shape, noise and memory, got {told}"
            ) from error

    def _images(self, number: int) -> Tensor:
        self.generator.eval()
        with torch.no_grad():
            return self.generator(self._noise(2 * number + 1))  # type: ignore[no-any-return]

    def _noise(self, number: int) -> Tensor:
        """Draws noise, even numbers to train with, odd ones for batches."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        z = torch.randn(self.batch_size, self.generator.noise, generator=random)
        return z.to(self.generator.start.weight.device)

    def _classes(self, device: torch.device) -> int:
        with untouched(self.teacher):
            logits = logits_of(run(self.teacher, torch.zeros(2, *self.shape, device=device), WHO), f"{WHO}: teacher")
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"{WHO}: teacher must give logits [B, classes] of two or more, got {list(logits.shape)}")
        if not logits.isfinite().all():
            raise ValueError(f"{WHO}: teacher must give finite logits, got nan or infinity")
        return logits.shape[1]

    def _loss(self, logits: Tensor) -> Tensor:
        """Returns the terms that need no student."""
        weights = self.weights
        mean = logits.float().softmax(1).mean(0)
        loss = weights["one_hot"] * F.cross_entropy(logits.float(), logits.argmax(1))
        loss = loss - weights["balance"] * torch.special.entr(mean).sum()
        if self._read:
            loss = loss - weights["activation"] * self._read[-1].float().abs().mean()
        if self._distances:
            loss = loss + weights["statistics"] * torch.stack(self._distances).sum()
        return loss

    def _divergence(self, student: nn.Module, x: Tensor, logits: Tensor) -> Tensor:
        """Returns the mean of KL(teacher || student) of the images that both take for the same class, else 0."""
        flags = {module: module.training for module in student.modules()}
        student.eval()
        try:
            with without_parameter_gradients(student):
                theirs = logits_of(student(x), f"{WHO}: student")
        finally:
            for module, flag in flags.items():
                module.training = flag
        agree = theirs.argmax(1) == logits.argmax(1)
        log_q, log_p = theirs.float().log_softmax(1), logits.float().log_softmax(1)  # both depend on the images
        return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1) * agree).mean()

    def _keep_read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._read = [args[0]]

    def _keep_distance(self, module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].float()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        mean, variance = x.mean(axes), x.var(axes, unbiased=False)
        self._distances.append((mean - module.running_mean).norm() + (variance - module.running_var).norm())
