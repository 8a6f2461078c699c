"""Losses against values worked out by hand, and where their gradients go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edge_sdk.training import losses
from edge_sdk.training.batches import Answer, TopTokens
from tests import strategies  # noqa: F401  # its hypothesis profile

LN3 = math.log(3)


def scores(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, requires_grad=True)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.sum(), of)
    return found


def test_hard_loss_of_known_scores() -> None:
    """Probabilities 1/4 and 3/4: the loss of class 1 is -ln(3/4), that of class 0 is -ln(1/4), one value a row."""
    found = losses.hard(scores([0.0, LN3], [0.0, LN3]), torch.tensor([1, 0]))

    torch.testing.assert_close(found, torch.tensor([-math.log(3 / 4), -math.log(1 / 4)]))


def test_hard_gradient_of_known_scores() -> None:
    """The gradient is p - onehot: (1/4, 3/4) - (0, 1) = (1/4, -1/4)."""
    student = scores([0.0, LN3])

    torch.testing.assert_close(gradient(losses.hard(student, torch.tensor([1])), student), torch.tensor([[0.25, -0.25]]))


def test_soft_loss_of_known_scores() -> None:
    """Teacher (1/4, 3/4) against student (1/2, 1/2): 1/4 ln(1/4 : 1/2) + 3/4 ln(3/4 : 1/2) = -1/4 ln 2 + 3/4 ln(3/2)."""
    found = losses.soft(scores([0.0, 0.0]), torch.tensor([[0.0, LN3]]), temperature=1.0)

    torch.testing.assert_close(found, torch.tensor([-math.log(2) / 4 + 3 / 4 * math.log(3 / 2)]))


def test_temperature_sharpens_only_the_teacher() -> None:
    """T = 1/2 makes the teacher (1/10, 9/10), the student (1/2, 1/2) stays: ln 2 + 1/10 ln 1/10 + 9/10 ln 9/10."""
    found = losses.soft(scores([0.0, 0.0]), torch.tensor([[0.0, LN3]]), temperature=0.5)

    torch.testing.assert_close(found, torch.tensor([math.log(2) + 0.1 * math.log(0.1) + 0.9 * math.log(0.9)]))


def test_soft_gradient_of_known_scores() -> None:
    """The gradient is student - tempered teacher: (1/2, 1/2) - (1/10, 9/10) = (2/5, -2/5)."""
    student = scores([0.0, 0.0])
    found = gradient(losses.soft(student, torch.tensor([[0.0, LN3]]), 0.5), student)

    torch.testing.assert_close(found, torch.tensor([[0.4, -0.4]]))


def test_the_gradient_stops_at_the_teacher() -> None:
    """Only the student learns: its scores get a gradient, the teacher's get none, not even zero."""
    student, teacher = scores([0.0, 1.0]), scores([2.0, 0.0])
    losses.soft(student, teacher, 0.5).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    assert student.grad is not None
    assert student.grad.abs().max() > 0.1
    assert teacher.grad is None


def test_rows_do_not_touch_each_other() -> None:
    """One value a row: a row's loss is the same alone and among others."""
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    together = losses.soft(student, teacher, 0.7)

    torch.testing.assert_close(together, torch.cat([losses.soft(student[i : i + 1], teacher[i : i + 1], 0.7) for i in range(2)]))


def test_a_student_that_is_its_teacher_learns_nothing_at_temperature_one() -> None:
    """At T = 1 equal scores are the minimum: loss and gradient are zero, which is why T = 1 is no use at the start."""
    student = scores([0.3, -1.2, 2.0])
    loss = losses.soft(student, student.detach(), 1.0)

    torch.testing.assert_close(loss, torch.zeros(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(loss, student), torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_a_student_that_is_its_teacher_learns_at_a_lower_temperature() -> None:
    """At T < 1 equal scores push towards the class already preferred: (1/4, 3/4) - (1/10, 9/10) = (3/20, -3/20)."""
    student = scores([0.0, LN3])
    found = gradient(losses.soft(student, student.detach(), 0.5), student)

    torch.testing.assert_close(found, torch.tensor([[0.15, -0.15]]))


# Distillation ---------------------------------------------------------------------------------------------------------
def test_distillation_of_known_scores() -> None:
    """T = 2, teacher (0, 2 ln 3) is (1/4, 3/4), student (1/2, 1/2): 4 (1/4 ln 1/2 + 3/4 ln 3/2)."""
    found = losses.distil(scores([0.0, 0.0]), torch.tensor([[0.0, 2 * LN3]]), 2.0)

    torch.testing.assert_close(found, torch.tensor([4 * (-math.log(2) / 4 + 3 / 4 * math.log(3 / 2))]))


def test_distillation_keeps_the_size_of_its_gradient() -> None:
    """T^2 outside, 1/T inside: the gradient is T (student - teacher) = 2 (1/2 - 1/4, 1/2 - 3/4)."""
    student = scores([0.0, 0.0])
    found = gradient(losses.distil(student, torch.tensor([[0.0, 2 * LN3]]), 2.0), student)

    torch.testing.assert_close(found, torch.tensor([[0.5, -0.5]]))


def test_class_level_distillation_of_known_probabilities() -> None:
    """Student (1/4, 3/4) under a teacher (1/2, 1/2): -1/2 ln 1/4 - 1/2 ln 3/4, whatever the teacher's numbers sum to."""
    expected = torch.tensor([-(math.log(1 / 4) + math.log(3 / 4)) / 2])

    for teacher in ([[0.5, 0.5]], [[127.0, 127.0]]):
        torch.testing.assert_close(losses.classes(scores([0.0, LN3]), torch.tensor(teacher)), expected)


def test_token_loss_of_a_known_vocabulary() -> None:
    """Hidden (1, 0) over rows (0, 9) and (ln 3, 9): logits (0, ln 3); token 0 costs ln 4, token 1 costs ln 4/3."""
    hidden, vocabulary = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 9.0], [LN3, 9.0]])

    torch.testing.assert_close(
        losses.tokens(hidden, vocabulary, torch.tensor([0, 1])), torch.tensor([math.log(4), math.log(4 / 3)])
    )


