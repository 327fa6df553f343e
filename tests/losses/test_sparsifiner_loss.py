"""Sparsifiner's training loss."""

import pytest
import timm
import torch
import torch.nn.functional as F

from regard.losses import Outputs, SparsifinerLoss


def drawn(**options):
    return Outputs(torch.randn(3, 7, **options), torch.randn(3, 4, 5, **options))


def test_is_the_sum_of_its_terms():
    torch.manual_seed(0)
    student, teacher, target = drawn(dtype=torch.float64), drawn(dtype=torch.float64), torch.tensor([0, 3, 6])
    p, q = student.logits.softmax(-1), teacher.logits.softmax(-1)
    kl = (q * (q / p).log()).sum() / 3
    mse = (student.tokens - teacher.tokens).square().sum() / (3 * 4 * 5)
    task = -p.log()[range(3), target].mean()
    loss = SparsifinerLoss()
    torch.testing.assert_close(loss(student, teacher, target, 0.25), task + 0.5 * kl + 0.5 * mse + 0.25)
    plain = SparsifinerLoss(F.cross_entropy, logits_weight=0.0, tokens_weight=0.0)
    torch.testing.assert_close(plain(student, teacher, target), task)


def test_a_student_like_its_teacher_has_the_tasks_loss():
    torch.manual_seed(0)
    same, target = drawn(), torch.tensor([1, 2, 3])
    torch.testing.assert_close(SparsifinerLoss()(same, same, target), F.cross_entropy(same.logits, target))


def test_the_teacher_has_no_gradient():
    student, teacher = drawn(requires_grad=True), drawn(requires_grad=True)
    SparsifinerLoss()(student, teacher, torch.zeros(3, dtype=torch.int64)).backward()
    assert student.logits.grad.abs().sum() > 0 and student.tokens.grad.abs().sum() > 0
    assert teacher.logits.grad is None and teacher.tokens.grad is None


def test_outputs_of_a_model():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    found = Outputs.of(model, images)
    torch.testing.assert_close(found.logits, model(images))
    torch.testing.assert_close(found.tokens, model.forward_features(images)[:, 1:])


def test_bad_arguments():
    with pytest.raises(ValueError, match="tokens_weight: expected 0 or more, got -1"):
        SparsifinerLoss(tokens_weight=-1)
    student, teacher = drawn(), Outputs(torch.randn(3, 8), torch.randn(3, 4, 5))
    with pytest.raises(ValueError, match=r"teacher: logits of shape \(3, 8\), the student's \(3, 7\)"):
        SparsifinerLoss()(student, teacher, torch.zeros(3, dtype=torch.int64))
