"""The terms of the loss have the values that their formulas give."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gs_algos.distill.losses import attention_map, feature_loss, first_projection, kernel_map, logit_sum


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logit_loss(student: Tensor, teacher: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    """The mean over the rows."""
    return logit_sum(student, teacher, temperature, standardize) / student[..., 0].numel()


def test_two_classes_by_hand():
    # softmax(0, 2 ln 3 / 2) = (1/4, 3/4) against (1/2, 1/2)
    teacher, student = torch.tensor([[0.0, 2 * math.log(3)]]), torch.zeros(1, 2)
    want = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert logit_loss(student, teacher, temperature=2.0).item() == pytest.approx(want, rel=1e-6)


def test_the_mean_is_over_rows_and_the_sum_over_classes():
    student, teacher = random(6, 50), random(6, 50, seed=1)
    want = 9 * F.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean")
    assert logit_loss(student, teacher, 3.0).item() == pytest.approx(want.item(), rel=1e-5)
    tokens = logit_loss(student.view(2, 3, 50), teacher.view(2, 3, 50), 3.0)
    assert tokens.item() == pytest.approx(want.item(), rel=1e-5)


def test_hidden_rows_do_not_count():
    student, teacher, mask = random(2, 4, 9), random(2, 4, 9, seed=1), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    want = logit_sum(student[mask.bool()], teacher[mask.bool()], 2.0)
    assert logit_sum(student, teacher, 2.0, mask=mask).item() == pytest.approx(want.item(), rel=1e-6)


def test_standardized_logits_do_not_depend_on_scale_and_shift():
    student, teacher = random(5, 10), random(5, 10, seed=1)
    want = logit_loss(student, teacher, 2.0, standardize=True)
    moved = logit_loss(student * 7 + 3, teacher * 0.2 - 1, 2.0, standardize=True)
    assert moved.item() == pytest.approx(want.item(), rel=1e-4)
    assert logit_loss(teacher * 5, teacher, 2.0, standardize=True).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["attention", "kernel"])
def test_equal_features_are_no_loss_and_others_are_one(kind):
    f, widths = random(3, 4, 5, 5), torch.ones(2)
    assert feature_loss(kind, f, f, torch.eye(4), widths).item() == pytest.approx(0, abs=1e-9)
    assert feature_loss(kind, f, random(3, 4, 5, 5, seed=1), torch.eye(4), widths).item() > 1e-3


def test_a_projection_is_a_convolution_of_one_pixel():
    student, teacher, weight = random(2, 3, 4, 4), random(2, 5, 4, 4, seed=1), random(5, 3, seed=2)
    want = F.mse_loss(F.conv2d(student, weight[:, :, None, None]), teacher)
    assert feature_loss("mse", student, teacher, weight).item() == pytest.approx(want.item(), rel=1e-5)


def test_an_attention_map_has_length_one():
    maps = attention_map(random(3, 4, 5, 5))
    assert maps.shape == (3, 25) and torch.allclose(maps.norm(dim=1), torch.ones(3))


def test_a_kernel_map_is_the_exponential_over_its_largest_value():
    f = random(2, 3, 4, 4).float()
    exponent = (f / f.square().mean().sqrt() / (2 * 0.8**2)).flatten(1)
    want = exponent.exp() / exponent.exp().amax(1, keepdim=True)
    got = kernel_map(f, torch.tensor(0.8)).flatten(1)
    assert torch.allclose(got, want.clamp(min=math.exp(-20)), rtol=1e-5)


def test_shrinking_both_maps_of_a_kernel_does_not_help():
    student, teacher = random(3, 4, 5, 5), random(3, 4, 5, 5, seed=1)
    want = feature_loss("kernel", student, teacher, torch.eye(4), torch.ones(2))
    small = feature_loss("kernel", student, teacher, 1e-3 * torch.eye(4), torch.ones(2))
    assert small.item() == pytest.approx(want.item(), rel=1e-3)


def test_a_first_projection_is_the_identity_or_the_same_each_time():
    assert torch.equal(first_projection(3, 3), torch.eye(3))
    assert torch.equal(first_projection(3, 5), first_projection(3, 5)) and first_projection(3, 5).shape == (3, 5)
