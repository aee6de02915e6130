"""A paged key/value cache with reference-counted pages.

Legend: L layers, P pages, S tokens a page, G kv heads, C head width, T tokens, M MoE layers, K experts per token.

Page 0 is scratch: rows that only pad a batch write there, so shapes can stay static. A slot is ``page * S + offset``.
Routed experts are kept beside the keys, by slot, so that a page that several samples share carries its routes along.
"""

import numpy as np
import torch
from torch import Tensor

SCRATCH_PAGE = 0


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free: the scheduler must check ``num_free`` first."""


class PageAllocator:
    """Hands out page numbers 1 .. num_pages and counts their owners."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._owners = np.zeros(num_pages + 1, dtype=np.int32)
        self._free = np.arange(num_pages, 0, -1, dtype=np.int32)  # a stack, low pages on top
        self.num_free = num_pages

    def allocate(self, count: int) -> np.ndarray:
        """``count`` pages with one owner each, int32. Raises OutOfPagesError."""
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages asked for, {self.num_free} of {self.num_pages} are free")
        pages = self._free[self.num_free - count : self.num_free][::-1].copy()
        self.num_free -= count
        self._owners[pages] = 1
        return pages

    def retain(self, pages: np.ndarray) -> None:
        """One more owner for each page."""
        self._owners[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """One owner less for each (distinct) page; pages without an owner become free."""
        if (self._owners[pages] <= 0).any():
            raise RuntimeError(f"page released twice: {pages[self._owners[pages] <= 0].tolist()}")
        self._owners[pages] -= 1
        freed = pages[self._owners[pages] == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)


class PagedKVCache:
    """Storage ``k_LPSGC`` and ``v_LPSGC`` plus the allocator of its pages."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_pages + 1, page_size, num_kv_heads, head_dim)
        # Zeros, not empty: a masked-out slot is multiplied by a probability of zero, and 0 * NaN is NaN.
        self.k_LPSGC = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LPSGC = torch.zeros(shape, dtype=dtype, device=device)
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self._k_slots = self.k_LPSGC.view(num_layers, -1, num_kv_heads, head_dim)
        self._v_slots = self.v_LPSGC.view(num_layers, -1, num_kv_heads, head_dim)
        self.routes: Tensor | None = None
        """uint8 [slots, M, K] once ``keep_routes`` was called."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self.k_LPSGC.dtype

    @property
    def device(self) -> torch.device:
        """Where the keys and values are."""
        return self.k_LPSGC.device

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` tokens fill."""
        return -(-num_tokens // self.page_size)

    def write(self, layer: int, slots_T: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Store one layer's keys and values at ``slots_T`` (int64)."""
        self._k_slots[layer].index_copy_(0, slots_T, k_TGC.to(self.dtype))
        self._v_slots[layer].index_copy_(0, slots_T, v_TGC.to(self.dtype))

    def keep_routes(self, num_moe_layers: int, top_k: int) -> None:
        """Make room for the experts of every cached token."""
        if self.routes is None:
            num_slots = self._k_slots.shape[1]
            self.routes = torch.zeros((num_slots, num_moe_layers, top_k), dtype=torch.uint8, device=self.device)

    def write_routes(self, slots_T: Tensor, expert_ids_MTK: Tensor) -> None:
        """Store the experts of the tokens at ``slots_T``."""
        assert self.routes is not None
        self.routes.index_copy_(0, slots_T, expert_ids_MTK.to(torch.uint8).transpose(0, 1))

    def copy_pages(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole pages of every layer, routes included: the copy of copy-on-write."""
        source_P = torch.from_numpy(source.astype(np.int64)).to(self.device)
        target_P = torch.from_numpy(target.astype(np.int64)).to(self.device)
        self.k_LPSGC.index_copy_(1, target_P, self.k_LPSGC.index_select(1, source_P))
        self.v_LPSGC.index_copy_(1, target_P, self.v_LPSGC.index_select(1, source_P))
        if self.routes is not None:
            by_page = self.routes.view(-1, self.page_size, *self.routes.shape[1:])
            by_page.index_copy_(0, target_P, by_page.index_select(0, source_P))

    def slots(self, pages: np.ndarray, num_tokens: int) -> np.ndarray:
        """Slots (int64) of the first ``num_tokens`` tokens of a sequence that lies in ``pages``."""
        positions = np.arange(num_tokens)
        return pages[positions // self.page_size].astype(np.int64) * self.page_size + positions % self.page_size
