"""Router logits: a narrow product whose result must be good to float32.

Legend: T tokens, D model width, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x @ weight.T`` summed in float32, so that rounding never decides between two experts.

    The product of two bfloat16 numbers is exact in float32. Where both inputs are bfloat16 on a GPU, tensor cores
    therefore give what ``F.linear(x.float(), weight.float())`` gives, up to the order of the sum, and x is never copied
    to float32. Any other input, a float32 weight in particular, takes that plain product. Autocast changes neither, in
    both directions: it would round inputs and logits to 8 bits.

    Args:
        x_TD: tokens.
        weight_ED: one row an expert.

    Returns:
        float32 [T, E]; differentiable in both inputs, gradients in their dtypes.

    Bandwidth bound: T = 32,768, D = 2,048 and E = 128 read 134 MB forward, 31 us at 4.28 TB/s on an H200, and read and
    write as much again backward; 17 GFLOP are 22 us at 790 TFLOP/s.
    """
    return _Logits.apply(x_TD, weight_ED)


class _Logits(torch.autograd.Function):
    """The gradient of the logits is float32 and enters tensor cores as the sum of two bfloat16 numbers.

    One alone keeps 8 bits, and the gradients of a token's logits nearly cancel: those of the weights and of the balance
    loss sum to zero over E, so what all experts' rows have in common would be lost in rounding. Two keep 16 bits, more
    than TF32's 11, without float32 copies of x and of the gradient, at the price of a twice as deep small product.

    The backward pass leaves autocast as well: manual optimization runs it inside.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        with torch.autocast(x_TD.device.type, enabled=False):
            if _exact_in_bfloat16(x_TD, weight_ED):
                return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)
            return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    def backward(ctx, grad_TE):
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD = grad_weight_ED = None
        with torch.autocast(x_TD.device.type, enabled=False):
            if _exact_in_bfloat16(x_TD, weight_ED):
                halves_T2E = in_two_halves(grad_TE)
                if ctx.needs_input_grad[0]:
                    grad_x_TD = halves_T2E @ torch.cat((weight_ED, weight_ED))
                if ctx.needs_input_grad[1]:
                    both_2ED = torch.mm(halves_T2E.t(), x_TD, out_dtype=torch.float32)
                    grad_weight_ED = both_2ED.view(2, *weight_ED.shape).sum(0).to(weight_ED.dtype)
            else:
                if ctx.needs_input_grad[0]:
                    grad_x_TD = (grad_TE @ weight_ED.float()).to(x_TD.dtype)
                if ctx.needs_input_grad[1]:
                    grad_weight_ED = (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)
        return grad_x_TD, grad_weight_ED


def _exact_in_bfloat16(x_TD: Tensor, weight_ED: Tensor) -> bool:
    return x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16


def in_two_halves(x_TE: Tensor) -> Tensor:
    """bfloat16 [T, 2 E]: the upper 16 bits of float32 x, and beside it what they leave."""
    # Not x.bfloat16(): a compiler that fuses may take the rounding and its inverse for nothing, and the rest for 0.
    high_TE = (x_TE.view(torch.int32) & -0x10000).view(torch.float32)
    return torch.stack((high_TE, x_TE - high_TE), dim=1).to(torch.bfloat16).flatten(1)
