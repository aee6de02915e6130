"""General RL, shipped and on a laptop: no task of the project's own pays a wrong answer like a right one."""

from typing import Any

import pytest
import yaml

from qwen3_lit.cli.recipe_files import recipes_folder
from qwen3_lit.curation.general_tasks import GeneralOptions, load_general_tasks
from qwen3_lit.curation.synthesis_split import stream
from qwen3_lit.rl.rewards.format import FormatReward
from qwen3_lit.rl.rewards.grounded import GroundedReward
from qwen3_lit.rl.rewards.instruction import InstructionReward
from qwen3_lit.rl.rewards.judge import JudgeReward
from qwen3_lit.rl.rewards.math_answer import MathAnswerReward
from qwen3_lit.rl.rewards.mode_follow import ModeFollowReward
from qwen3_lit.rl.rewards.reward import Reward, RewardInput, check_rewards
from qwen3_lit.rl.rewards.reward_model import ReferenceModelReward, RewardModelReward
from qwen3_lit.rl.rewards.tool_use import ToolUseReward

_RULES = (FormatReward, GroundedReward, InstructionReward, MathAnswerReward, ModeFollowReward, ToolUseReward)
_CLASSES = {one.__name__: one for one in (*_RULES, JudgeReward, ReferenceModelReward, RewardModelReward)}


def _shipped() -> tuple[list[dict[str, Any]], list[str]]:
    recipe = yaml.safe_load((recipes_folder() / "7_general_rl.yaml").read_text())
    return recipe["model"]["init_args"]["rewards"], list(load_general_tasks())


def _laptop() -> tuple[list[dict[str, Any]], list[str]]:
    pipeline = yaml.safe_load((recipes_folder() / "pipelines/nano.yaml").read_text())
    (step,) = [step for step in pipeline["steps"] if step["name"] == "7_general_rl"]
    return step["set"]["model.init_args.rewards"], pipeline["vars"]["general_tasks"].split(",")


@pytest.mark.parametrize("case", [_shipped, _laptop])
def test_a_wrong_answer_is_never_paid_in_full(case: Any) -> None:
    settings, tasks = case()
    rewards: list[Reward] = [_CLASSES[entry["class_path"]](**entry.get("init_args", {})) for entry in settings]
    problems, rng = [], stream("wrong answers")
    for task in sorted(set(tasks)):
        for _ in range(5):
            made = load_general_tasks()[task](rng, GeneralOptions())
            problem = {
                "messages": made.messages,
                "answer": made.gold if made.reference is None else made.reference,
                "task": task,
                "metadata": made.metadata,
                "tools": made.tools,
            }
            problems.append(problem)
            # The right value in the wrong form has its check; a wrong value in the right form is wrong as well.
            wrongs = [made.wrong, "\\boxed{-1}"] if task == "boxed_answer" else [made.wrong]
            for wrong in wrongs:
                item = RewardInput(made.messages, f"<think>\n\n</think>\n\n{wrong}", "", str(wrong), problem)
                by_rule = [reward(item) for reward in rewards if reward.judges_content and not reward.in_process]
                by_model = [reward for reward in rewards if reward.in_process and reward.applies(item)]
                assert by_model or min((score for score in by_rule if score is not None), default=1.0) < 1, task
    check_rewards(rewards, problems)
