"""Starting the experts' Triton products: launch tables, descriptors, and what the ahead-of-time check compiles.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, N = T * K rows sorted by expert,
J column tiles of a row's partial sum, I the width that a product contracts.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen3_kernels.grouped_experts_gemm_triton import gate_up_kernel, grad_h_kernel, grad_weight_kernel, rows_kernel
from qwen3_kernels.launch import AotCase, Launch, generation


def _launch(m: int, n: int, k: int, warps: int, stages: int, **more: int) -> Launch:
    return Launch({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, **more}, warps, stages)


ROWS_PER_EXPERT = {"decode": 8, "few": 32, "some": 128, "many": 512}
"""Buckets of launches by the mean number of rows an expert gets; "plenty" above. 16 tokens a row of Qwen3-30B-A3B's
experts: "decode" ends at batch 128, "few" at 512, "some" at 2,048, "many" at 8,192 tokens."""

_HOPPER: dict[str, dict[str, Launch]] = {
    "decode": {
        "gate_up": _launch(16, 64, 128, 4, 4, TMA=1, HALF=0),
        "down": _launch(16, 128, 128, 4, 4, TMA=1, HALF=0),
        "grad_h": _launch(16, 64, 128, 4, 4, TMA=1, HALF=0, PART_N=64),
        "grad_x": _launch(16, 64, 128, 4, 4, TMA=1, HALF=0),
        "grad_weight": _launch(128, 128, 16, 8, 3),
    },
    "few": {
        "gate_up": _launch(32, 64, 128, 4, 3, TMA=1, HALF=0),
        "down": _launch(32, 128, 64, 4, 4, TMA=1, HALF=0),
        "grad_h": _launch(32, 64, 128, 4, 4, TMA=1, HALF=0, PART_N=64),
        "grad_x": _launch(32, 64, 128, 4, 4, TMA=1, HALF=0),
        "grad_weight": _launch(128, 128, 32, 8, 3),
    },
    "some": {
        "gate_up": _launch(64, 128, 64, 8, 4, TMA=1, HALF=0),
        "down": _launch(64, 128, 64, 4, 4, TMA=1, HALF=0),
        "grad_h": _launch(64, 128, 64, 8, 4, TMA=1, HALF=0, PART_N=64),
        "grad_x": _launch(64, 128, 64, 4, 4, TMA=1, HALF=0),
        "grad_weight": _launch(128, 256, 32, 8, 4),
    },
    "many": {
        "gate_up": _launch(128, 128, 64, 8, 4, TMA=1, HALF=1),
        "down": _launch(128, 256, 64, 8, 4, TMA=1, HALF=1),
        "grad_h": _launch(128, 256, 64, 8, 4, TMA=1, HALF=1, PART_N=32),
        "grad_x": _launch(128, 256, 64, 8, 4, TMA=1, HALF=1),
        "grad_weight": _launch(128, 128, 64, 4, 3),
    },
    # float32 rows of any number: products without tensor cores, for tests and exactness.
    "float32": {
        "gate_up": _launch(32, 32, 32, 4, 2, TMA=1, HALF=0),
        "down": _launch(32, 64, 32, 4, 2, TMA=1, HALF=0),
        "grad_h": _launch(32, 64, 32, 4, 2, TMA=1, HALF=0, PART_N=32),
        "grad_x": _launch(32, 64, 32, 4, 2, TMA=1, HALF=0),
        "grad_weight": _launch(64, 64, 32, 4, 2),
    },
}
_HOPPER["plenty"] = _HOPPER["many"] | {"grad_weight": _launch(128, 256, 64, 8, 3)}


def _without_tma(launch: Launch) -> Launch:
    """The same tile for Ampere: no descriptors, at most 128 columns and three stages, which its memory holds."""
    most = {"BLOCK_N": 128, "BLOCK_K": 64, "TMA": 0}
    blocks = {name: min(value, most.get(name, value)) for name, value in launch.blocks.items()}
    return Launch(blocks, launch.num_warps, min(launch.num_stages, 3))


LAUNCHES: dict[tuple[int, str, str], Launch] = {
    (gpu, bucket, product): _without_tma(launch) if gpu == 80 else launch
    for gpu in (80, 90, 100)
    for bucket, launches in _HOPPER.items()
    for product, launch in launches.items()
}
"""Launch by GPU generation, bucket and product."""


def bucket(rows: int, experts: int) -> str:
    """Bucket by the mean number of rows an expert gets."""
    return next((name for name, most in ROWS_PER_EXPERT.items() if rows <= most * experts), "plenty")


def launch_of(product: str, rows_ND: Tensor, rows: int, experts: int) -> Launch:
    """The launch of ``product`` for this GPU, type and number of rows."""
    wide = rows_ND.dtype == torch.float32
    return LAUNCHES[generation(rows_ND.device), "float32" if wide else bucket(rows, experts), product]


def gate_up(
    x_TD: Tensor, w_gate_up_E2FD: Tensor, order_N: Tensor, offsets_E: Tensor, top_k: int, save: bool
) -> tuple[Tensor, Tensor]:
    """(gate_up_N2F, h_NF); the first is empty unless ``save`` is set."""
    (experts, width_2f, width), rows = w_gate_up_E2FD.shape, len(order_N)
    launch = launch_of("gate_up", x_TD, rows, experts)
    gate_up_N2F = x_TD.new_empty((rows, width_2f) if save else 0)
    h_NF = x_TD.new_empty(rows, width_2f // 2)
    n, k = launch.blocks["BLOCK_N"], launch.blocks["BLOCK_K"]
    tma = _tma(launch, width, w_gate_up_E2FD)
    gate_up_kernel[(_row_blocks(rows, experts, launch) * triton.cdiv(width_2f // 2, n),)](
        x_TD, _matrices(w_gate_up_E2FD, n, k) if tma else w_gate_up_E2FD, offsets_E, order_N, gate_up_N2F, h_NF,
        TOP_K=top_k, D=width, F=width_2f // 2, SAVE=save, **_common(x_TD, experts, launch, tma),
    )  # fmt: skip
    return gate_up_N2F, h_NF


def down(h_NF: Tensor, w_down_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """y_ND = h W_down."""
    return _rows_product("down", h_NF, w_down_EDF, offsets_E, transposed=True)


def grad_x(grad_gate_up_N2F: Tensor, w_gate_up_E2FD: Tensor, offsets_E: Tensor) -> Tensor:
    """grad_x_ND, a row for every slot."""
    return _rows_product("grad_x", grad_gate_up_N2F, w_gate_up_E2FD, offsets_E, transposed=False)


def grad_h(
    grad_out_TD: Tensor, w_down_EDF: Tensor, weights_TK: Tensor, gate_up_N2F: Tensor, order_N: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_gate_up_N2F, h_weighted_NF, dot_NJ)."""
    (experts, width, width_f), rows = w_down_EDF.shape, len(order_N)
    launch = launch_of("grad_h", grad_out_TD, rows, experts)
    n, k = launch.blocks["BLOCK_N"], launch.blocks["BLOCK_K"]
    tiles_n = triton.cdiv(width_f, n)
    grad_gate_up_N2F = torch.empty_like(gate_up_N2F)
    h_weighted_NF = gate_up_N2F.new_empty(rows, width_f)
    dot_NJ = torch.empty((rows, tiles_n), dtype=torch.float32, device=grad_out_TD.device)
    tma = _tma(launch, width, w_down_EDF)
    grad_h_kernel[(_row_blocks(rows, experts, launch) * tiles_n,)](
        grad_out_TD, _matrices(w_down_EDF, k, n) if tma else w_down_EDF, offsets_E, order_N, weights_TK, gate_up_N2F,
        grad_gate_up_N2F, h_weighted_NF, dot_NJ,
        TOP_K=weights_TK.shape[1], D=width, F=width_f, **_common(grad_out_TD, experts, launch, tma),
    )  # fmt: skip
    return grad_gate_up_N2F, h_weighted_NF, dot_NJ


