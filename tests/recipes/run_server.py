"""Runs commands of qwen3-lit one after the other, each in a process of its own, for tests that kill them.

The imports happen once: every command is a fork of this process, which itself never computes anything. A line of JSON
on stdin asks for one; its process id and, when it ended, its exit code (minus the signal) come back as lines.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


def die_before(owner: Any, name: str, due: Callable[..., bool]) -> None:
    """SIGKILL to this process where ``owner.name`` is called, once ``due`` says so of the arguments."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if due(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def arm(moment: str, step: int) -> None:
    """Die at the first such moment at which ``step`` optimizer steps are done."""
    from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector

    from qwen3_lit.callbacks.hf_export import HFExport
    from qwen3_lit.callbacks.run_report import RunReport
    from qwen3_lit.cli.jsonl_logger import JsonlLogger
    from qwen3_lit.cli.phase_checkpoint import PhaseCheckpoint
    from qwen3_lit.modules.phase_module import PhaseModule

    modules: list[PhaseModule] = []

    def starts(module: PhaseModule, *_: Any, **__: Any) -> bool:
        modules.append(module)
        return False

    die_before(PhaseModule, "setup", starts)

    def due(*_: Any) -> bool:
        return bool(modules) and modules[0].trainer.global_step >= step

    def saved(connector: Any) -> bool:
        last = [getattr(callback, "_last_global_step_saved", 0) for callback in connector.trainer.checkpoint_callbacks]
        return due() and connector.trainer.global_step in last

    def half_written(logger: JsonlLogger, **_: Any) -> bool:
        if due():
            with logger.path.open("a") as file:
                file.write('{"step": 1, "train/lo')
        return due()

    if moment == "gradient":  # it is there, the weights are not changed
        die_before(PhaseModule, "clip_gradients_and_log", due)
    elif moment == "half a checkpoint":  # written, but not under its name
        die_before(os, "replace", lambda _, target: str(target).endswith(".ckpt") and due())
    elif moment == "two checkpoints":  # the new one is whole, the old one is not yet removed
        die_before(PhaseCheckpoint, "_remove_checkpoint", due)
    elif moment == "unlogged":  # a step is saved, Lightning has not logged its figures
        die_before(_LoggerConnector, "update_train_step_metrics", saved)
    elif moment == "half a row":
        die_before(JsonlLogger, "log_metrics", half_written)
    elif moment == "evaluation":  # the phase is trained, its figures are not there
        die_before(RunReport, "_evaluate", lambda *args: args[-1] == "after")
    elif moment == "export":
        die_before(HFExport, "on_train_end", due)
    else:
        raise ValueError(moment)


def serve() -> None:
    """Import, then answer the lines of stdin until it is closed."""
    from qwen3_lit.cli.main import main
    from qwen3_lit.cli.quick_import import import_lightning

    import_lightning()
    import qwen3_lit.cli.lightning_cli
    import qwen3_lit.data.conversation_data
    import qwen3_lit.data.preference_data
    import qwen3_lit.data.pretrain_data
    import qwen3_lit.data.prompt_data
    import qwen3_lit.modules.distill
    import qwen3_lit.modules.grpo
    import qwen3_lit.modules.pretrain
    import qwen3_lit.modules.reward_model  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                if order["kill"]:
                    arm(*order["kill"])
                code = main(order["argv"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
