"""Each policy loss against a slow, obvious version: a loop over sequences and tokens in float64, gradients too."""

import math

import pytest
import torch

from qwen3_lit.errors import UserError
from qwen3_lit.losses.entropy_bonus import AdaptiveEntropyBonus, EntropyBonus
from qwen3_lit.losses.importance import MaskedImportance, NoCorrection, TruncatedImportance
from qwen3_lit.losses.policy_gradient import (
    CISPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    PolicyInputs,
    PolicyLoss,
    SAPOLoss,
)

LENGTHS = (5, 1, 8, 3)
MAX_TOKENS = 16


def make_inputs(lengths: tuple[int, ...] = LENGTHS, *, spread: float = 0.3, seed: int = 0) -> PolicyInputs:
    """Sequences end to end, with untrained tokens (a prompt, one forced token, padding) in between."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = [], []
    for sequence, length in enumerate(lengths):
        ids += [sequence] * (2 + length)
        mask += [False, False] + [True] * length
        if length > 4:
            mask[-2] = False
    ids, mask = ids + [-1] * 3, mask + [False] * 3
    total = len(ids)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(total, generator=generator, dtype=torch.float64)

    old = -1.0 + noise(0.5)
    advantage_by_sequence = noise(1.0)
    sequence_ids_T = torch.tensor(ids)
    mask_T = torch.tensor(mask)
    logprob = old + noise(spread)
    return PolicyInputs(
        logprob_T=logprob.requires_grad_(),
        old_logprob_T=old,
        advantage_T=advantage_by_sequence[sequence_ids_T.clamp(min=0)],
        mask_T=mask_T,
        sequence_ids_T=sequence_ids_T,
        num_tokens_total=float(mask_T.sum()),
        num_sequences_total=float(len(lengths)),
        sampler_logprob_T=old + noise(0.5),
        ref_logprob_T=old + noise(0.4),
        entropy_T=noise(1.0).abs().requires_grad_(),
    )


def slow_loss(name: str, inputs: PolicyInputs, *, beta: float, estimator: str, correction: str) -> torch.Tensor:
    """The formulas token by token."""
    lp, old, adv = inputs.logprob_T, inputs.old_logprob_T, inputs.advantage_T
    sequences: dict[int, list[int]] = {}
    for t in range(len(lp)):
        if inputs.mask_T[t]:
            sequences.setdefault(int(inputs.sequence_ids_T[t]), []).append(t)
    total = torch.zeros((), dtype=torch.float64)
    for tokens in sequences.values():
        sequence_log_ratio = sum(lp[t] - old[t] for t in tokens) / len(tokens)
        for t in tokens:
            ratio, a = torch.exp(lp[t] - old[t]), adv[t]
            if name in ("grpo", "dr_grpo"):
                low, high = (0.2, 0.28) if name == "grpo" else (0.2, 0.2)
                term = -min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
            elif name == "gspo":
                s = torch.exp(sequence_log_ratio)
                if correction != "off":  # token weights differ in a sequence, which only the token form defines
                    s = s.detach() * torch.exp(lp[t] - lp[t].detach())
                term = -min(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a)
            elif name == "sapo":
                tau = 1.0 if a > 0 else 1.05
                term = -(4 / tau) / (1 + torch.exp(-tau * (ratio - 1))) * a
            else:
                term = -min(float(ratio), 5.0) * a * lp[t]
            weight = math.exp(float(old[t] - inputs.sampler_logprob_T[t]))
            if correction == "truncate":
                weight = min(weight, 2.0)
            elif correction == "mask":
                weight = weight if 0.5 <= weight <= 5.0 else 0.0
            else:
                weight = 1.0
            term = weight * term
            if beta:
                difference = lp[t] - inputs.ref_logprob_T[t]
                if estimator == "k3":
                    kl = torch.exp(-difference) + difference - 1
                else:
                    kl = difference**2 / 2
                    if estimator == "k1":
                        kl = kl - kl.detach() + difference.detach()
                term = term + beta * kl
            if name in ("grpo", "cispo"):
                total = total + term / inputs.num_tokens_total
            elif name == "dr_grpo":
                total = total + term / (inputs.num_sequences_total * MAX_TOKENS)
            else:
                total = total + term / len(tokens) / inputs.num_sequences_total
    return total


LOSSES: dict[str, type[PolicyLoss]] = {
    "grpo": GRPOLoss,
    "dr_grpo": DrGRPOLoss,
    "gspo": GSPOLoss,
    "sapo": SAPOLoss,
    "cispo": CISPOLoss,
}
CORRECTIONS = {"truncate": TruncatedImportance, "mask": MaskedImportance, "off": NoCorrection}


def build(name: str, **arguments: object) -> PolicyLoss:
    if name == "dr_grpo":
        arguments["max_completion_tokens"] = MAX_TOKENS
    return LOSSES[name](**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("beta", "estimator", "correction"),
    [(0.0, "k3", "truncate"), (0.1, "k3", "mask"), (0.1, "k2", "off"), (0.1, "k1", "truncate")],
)
@pytest.mark.parametrize("spread", [0.3, 0.0003])
def test_loss_and_gradient_equal_the_loop(
    name: str, beta: float, estimator: str, correction: str, spread: float
) -> None:
    inputs = make_inputs(spread=spread)
    loss = build(name, beta=beta, kl_estimator=estimator, correction=CORRECTIONS[correction]())(inputs).loss
    (gradient,) = torch.autograd.grad(loss, inputs.logprob_T)
    slow = slow_loss(name, inputs, beta=beta, estimator=estimator, correction=correction)
    (slow_gradient,) = torch.autograd.grad(slow, inputs.logprob_T)
    torch.testing.assert_close(loss, slow, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-9, atol=1e-12)
    assert gradient[inputs.mask_T].abs().sum() > 0
    assert gradient[~inputs.mask_T].abs().sum() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_packed_equals_padded_and_micro_batches_add_up(name: str) -> None:
    """One packed row = the same sequences one by one (each a padded row), with the global counts."""
    packed = make_inputs()
    loss_fn = build(name, beta=0.05)
    whole = loss_fn(packed)
    parts = []
    for sequence in range(len(LENGTHS)):
        keep = packed.sequence_ids_T == sequence
        padding = torch.full((7,), torch.nan, dtype=torch.float64)

        def padded(value: torch.Tensor | None, keep=keep, padding=padding) -> torch.Tensor:
            assert value is not None
            return torch.cat([value[keep], padding])

        parts.append(
            loss_fn(
                PolicyInputs(
                    logprob_T=padded(packed.logprob_T),
                    old_logprob_T=padded(packed.old_logprob_T),
                    advantage_T=padded(packed.advantage_T),
                    mask_T=torch.cat([packed.mask_T[keep], torch.zeros(7, dtype=torch.bool)]),
                    sequence_ids_T=torch.zeros(int(keep.sum()) + 7, dtype=torch.int64),
                    num_tokens_total=packed.num_tokens_total,
                    num_sequences_total=packed.num_sequences_total,
                    sampler_logprob_T=padded(packed.sampler_logprob_T),
                    ref_logprob_T=padded(packed.ref_logprob_T),
                    entropy_T=padded(packed.entropy_T),
                )
            )
        )
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(whole.loss, total)
    (gradient,) = torch.autograd.grad(whole.loss, packed.logprob_T, retain_graph=True)
    (padded_gradient,) = torch.autograd.grad(total, packed.logprob_T)
    torch.testing.assert_close(gradient, padded_gradient)
    for key, value in whole.metrics.items():
        values = torch.stack([part.metrics[key] for part in parts])
        torch.testing.assert_close(value, values.max() if key.endswith("_max") else values.sum(), msg=key)


@pytest.mark.parametrize("name", LOSSES)
def test_poison_on_masked_tokens_reaches_nothing(name: str) -> None:
    clean = make_inputs()
    poison = torch.where(clean.mask_T, 0.0, torch.nan)
    poisoned = PolicyInputs(
        **{
            **{field: getattr(clean, field) for field in PolicyInputs.__dataclass_fields__},
            **{
                field: getattr(clean, field).detach() + poison
                for field in ("old_logprob_T", "advantage_T", "sampler_logprob_T", "ref_logprob_T", "entropy_T")
            },
        }
    )
    loss_fn = build(name, beta=0.1, entropy_bonus=EntropyBonus(0.01))
    outputs = [loss_fn(inputs) for inputs in (clean, poisoned)]
    gradients = [torch.autograd.grad(output.loss, clean.logprob_T)[0] for output in outputs]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_metrics_by_hand() -> None:
    log2 = math.log(2.0)
    inputs = PolicyInputs(
        logprob_T=torch.tensor([0.0, log2, -log2, log2, -log2, 9.0]) - 3.0,
        old_logprob_T=torch.full((6,), -3.0),
        advantage_T=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 1.0]),
        mask_T=torch.tensor([1, 1, 1, 1, 1, 0]),
        sequence_ids_T=torch.zeros(6, dtype=torch.int64),
        num_tokens_total=torch.tensor(5),
        num_sequences_total=1,
        entropy_T=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 99.0]),
    )
    metrics = GRPOLoss()(inputs).metrics
    # Ratio 2 with A > 0 is clipped high, ratio 1/2 with A < 0 low; the other two are on the free side.
    assert metrics["clip_high_fraction"].item() == pytest.approx(1 / 5)
    assert metrics["clip_low_fraction"].item() == pytest.approx(1 / 5)
    assert metrics["ratio_mean"].item() == pytest.approx((1 + 2 + 0.5 + 2 + 0.5) / 5)
    assert metrics["ratio_max"].item() == pytest.approx(2.0)
    assert metrics["entropy"].item() == pytest.approx(3.0)
    k3 = sum(math.exp(x) - x - 1 for x in (0.0, log2, -log2, log2, -log2)) / 5
    assert metrics["approx_kl"].item() == pytest.approx(k3, rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_importance_cuts_by_hand() -> None:
    sampler = torch.zeros(4)
    old = torch.tensor([0.1, 1.0, 3.0, 8.0]).log()
    truncated, masked = TruncatedImportance(2.0)(old, sampler), MaskedImportance(0.5, 5.0)(old, sampler)
    torch.testing.assert_close(truncated.weight_T, torch.tensor([0.1, 1.0, 2.0, 2.0]))
    torch.testing.assert_close(masked.weight_T, torch.tensor([0.0, 1.0, 3.0, 0.0]))
    assert truncated.cut_T.tolist() == [False, False, True, True]
    assert masked.cut_T.tolist() == [True, False, False, True]


def test_adaptive_entropy_bonus_steps_and_resumes() -> None:
    bonus = AdaptiveEntropyBonus(target=0.2, step=0.005)
    bonus.update(0.1)
    bonus.update(0.2)
    assert bonus.coefficient == pytest.approx(0.01)
    restored = GRPOLoss(entropy_bonus=AdaptiveEntropyBonus(target=0.2, step=0.005))
    restored.load_state_dict(GRPOLoss(entropy_bonus=bonus).state_dict())
    assert restored.entropy_bonus.coefficient == pytest.approx(0.01)
    bonus.update(0.5)
    assert bonus.coefficient == 0.0
    bonus.update(0.1)
    assert bonus.coefficient == pytest.approx(0.01)
    for _ in range(5):
        bonus.update(0.5)
    bonus.update(0.1)
    assert bonus.coefficient == pytest.approx(0.005)


def test_entropy_bonus_enters_the_loss() -> None:
    inputs = make_inputs()
    plain, with_bonus = GRPOLoss()(inputs).loss, GRPOLoss(entropy_bonus=EntropyBonus(0.5))(inputs).loss
    torch.testing.assert_close(plain - with_bonus, 0.5 * inputs.entropy_T[inputs.mask_T].mean())


@pytest.mark.parametrize(
    "make",
    [
        lambda: GRPOLoss(clip_low=-0.1),
        lambda: GRPOLoss(beta=-1.0),
        lambda: DrGRPOLoss(max_completion_tokens=0),
        lambda: CISPOLoss(ratio_max=0.5),
        lambda: SAPOLoss(tau_positive=0.0),
        lambda: TruncatedImportance(cap=0.5),
        lambda: MaskedImportance(low=2.0),
        lambda: AdaptiveEntropyBonus(initial=2.0),
        lambda: GRPOLoss(beta=0.1)(
            PolicyInputs(*(torch.zeros(2),) * 3, torch.ones(2), torch.zeros(2, dtype=torch.int64), 2.0, 1.0)
        ),
    ],
)
def test_bad_settings_are_user_errors(make) -> None:
    with pytest.raises(UserError, match="got"):
        make()