def test_top_k_distillation_of_known_tokens() -> None:
    """Of three tokens the teacher names two, at 1/8 and 3/8: renormalized 1/4 and 3/4 against the student's 1/2 and 1/2."""
    hidden, vocabulary = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[2.0, 0.0], [77.0, 1.0], [2.0, 5.0]])
    loss = losses.top_k(hidden, vocabulary, torch.tensor([[0, 2]]), torch.tensor([[1 / 8, 3 / 8]]).log())

    torch.testing.assert_close(loss, torch.tensor([-math.log(2) / 4 + 3 / 4 * math.log(3 / 2)]))
    # (1/2 - 1/4) (2, 0) + (1/2 - 3/4) (2, 5)
    torch.testing.assert_close(gradient(loss, hidden), torch.tensor([[0.0, -1.25]]))


def test_top_k_of_all_tokens_is_plain_distillation() -> None:
    """With k the whole vocabulary, in any order, gathering changes nothing."""
    hidden, vocabulary = torch.randn(3, 4), torch.randn(5, 4)
    teacher = torch.randn(3, 5).log_softmax(1)
    order = torch.stack([torch.randperm(5) for _ in range(3)])
    found = losses.top_k(hidden, vocabulary, order, teacher.gather(1, order), 2.0)

    torch.testing.assert_close(found, losses.distil(hidden @ vocabulary.T, teacher, 2.0))


table = st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3)


@given(table, table, st.floats(0.25, 4))
def test_soft_loss_is_never_negative(student: list[float], teacher: list[float], temperature: float) -> None:
    """A divergence is at least zero, whatever the scores."""
    assert float(losses.soft(torch.tensor([student]), torch.tensor([teacher]), temperature)) >= -1e-5


@given(table, st.permutations([0.0, 1.0, 3.0]))
def test_towards_temperature_zero_it_is_the_hard_loss(student: list[float], teacher: list[float]) -> None:
    """As T -> 0 the target becomes the teacher's best class, so the soft loss becomes cross-entropy on it."""
    row, best = torch.tensor([student]), torch.tensor([teacher]).argmax(dim=1)
    found = losses.soft(row, torch.tensor([teacher]), temperature=0.01)

    torch.testing.assert_close(found, losses.hard(row, best), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_gradients_agree_with_finite_differences(temperature: float) -> None:
    """The slope of both losses is the one measured by moving the scores a little, in double precision."""
    student = torch.tensor([[0.2, -0.7, 1.5], [2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -0.5], [0.1, 0.2, 0.3]], dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda s: losses.soft(s, teacher, temperature), (student,))
    assert torch.autograd.gradcheck(lambda s: losses.hard(s, torch.tensor([2, 0])), (student,))


# Answers --------------------------------------------------------------------------------------------------------------
LN2 = math.log(2)
STATES = torch.tensor([[9.0, 9.0, 9.0], [LN2, 0.0, 0.0], [0.0, 0.0, LN2], [7.0, 7.0, 7.0]])  # of four tokens
WORDS = torch.eye(3)  # so that states are scores
SEQUENCE = [2, 1, 0, 1]  # the answer is its last two tokens: said at positions 1 and 2
TOLD = np.array([[0, 1], [2, 2]]), np.log(np.array([[0.25, 0.25], [0.5, 0.5]], np.float32))


def test_an_answers_loss_is_that_of_its_own_tokens() -> None:
    """(1/2, 1/4, 1/4) says token 0, (1/4, 1/4, 1/2) token 1: ln 2 and ln 4; what comes before and after does not count."""
    torch.testing.assert_close(losses.answer(STATES, WORDS, SEQUENCE, Answer(2)), torch.tensor([LN2, 2 * LN2]))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_told_answers_loss_is_shared_by_weight(weight: float) -> None:
    """The teacher has (1/2, 1/2) over two tokens where the student has (2/3, 1/3): ln(9/8)/2; the second row is masked."""
    found = losses.answer(STATES, WORDS, SEQUENCE, TopTokens(2, *TOLD, weight))
    apart = torch.tensor([math.log(9 / 8) / 2, 0.0])

    torch.testing.assert_close(found, weight * torch.tensor([LN2, 2 * LN2]) + (1 - weight) * apart)


def test_a_masked_position_has_no_gradient_but_its_answers() -> None:
    """A row of one token teaches nothing by itself; with a weight the answer's own token is learned there."""
    for weight, moves in ((0.0, False), (0.5, True)):
        states = STATES.clone().requires_grad_()
        found = gradient(losses.answer(states, WORDS, SEQUENCE, TopTokens(2, *TOLD, weight)), states)

        assert bool(found[2].abs().max() > 0) is moves
        assert found[1].abs().max() > 0
        assert found[[0, 3]].abs().max() == 0
