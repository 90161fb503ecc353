# ruff: noqa: E402  what needs torch is imported after the skip
from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the CPU engine is torch")

from engines.cpu.cross_entropy import LinearCrossEntropy, nll_rows


def a_case(rows: int, dtype: Any = torch.float32) -> tuple[Any, Any, Any]:
    """hidden [rows, 16], weight [50, 16] and labels of one seed."""
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 16).to(dtype).requires_grad_()
    weight = torch.randn(50, 16).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 50, (rows,))


CHUNK = 64  # rows at a time in these tests, and blocks of 16 of the 50 words


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("engines.cpu.cross_entropy.CHUNK_BYTES", 0)
    monkeypatch.setattr("engines.cpu.cross_entropy.CHUNK_ROWS", CHUNK)
    monkeypatch.setattr("engines.cpu.cross_entropy.BLOCK", 16)


@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_value_and_gradients_are_torch_s(rows):
    hidden, weight, labels = a_case(rows)
    ours = LinearCrossEntropy.apply(hidden, weight, labels)
    (ours * 0.3).backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    plain = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    (plain * 0.3).backward()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(got[0], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], weight.grad, rtol=1e-5, atol=1e-6)


def test_gradients_pass_torch_s_own_check():
    hidden, weight, labels = a_case(5, torch.float64)
    # The sum itself is float32, so the finite differences need a wide step.
    assert torch.autograd.gradcheck(
        lambda h, w: LinearCrossEntropy.apply(h, w, labels), (hidden, weight), eps=1e-2, atol=5e-3
    )


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = a_case(9)
    LinearCrossEntropy.apply(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    hidden.grad = None
    LinearCrossEntropy.apply(hidden.detach(), weight, labels).backward()
    assert hidden.grad is None
    assert weight.grad is not None


def test_bf16_rows_over_an_fp32_head_give_an_fp32_weight_gradient():
    hidden, weight, labels = a_case(9)
    LinearCrossEntropy.apply(hidden.bfloat16(), weight, labels).backward()
    assert weight.grad.dtype is torch.float32
    got = weight.grad.clone()
    weight.grad = None
    torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum").backward()
    torch.testing.assert_close(got, weight.grad, rtol=0.05, atol=0.05)


def test_no_rows_are_no_loss():
    hidden, weight, labels = a_case(0)
    loss = LinearCrossEntropy.apply(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()
    assert nll_rows(hidden, weight, labels).shape == (0,)


def test_nll_of_rows_is_torch_s():
    hidden, weight, labels = a_case(2 * CHUNK + 5)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    torch.testing.assert_close(nll_rows(hidden.detach(), weight.detach(), labels), plain.detach())


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1000.0, 0.0]])
    assert LinearCrossEntropy.apply(hidden, torch.eye(2), torch.tensor([1])).item() == 1000.0
