"""Cosine and sine of rotary angles, for use inside kernels."""

import triton
import triton.language as tl


@triton.jit
def cos_sin(angle):
    """(cos, sin) of float32 radians, both within 1e-7 for |angle| up to 2^20.

    The hardware's approximations are garbage at such angles, and libdevice's functions take 16 times 45 instructions
    and branches where a thread has eight pairs. One step of reduction by quarter turns in float64 is exact enough for
    any position (the remainder of 2^20 keeps 30 bits), and the rest is polynomials fitted on +-pi/4, without a branch.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)  # 2 / pi
    r = (angle.to(tl.float64) - quarters.to(tl.float64) * 1.5707963267948966).to(tl.float32)
    r2 = r * r
    sin = r + r * r2 * (-0.16666650772 + r2 * (0.0083319758996 + r2 * -0.00019495292509))
    cos = 1.0 + r2 * (-0.5 + r2 * (0.041666645557 + r2 * (-0.0013887364184 + r2 * 2.4438089895e-05)))
    turns = quarters.to(tl.int32)
    is_odd = (turns & 1) != 0
    new_cos, new_sin = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    return tl.where(((turns + 1) & 2) != 0, -new_cos, new_cos), tl.where((turns & 2) != 0, -new_sin, new_sin)
