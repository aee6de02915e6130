"""Entropy bonus of the policy loss: a fixed coefficient, or one that holds the entropy at a target."""

from typing import Any

from qwen3_lit.errors import UserError


class EntropyBonus:
    """Fixed coefficient: loss = policy loss - coefficient * mean token entropy."""

    def __init__(self, coefficient: float = 0.0) -> None:
        """
        Args:
            coefficient: weight of the mean entropy in nats; 0 switches the bonus off.
        """
        if coefficient < 0.0:
            raise UserError(f"EntropyBonus.coefficient: got {coefficient}, expected a number >= 0")
        self._coefficient = coefficient

    @property
    def coefficient(self) -> float:
        """Weight that the next loss uses."""
        return self._coefficient

    def update(self, mean_entropy: float) -> None:
        """Once per optimizer step (or rollout) with the global mean entropy of the trained tokens in nats."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""


class AdaptiveEntropyBonus(EntropyBonus):
    """Coefficient that rises by a fixed step while the entropy is at or below the target and falls by it otherwise; the
    bonus itself acts only at or below the target.

    Source: Skywork-OR1 (2505.22312), section 4 (adaptive entropy control).
    """

    def __init__(
        self,
        target: float = 0.2,
        step: float = 0.005,
        initial: float = 0.0,
        maximum: float = 1.0,
    ) -> None:
        """
        Args:
            target: mean token entropy in nats below which the bonus acts.
            step: change of the coefficient per update.
            initial: first coefficient.
            maximum: largest coefficient; the smallest is 0.
        """
        super().__init__(0.0)
        if target <= 0.0 or step <= 0.0:
            raise UserError(f"AdaptiveEntropyBonus: got target {target}, step {step}, expected both > 0")
        if not 0.0 <= initial <= maximum:
            raise UserError(
                f"AdaptiveEntropyBonus.initial: got {initial}, expected 0 <= initial <= maximum ({maximum})"
            )
        self.target, self.step, self.maximum = target, step, maximum
        self._value, self._acts = initial, True

    @property
    def coefficient(self) -> float:
        return self._value if self._acts else 0.0

    def update(self, mean_entropy: float) -> None:
        self._acts = mean_entropy <= self.target
        change = self.step if self._acts else -self.step
        self._value = min(self.maximum, max(0.0, self._value + change))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self._value, "acts": self._acts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._value, self._acts = float(state["value"]), bool(state["acts"])
