"""Pages are handed out once, shared by count, and come back."""

import numpy as np
import pytest
import torch

from qwen3_lit.generation.kv_cache import SCRATCH_PAGE, OutOfPagesError, PageAllocator, PagedKVCache


def test_pages_are_distinct_and_never_the_scratch_page() -> None:
    allocator = PageAllocator(7)
    pages = np.concatenate([allocator.allocate(3), allocator.allocate(4)])
    assert sorted(pages.tolist()) == [1, 2, 3, 4, 5, 6, 7] and SCRATCH_PAGE not in pages
    with pytest.raises(OutOfPagesError, match="1 pages asked for, 0 of 7"):
        allocator.allocate(1)


def test_shared_page_is_freed_by_its_last_owner() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(2)
    allocator.retain(pages[:1])
    allocator.release(pages)
    assert allocator.num_free == 1
    allocator.release(pages[:1])
    assert allocator.num_free == 2
    with pytest.raises(RuntimeError, match="released twice"):
        allocator.release(pages[:1])


def test_random_traffic_leaks_nothing() -> None:
    generator = np.random.default_rng(0)
    allocator, held = PageAllocator(40), []
    for _ in range(2000):
        if generator.random() < 0.55 and allocator.num_free >= 5:
            held.append(allocator.allocate(int(generator.integers(1, 6))))
        elif held:
            allocator.release(held.pop(int(generator.integers(len(held)))))
        in_use = [p for pages in held for p in pages.tolist()]
        assert len(set(in_use)) == len(in_use) == 40 - allocator.num_free


def test_copied_page_is_independent_and_carries_routes() -> None:
    cache = PagedKVCache(
        num_layers=2,
        num_kv_heads=1,
        head_dim=2,
        num_pages=3,
        page_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.keep_routes(2, 3)
    slots = torch.from_numpy(cache.slots(np.array([2, 3]), 6))
    assert slots.tolist() == [8, 9, 10, 11, 12, 13]
    for layer in range(2):
        cache.write(layer, slots, torch.randn(6, 1, 2), torch.randn(6, 1, 2))
    cache.write_routes(slots, torch.randint(0, 128, (2, 6, 3)))
    cache.copy_pages(np.array([2]), np.array([1]))
    assert torch.equal(cache.k_LPSGC[:, 1], cache.k_LPSGC[:, 2]) and torch.equal(
        cache.v_LPSGC[:, 1], cache.v_LPSGC[:, 2]
    )
    assert torch.equal(cache.routes[4:8], cache.routes[8:12])
    cache.write(0, torch.tensor([4]), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    assert cache.k_LPSGC[0, 2, 0].abs().sum() > 0
