"""VICReg against numbers worked out by hand, a slow reference in double precision, and identities."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.vicreg import EPS, vicreg_loss, vicreg_terms


def views(n, d, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=random, dtype=dtype), torch.randn(n, d, generator=random, dtype=dtype)


def reference(z1, z2, lambda_param=25.0, mu_param=25.0, nu_param=1.0, gamma=1.0):
    """The definition, number by number."""
    a, b = np.asarray(z1, np.float64), np.asarray(z2, np.float64)
    n, d = a.shape
    invariance = sum((a[i, j] - b[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    variance = covariance = 0.0
    for z in (a, b):
        mean = [sum(z[i, j] for i in range(n)) / n for j in range(d)]

        def cov(j, k, z=z, mean=mean):
            return sum((z[i, j] - mean[j]) * (z[i, k] - mean[k]) for i in range(n)) / (n - 1)

        variance += sum(max(0.0, gamma - math.sqrt(cov(j, j) + EPS)) for j in range(d)) / d / 2
        covariance += sum(cov(j, k) ** 2 for j in range(d) for k in range(d) if j != k) / d
    return lambda_param * invariance + mu_param * variance + nu_param * covariance


def test_three_samples_of_two_features_by_hand():
    z1 = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])  # variances 4 and 12, covariance 6
    z2 = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 0.0]])  # variances 1/4 and 0, covariance 0
    terms = vicreg_terms(z1, z2)
    assert terms.invariance.item() == pytest.approx((1 + 4 + 6.25 + 4 + 16 + 64) / 6)
    second = (1 - math.sqrt(0.25 + 1e-4) + 1 - math.sqrt(1e-4)) / 2
    assert terms.variance.item() == pytest.approx((0 + second) / 2)
    assert terms.covariance.item() == pytest.approx(2 * 6**2 / 2)
    expected = 25 * 15.875 + 25 * second / 2 + 36
    assert vicreg_loss(z1, z2).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 1), (3, 5), (16, 4), (9, 12)])
def test_equals_the_definition(shape):
    z1, z2 = views(*shape)
    weights = {"lambda_param": 50.0, "mu_param": 10.0, "nu_param": 2.0, "gamma": 1.5}
    assert vicreg_loss(z1, z2, **weights).item() == pytest.approx(reference(z1, z2, **weights), rel=1e-12)
    assert vicreg_loss(z1.float(), z2.float()).item() == pytest.approx(reference(z1, z2), rel=1e-6)


def test_gradient():
    z1, z2 = (z.requires_grad_() for z in views(5, 3, seed=1))
    assert torch.autograd.gradcheck(lambda a, b: vicreg_loss(a * 0.7, b * 0.4), (z1, z2))


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_order_does_not_matter_and_the_floor_holds(n, d, seed):
    z1, z2 = views(n, d, seed)
    terms = vicreg_terms(z1, z2)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    columns = torch.randperm(d, generator=torch.Generator().manual_seed(seed + 1))
    for other in (
        vicreg_terms(z1[rows], z2[rows]),
        vicreg_terms(z1[:, columns], z2[:, columns]),
        vicreg_terms(z2, z1),
        vicreg_terms(z1 + 3.0, z2 + 3.0),
    ):
        for a, b in zip(terms, other, strict=True):
            assert a.item() == pytest.approx(b.item(), rel=1e-9, abs=1e-10)
    assert terms.covariance >= terms.covariance_floor - 1e-9


def test_agreement_survives_a_rotation():
    z1, z2 = views(8, 4)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    turned = vicreg_terms(z1 @ turn, z2 @ turn)
    assert turned.invariance.item() == pytest.approx(vicreg_terms(z1, z2).invariance.item())


def test_two_samples_lie_on_their_floor():
    """All features of two samples go up or down together: nothing could make their covariance smaller."""
    terms = vicreg_terms(*views(2, 6))
    assert terms.covariance.item() == pytest.approx(terms.covariance_floor.item())


def test_uncorrelated_features_have_no_floor():
    hadamard = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    terms = vicreg_terms(hadamard, hadamard)
    assert (terms.covariance, terms.covariance_floor) == (0, 0)


def test_constant_features_cost_gamma_less_the_root_of_eps():
    same = torch.full((4, 3), 2.5)
    terms = vicreg_terms(same, same, gamma=1.0)
    assert terms.variance.item() == pytest.approx(1.0 - math.sqrt(EPS), abs=1e-6)
    assert terms.invariance == terms.covariance == 0
    same.requires_grad_()
    vicreg_loss(same, same).backward()
    assert torch.isfinite(same.grad).all()


def test_one_sample_is_refused():
    with pytest.raises(UsageError, match="at least 2 samples"):
        vicreg_loss(torch.zeros(1, 4), torch.zeros(1, 4))


@pytest.mark.parametrize(("a", "b"), [((3, 2), (3, 4)), ((3, 2, 2), (3, 2, 2)), ((3,), (3,))])
def test_other_shapes_are_refused(a, b):
    with pytest.raises(UsageError, match="same shape"):
        vicreg_loss(torch.zeros(a), torch.zeros(b))


def test_autocast_does_not_reach_it():
    z1, z2 = views(16, 8, dtype=torch.float32)
    expected = vicreg_loss(z1, z2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vicreg_loss(z1, z2), expected)
    assert vicreg_loss(z1.bfloat16(), z2.bfloat16()).dtype == torch.float32


TWO_RANKS = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from kuavo_smolvla_ros.policy.vicreg import vicreg_loss, vicreg_terms

def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 10)

def loss_of(net, x):
    return vicreg_loss(*net(x).chunk(2, dim=1))

def work(rank, file, shapes, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}{shapes}", rank=rank, world_size=2)
    samples = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    sizes = [6, 6] if shapes == "even" else [7, 5]
    try:
        net = DistributedDataParallel(model())
        loss = loss_of(net, samples.split(sizes)[rank])
        loss.backward()
        queue.put((rank, loss.item(), net.module.weight.grad.tolist()))
    except Exception as fault:
        queue.put((rank, str(fault), None))
    dist.destroy_process_group()

def run(file, shapes):
    queue = mp.get_context("fork").SimpleQueue()
    workers = mp.start_processes(work, (file, shapes, queue), nprocs=2, join=False, start_method="fork")
    found = sorted((queue.get() for _ in range(2)), key=lambda f: f[0])
    workers.join()
    return found

even, odd = run(sys.argv[1], "even"), run(sys.argv[1], "odd")
assert all("batches of one size" in f[1] for f in odd), odd
samples = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
net = model()
loss = loss_of(net, samples)
loss.backward()
for _, value, grad in even:
    assert abs(value - loss.item()) < 1e-5 * abs(loss.item()), (value, loss.item())
    assert torch.allclose(torch.tensor(grad), net.weight.grad, rtol=1e-4, atol=1e-6), (grad, net.weight.grad)
print("same")
"""


def test_two_ranks_equal_one_with_all_samples(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", TWO_RANKS, str(tmp_path / "rendezvous")],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.stdout.endswith("same\n"), result.stderr[-2000:]
