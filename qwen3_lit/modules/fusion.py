"""Thinking-mode fusion: one model, two modes, told apart by /think and /no_think (Technical Report, section 4.3).

What fuses the modes is the data (``FusionData``): thinking samples from the reasoning model itself beside non-thinking
ones, flags in user or system turns, the last flag wins, the empty think block kept in non-thinking targets.
"""

from qwen3_lit.modules.cold_start_sft import ColdStartSFTModule


class FusionModule(ColdStartSFTModule):
    """Supervised fine-tuning in both modes, evaluated in both."""
