"""Norm, clip and scale on plain tensors, and over sharded tensors of two meshes (in one process, world size one)."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from qwen3_lit.distributed.gradients import clip_gradients, gradient_norm, scale_gradients
from qwen3_lit.distributed.rng import collect_rng_state, restore_rng_state


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    found = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 2, 2))]
    for parameter in found[:2]:
        parameter.grad = torch.randn_like(parameter)
    return found


def test_norm_equals_the_loop_and_clip_scales_to_it() -> None:
    found = parameters()
    expected = math.sqrt(sum(float(value) ** 2 for p in found if p.grad is not None for value in p.grad.flatten()))
    before = found[0].grad.clone()
    assert gradient_norm(found).item() == pytest.approx(expected, rel=1e-6)
    assert clip_gradients(found, None).item() == pytest.approx(expected, rel=1e-6)
    assert clip_gradients(iter(found), 10 * expected).item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(found[0].grad, before)
    assert clip_gradients(found, 0.5).item() == pytest.approx(expected, rel=1e-6)
    assert gradient_norm(found).item() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(found[0].grad, before * 0.5 / expected, rtol=1e-4, atol=1e-6)
    scale_gradients(found, torch.tensor(4.0))
    assert gradient_norm(found).item() == pytest.approx(2.0, rel=1e-4)
    assert gradient_norm([]).item() == 0.0


def test_a_non_finite_gradient_shows_in_the_norm() -> None:
    found = parameters()
    found[1].grad[0] = torch.nan
    assert math.isnan(gradient_norm(found).item())


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_two_meshes(one_rank) -> None:
    dense = init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    expert = init_device_mesh("cpu", (1, 1), mesh_dim_names=("expert_data", "expert"))
    found = []
    for mesh, placements in ((dense, [Shard(0)]), (expert, [Shard(0), Shard(1)]), (dense, [Replicate()])):
        parameter = nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, placements))
        parameter.grad = distribute_tensor(torch.ones(4, 2), mesh, placements)
        found.append(parameter)
    assert clip_gradients(found, 1.0).item() == pytest.approx(math.sqrt(24))
    assert gradient_norm(found).item() == pytest.approx(1.0, rel=1e-4)
    found[0].grad = DTensor.from_local(torch.ones(4, 2), dense, [Partial()])
    with pytest.raises(RuntimeError, match="partial"):
        gradient_norm(found)


def test_rng_state_survives_a_weights_only_file(tmp_path) -> None:
    import random

    import numpy as np

    torch.save(collect_rng_state(), tmp_path / "rng.pt")

    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), float(np.random.randn()), torch.rand(()).item()

    first = draw()
    assert draw() != first
    restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first
