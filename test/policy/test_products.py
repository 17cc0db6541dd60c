import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kuavo_smolvla_ros.policy import products
from kuavo_smolvla_ros.policy.products import ONEDNN, Linear, multiplies_right, pays

onednn = pytest.mark.skipif(not ONEDNN, reason="this torch's oneDNN does not do these products")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Small layers too, so that what is tested is oneDNN's product."""
    monkeypatch.setattr(products, "WORTH_IT", 1)


def twins(inputs, outputs, bias=True):
    torch.manual_seed(0)
    ours = Linear(inputs, outputs, bias=bias)
    stock = nn.Linear(inputs, outputs, bias=bias)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def gradients(layer, x, gradient):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(gradient)
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@onednn
class TestLinear:
    @settings(deadline=None, max_examples=40)
    @given(
        shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
        inputs=st.integers(1, 40),
        outputs=st.integers(1, 40),
        bias=st.booleans(),
    )
    def test_equals_torchs_own_forwards_and_backwards(self, shape, inputs, outputs, bias):
        ours, stock = twins(inputs, outputs, bias)
        x, gradient = torch.randn(*shape, inputs), torch.randn(*shape, outputs)
        assert pays(x, ours.weight)
        for got, expected in zip(gradients(ours, x, gradient), gradients(stock, x, gradient), strict=True):
            assert got.shape == expected.shape
            assert torch.allclose(got, expected, atol=1e-4)

    @pytest.mark.parametrize("view", ["transposed", "expanded", "sliced"])
    def test_takes_views(self, view):
        ours, stock = twins(6, 4)
        x = {
            "transposed": torch.randn(5, 6, 3).transpose(1, 2),
            "expanded": torch.randn(1, 1, 6).expand(5, 3, 6),
            "sliced": torch.randn(5, 3, 9)[..., 2:8],
        }[view]
        assert torch.allclose(ours(x), stock(x), atol=1e-5)

    def test_takes_the_gradient_of_a_sum(self):
        """Which is a single number seen as many."""
        ours, stock = twins(6, 4)
        x = torch.randn(5, 6)
        ours(x).sum().backward()
        stock(x).sum().backward()
        assert torch.allclose(ours.weight.grad, stock.weight.grad, atol=1e-5)

    def test_no_rows(self):
        ours, _ = twins(6, 4)
        x = torch.randn(0, 6, requires_grad=True)
        y = ours(x)
        assert y.shape == (0, 4)
        y.sum().backward()
        assert torch.equal(ours.weight.grad, torch.zeros(4, 6))

    def test_the_same_again(self):
        ours, _ = twins(64, 48)
        x, gradient = torch.randn(100, 64), torch.randn(100, 48)
        for first, second in zip(gradients(ours, x, gradient), gradients(ours, x, gradient), strict=True):
            assert torch.equal(first, second)

    def test_numerical_gradient(self):
        """Of the backward pass itself, along random directions; float32 is all it computes in."""
        ours, _ = twins(5, 3)
        x, direction = torch.randn(4, 5), torch.randn(4, 5)
        loss = lambda at: ours(at).square().sum()  # noqa: E731
        at = x.clone().requires_grad_()
        loss(at).backward()
        slope = (loss(x + 1e-2 * direction) - loss(x - 1e-2 * direction)) / 2e-2
        assert torch.isclose((at.grad * direction).sum(), slope, rtol=1e-3)

    def test_a_second_derivative_is_refused(self):
        ours, _ = twins(5, 3)
        x = torch.randn(4, 5, requires_grad=True)
        (first,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()

    def test_keeps_only_what_the_backward_pass_reads(self):
        ours, _ = twins(6, 4)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            ours.requires_grad_(False)(torch.randn(3, 6, requires_grad=True))
            assert [t.shape for t in kept] == [(4, 6)]  # the weight
            kept.clear()
            ours.requires_grad_(True)(torch.randn(3, 6))
            assert [t.shape for t in kept] == [(3, 6)]  # the inputs
            kept.clear()
            with torch.no_grad():
                ours(torch.randn(3, 6))
            assert not kept

    def test_counts_its_operations(self):
        ours, stock = twins(6, 4)
        counts = []
        for layer in (ours, stock):
            with FlopCounterMode(display=False) as counter:
                layer(torch.randn(3, 6, requires_grad=True)).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] == 3 * 2 * 3 * 6 * 4


class TestModule:
    def test_is_an_ordinary_layer(self):
        ours, stock = twins(6, 4)
        assert isinstance(ours, nn.Linear)
        assert list(ours.state_dict()) == list(stock.state_dict())
        assert torch.equal(copy.deepcopy(ours).weight, ours.weight)

    def test_beginning_is_that_of_torch(self):
        torch.manual_seed(3)
        ours = Linear(6, 4)
        torch.manual_seed(3)
        assert torch.equal(ours.weight, nn.Linear(6, 4).weight)


class TestPays:
    @onednn
    def test_where_it_is_large_enough(self, monkeypatch):
        monkeypatch.setattr(products, "WORTH_IT", 10 * 6 * 4)
        weight = torch.randn(4, 6)
        assert pays(torch.randn(10, 6), weight)
        assert not pays(torch.randn(9, 6), weight)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_not_in_other_precisions(self, dtype):
        x, weight = torch.randn(3, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
        assert not pays(x, weight)
        layer = Linear(6, 4).to(dtype)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))

    def test_not_under_autocast(self):
        layer = Linear(6, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(3, 6)).dtype == torch.bfloat16

    def test_not_without_values(self):
        assert not pays(torch.randn(3, 6, device="meta"), torch.randn(4, 6, device="meta"))

    @pytest.mark.parametrize("fault", [RuntimeError("no such kernel"), AttributeError("no such operation")])
    def test_not_where_it_does_not_run(self, monkeypatch, fault):
        def product(*_):
            raise fault

        monkeypatch.setattr(products, "_product", product)
        assert not multiplies_right()

    def test_not_where_it_is_wrong(self, monkeypatch):
        right = products._product
        monkeypatch.setattr(products, "_product", lambda x, weight, bias=None: right(x, weight, bias) + 0.1)
        assert not multiplies_right()

    def test_a_wrong_shape_is_torchs_error(self):
        with pytest.raises(RuntimeError):
            Linear(6, 4)(torch.randn(3, 5))