def grad_weight(
    left: Tensor, right: Tensor, order_N: Tensor, offsets_E: Tensor, top_k: int, gather_left: bool
) -> Tensor:
    """[E, left width, right width]: left^T right over each expert's rows; one side is indexed by token."""
    experts, width_l, width_r = len(offsets_E), left.shape[1], right.shape[1]
    launch = launch_of("grad_weight", left, len(order_N), experts)
    out = left.new_empty(experts, width_l, width_r)
    tiles = triton.cdiv(width_l, launch.blocks["BLOCK_M"]) * triton.cdiv(width_r, launch.blocks["BLOCK_N"])
    grad_weight_kernel[(experts * tiles,)](
        left, right, offsets_E, order_N, out,
        TOP_K=top_k, WIDTH_L=width_l, WIDTH_R=width_r, GATHER_LEFT=gather_left, PRECISION=_precision(left),
        **launch.options(),
    )  # fmt: skip
    return out


def _rows_product(product: str, rows_NI: Tensor, weight: Tensor, offsets_E: Tensor, transposed: bool) -> Tensor:
    (rows, width_in), experts = rows_NI.shape, len(offsets_E)
    width_out = weight.shape[1 if transposed else 2]
    launch = launch_of(product, rows_NI, rows, experts)
    m, n, k = (launch.blocks[f"BLOCK_{name}"] for name in "MNK")
    out = rows_NI.new_empty(rows, width_out)
    tma = _tma(launch, width_in, rows_NI, weight)
    rows_kernel[(_row_blocks(rows, experts, launch) * triton.cdiv(width_out, n),)](
        TensorDescriptor.from_tensor(rows_NI, [m, k]) if tma else rows_NI,
        TensorDescriptor.from_tensor(rows_NI, [m // 2, k]) if tma else rows_NI,
        (_matrices(weight, n, k) if transposed else _matrices(weight, k, n)) if tma else weight, offsets_E, out,
        WIDTH_IN=width_in, WIDTH_OUT=width_out, TRANSPOSED=transposed, **_common(rows_NI, experts, launch, tma),
    )  # fmt: skip
    return out


def _row_blocks(rows: int, experts: int, launch: Launch) -> int:
    """Most row blocks that any routing needs: of A experts with rows, each wastes less than a block."""
    with_rows = min(rows, experts)
    return with_rows + (rows - with_rows) // launch.blocks["BLOCK_M"]


def _tma(launch: Launch, contracted: int, *operands: Tensor) -> bool:
    """Whether descriptors can read these operands: whole blocks along the contraction, 16-byte rows and addresses."""
    return (
        bool(launch.blocks["TMA"])
        and contracted % launch.blocks["BLOCK_K"] == 0
        and all(x.numel() > 0 and x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in operands)
    )


def _matrices(weight: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """All experts' matrices one below the other."""
    return TensorDescriptor.from_tensor(weight.view(-1, weight.shape[2]), [block_rows, block_columns])


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _common(x: Tensor, experts: int, launch: Launch, tma: bool) -> dict[str, Any]:
    padded = max(16, triton.next_power_of_2(experts))
    return {**launch.options(), "TMA": int(tma), "E": experts, "E_POW2": padded, "PRECISION": _precision(x)}


def aot_case(
    name: str, product: str, launch: Launch, generations: tuple[int, ...], width: int = 2048, hidden: int = 768
) -> list[AotCase]:
    """``product`` at Qwen3-30B-A3B's widths; gate_up keeps its products or not, grad_weight has two orientations."""
    blocks = launch.blocks
    m, n, k, tma = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"], blocks.get("TMA", 0)
    kind = "fp32" if "float32" in name else "bf16"
    precision = "ieee" if kind == "fp32" else "tf32"

    def operand(rows: int, columns: int) -> str:
        return f"tensordesc<{kind}[{rows}, {columns}]>" if tma else f"*{kind}"

    rows = ("x_ptr", "grad_out_ptr", "gate_up_ptr", "h_ptr", "out_ptr", "grad_gate_up_ptr", "h_weighted_ptr",
            "left_ptr", "right_ptr")  # fmt: skip
    kinds = {
        **dict.fromkeys(rows, f"*{kind}"), **dict.fromkeys(("offsets_ptr", "order_ptr"), "*i32"),
        **dict.fromkeys(("weights_ptr", "dot_ptr"), "*fp32"), "a": operand(m, k), "a_half": operand(m // 2, k),
        "weight": operand(n, k) if product in ("gate_up", "down") else operand(k, n),
    }  # fmt: skip
    experts = {"E": 128, "E_POW2": 128, "PRECISION": precision}
    tokens = {"TOP_K": 8, "D": width, "F": hidden, **experts}
    kernel: Any = {
        "gate_up": gate_up_kernel,
        "down": rows_kernel,
        "grad_h": grad_h_kernel,
        "grad_x": rows_kernel,
        "grad_weight": grad_weight_kernel,
    }[product]
    variants: list[dict[str, Any]] = {
        "gate_up": [{**tokens, "SAVE": True}, {**tokens, "SAVE": False}],
        "down": [{"WIDTH_IN": hidden, "WIDTH_OUT": width, "TRANSPOSED": True, **experts}],
        "grad_h": [tokens],
        "grad_x": [{"WIDTH_IN": 2 * hidden, "WIDTH_OUT": width, "TRANSPOSED": False, **experts}],
        "grad_weight": [
            {"TOP_K": 8, "WIDTH_L": 2 * hidden, "WIDTH_R": width, "GATHER_LEFT": False, "PRECISION": precision},
            {"TOP_K": 8, "WIDTH_L": width, "WIDTH_R": hidden, "GATHER_LEFT": True, "PRECISION": precision},
        ],
    }[product]
    wgmma = kind == "bf16" and m >= 64
    return [
        AotCase(
            f"{name}{'/gather_left' * variant.get('GATHER_LEFT', False)}{'/unsaved' * (not variant.get('SAVE', True))}",
            kernel,
            {name: kinds[name] for name in kernel.arg_names if name in kinds},
            variant,
            launch,
            generations,
            SPILLS.get((product, m, n, launch.num_warps, tma), 0),
            wgmma,
        )
        for variant in variants
    ]


SPILLS = {("grad_h", 128, 256, 8, 1): 32, ("grad_h", 128, 256, 8, 0): 64, ("gate_up", 128, 128, 8, 0): 48}
"""Bytes by (product, rows, columns, warps, TMA), most of triton 3.6 and 3.8; with TMA all are after the loop."""


def _aot_cases() -> list[AotCase]:
    cases = []
    for (gpu, rows_bucket, product), launch in LAUNCHES.items():
        name = f"grouped_experts/{product}/{rows_bucket}"
        cases += aot_case(f"{name}/sm_{gpu}", product, launch, (gpu,))
        if launch.blocks.get("TMA") and rows_bucket != "plenty":  # which has the products of "many"
            # Widths that no block divides are not read by descriptors (``_tma``).
            without = launch._replace(blocks={**launch.blocks, "TMA": 0})
            cases += aot_case(f"{name}/ragged/sm_{gpu}", product, without, (gpu,), width=2040, hidden=760)
    return cases


AOT_CASES = _aot_cases()
