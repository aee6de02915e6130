"""The largest keys of every token as falling lists of eight, which threads sort and merge in registers.

Sorting networks have no branch and little that waits: all compare-exchanges of a step are independent. 32 keys of a
thread become one list in 248 minima and maxima, and two threads' lists one in 32 more, so that the eight largest of
128 keys in four threads cost two rounds of shuffles, not one round for each of them.

Legend: T tokens, E experts padded to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def _larger_first(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def sorted_eights(key_TE, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Eight tensors [T, E / 8]: each eight neighbours of ``key_TE``, falling, by Batcher's network."""
    low, high = tl.split(tl.reshape(key_TE, (TOKENS, EXPERTS // 8, 2, 2, 2)))
    p, q = tl.split(low)
    r, s = tl.split(high)
    a, b = tl.split(p)
    c, d = tl.split(q)
    e, f = tl.split(r)
    g, h = tl.split(s)
    a, b = _larger_first(a, b)
    c, d = _larger_first(c, d)
    e, f = _larger_first(e, f)
    g, h = _larger_first(g, h)
    a, c = _larger_first(a, c)
    b, d = _larger_first(b, d)
    e, g = _larger_first(e, g)
    f, h = _larger_first(f, h)
    b, c = _larger_first(b, c)
    f, g = _larger_first(f, g)
    a, e = _larger_first(a, e)
    b, f = _larger_first(b, f)
    c, g = _larger_first(c, g)
    d, h = _larger_first(d, h)
    c, e = _larger_first(c, e)
    d, f = _larger_first(d, f)
    b, c = _larger_first(b, c)
    d, e = _larger_first(d, e)
    f, g = _larger_first(f, g)
    return a, b, c, d, e, f, g, h


@triton.jit
def merge(a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2):
    """The eight largest of two falling lists of eight, falling: the combining function of a reduction."""
    # The larger of each key and its opposite are the eight largest; they rise and fall at most once, which three steps
    # put in order.
    a, b, c, d = tl.maximum(a, h2), tl.maximum(b, g2), tl.maximum(c, f2), tl.maximum(d, e2)
    e, f, g, h = tl.maximum(e, d2), tl.maximum(f, c2), tl.maximum(g, b2), tl.maximum(h, a2)
    a, e = tl.maximum(a, e), tl.minimum(a, e)
    b, f = tl.maximum(b, f), tl.minimum(b, f)
    c, g = tl.maximum(c, g), tl.minimum(c, g)
    d, h = tl.maximum(d, h), tl.minimum(d, h)
    a, c = tl.maximum(a, c), tl.minimum(a, c)
    b, d = tl.maximum(b, d), tl.minimum(b, d)
    e, g = tl.maximum(e, g), tl.minimum(e, g)
    f, h = tl.maximum(f, h), tl.minimum(f, h)
    a, b = tl.maximum(a, b), tl.minimum(a, b)
    c, d = tl.maximum(c, d), tl.minimum(c, d)
    e, f = tl.maximum(e, f), tl.minimum(e, f)
    g, h = tl.maximum(g, h), tl.minimum(g, h)
    return a, b, c, d, e, f, g, h


@triton.jit
def merged_neighbours(a, b, c, d, e, f, g, h, TOKENS: tl.constexpr, LISTS: tl.constexpr):
    """Eight tensors [T, LISTS] of eight [T, 2 * LISTS]."""
    a, a2 = tl.split(tl.reshape(a, (TOKENS, LISTS, 2)))
    b, b2 = tl.split(tl.reshape(b, (TOKENS, LISTS, 2)))
    c, c2 = tl.split(tl.reshape(c, (TOKENS, LISTS, 2)))
    d, d2 = tl.split(tl.reshape(d, (TOKENS, LISTS, 2)))
    e, e2 = tl.split(tl.reshape(e, (TOKENS, LISTS, 2)))
    f, f2 = tl.split(tl.reshape(f, (TOKENS, LISTS, 2)))
    g, g2 = tl.split(tl.reshape(g, (TOKENS, LISTS, 2)))
    h, h2 = tl.split(tl.reshape(h, (TOKENS, LISTS, 2)))
    return merge(a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2)
