"""``qwen3-lit fit|validate|test``: a LightningCLI over the two typed bases PhaseModule and TextDataModule.

Only the typed verb's parser is built, only the classes that the recipe names are imported, and every mistake in a
recipe leaves as one line. The same command started again continues from the newest complete checkpoint of its run
folder (``trainer.default_root_dir``); weights of another phase come in through ``init_from``, never through
``ckpt_path``.
"""

import importlib
import logging
import shutil
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from qwen3_lit.cli.class_index import import_classes, nearest_class
from qwen3_lit.cli.config_errors import explain, explain_value_error
from qwen3_lit.cli.quick_import import import_lightning
from qwen3_lit.cli.recipe_files import Setting, check_empty, check_stack, class_names, read_settings, split_arguments
from qwen3_lit.cli.resume_point import resolve_checkpoint
from qwen3_lit.errors import UserError

import_lightning()

import lightning as L  # noqa: E402  (after the quick import, which decides what it drags in)
from jsonargparse import ArgumentParser, set_parsing_settings  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback  # noqa: E402
from lightning.pytorch.plugins.io import CheckpointIO  # noqa: E402

from qwen3_lit.callbacks.run_report import BEFORE_FILE  # noqa: E402
from qwen3_lit.cli.checkpoint_file import WholeFileCheckpointIO  # noqa: E402
from qwen3_lit.data.text_data_module import TextDataModule  # noqa: E402
from qwen3_lit.modules.phase_module import PhaseModule  # noqa: E402

log = logging.getLogger(__name__)

DEFAULT_CALLBACKS: dict[str, str] = {
    "progress": "qwen3_lit.callbacks.progress.Progress",
    "throughput": "qwen3_lit.callbacks.throughput.Throughput",
    "expert_load": "qwen3_lit.callbacks.expert_load.ExpertLoad",
    "samples": "qwen3_lit.callbacks.samples.Samples",
    "checkpoint": "qwen3_lit.cli.phase_checkpoint.PhaseCheckpoint",
    "run_report": "qwen3_lit.callbacks.run_report.RunReport",
    "hf_export": "qwen3_lit.callbacks.hf_export.HFExport",
}
"""Top-level key in a recipe -> callback that every run has; its arguments are set under that key.

The last three run in this order at the end of a phase: save the final step, evaluate it, export it.
"""

CHECKPOINT_INTERVAL = timedelta(minutes=15)
"""How often a run is saved when the recipe sets neither a time nor a number of steps."""


class SaveRecipe(SaveConfigCallback):
    """Writes the resolved recipe to ``config.yaml`` in the run folder, replacing the one of an earlier start."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: data, model and checkpoint may turn out not to fit."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything is loaded: save."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Called on rank zero only."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(folder / "config.yaml"), skip_none=False, overwrite=True)


class PhaseCLI(LightningCLI):
    """One verb of LightningCLI with this project's defaults; see the module's docstring."""

    def __init__(self, verb: str, argv: Sequence[str], files: Sequence[Path]) -> None:
        self.verb = verb
        self.files = list(files)
        quiet = {"exit_on_error": False}
        super().__init__(
            PhaseModule,
            TextDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            # The table of parameter groups says the same and more.
            trainer_defaults={"enable_model_summary": False},
            save_config_callback=SaveRecipe,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            parser_kwargs={**quiet, "prog": "qwen3-lit", verb: dict(quiet)},
            args=[verb, *argv],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The typed verb alone: each further one would cost the time of a whole parser."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what main() passed on (Lightning would warn that sys.argv is not empty)."""
        self.config = parser.parse_args(args)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: run() follows, outside the handling of mistakes in the recipe."""

    def run(self) -> None:
        """Carry out the verb. Raises KeyboardInterrupt after Lightning closed the run on Ctrl-C.

        What bad input left in the run folder, such as an empty tensorboard, is removed, unless the run had come to
        measure or train something.
        """
        folder = Path(self.trainer.default_root_dir)
        before = set(folder.iterdir()) if folder.is_dir() else None
        try:
            super()._run_subcommand(self.verb)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise
        except (UserError, MisconfigurationException) as error:
            nothing_done = self.trainer.global_step == 0 and not (folder / BEFORE_FILE).exists()
            if self.trainer.is_global_zero and nothing_done:
                _remove_new(folder, before)
            raise UserError(" ".join(str(error).split())) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's saved arguments never override the recipe."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, each configurable under its own key."""
        for key, dotted in DEFAULT_CALLBACKS.items():
            module, _, name = dotted.rpartition(".")
            parser.add_lightning_class_args(getattr(importlib.import_module(module), name), key)
        parser.set_defaults(
            {
                "checkpoint.filename": "{step:08d}",
                "checkpoint.save_last": "link",
                "checkpoint.save_top_k": 1,
                "checkpoint.enable_version_counter": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Fix the run folder, the place and rhythm of checkpoints, and the point to continue from."""
        config = self.config[self.verb]
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(Path("runs") / (self.files[0].stem if self.files else "unnamed"))
        checkpoint = config.checkpoint
        folder = Path(checkpoint.dirpath or Path(config.trainer.default_root_dir) / "checkpoints")
        checkpoint.dirpath = str(folder)
        if not any((checkpoint.every_n_train_steps, checkpoint.every_n_epochs, checkpoint.train_time_interval)):
            checkpoint.train_time_interval = CHECKPOINT_INTERVAL
        resume = resolve_checkpoint(config.ckpt_path, folder)
        config.ckpt_path = str(resume) if resume else None
        if resume:
            log.info("continuing from %s", resume)
        elif self.verb != "fit":
            log.info("no checkpoint in %s: %s uses the weights of init_from", folder, self.verb)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        if config.get("logger") in (None, True):
            config["logger"] = _loggers(Path(config["default_root_dir"]), self.verb)
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, WholeFileCheckpointIO()]
        return super()._instantiate_trainer(config, callbacks)


def _remove_new(folder: Path, before: set[Path] | None) -> None:
    """Remove what is in ``folder`` now and was not before, and the folder when it was not there (None)."""
    for path in set(folder.iterdir()) - (before or set()) if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if before is None and folder.is_dir():
        folder.rmdir()


def _loggers(folder: Path, verb: str) -> list[Any]:
    from lightning.pytorch.loggers import TensorBoardLogger

    from qwen3_lit.cli.jsonl_logger import JsonlLogger

    if verb != "fit":  # TensorBoard would show the figures as points of the run's curves, at step 0
        return [JsonlLogger(folder, verb)]
    board = TensorBoardLogger(save_dir=str(folder), name="", version="tensorboard", default_hp_metric=False)
    return [board, JsonlLogger(folder)]


def _child_keys(keys: Sequence[str], group: str) -> list[str]:
    prefix = f"{group}." if group else ""
    return sorted({key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)} - {"help"})


def known_keys(owner: str | None, group: str) -> list[str]:
    """The keys accepted at one level: of the verb itself when ``owner`` is None, else of a class or dataclass."""
    parser: Any
    if owner is None:
        parser = LightningArgumentParser()
        parser.add_lightning_class_args(L.Trainer, "trainer")
        for key, dotted in DEFAULT_CALLBACKS.items():
            module, _, name = dotted.rpartition(".")
            parser.add_lightning_class_args(getattr(importlib.import_module(module), name), key)
        extra = ["model", "data", "ckpt_path", "seed_everything", "weights_only", "verbose"]
        return _child_keys([action.dest for action in parser._actions] + extra, group)
    module, _, name = owner.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(importlib.import_module(module), name), "it")
    return _child_keys([action.dest for action in parser._actions], f"it.{group}" if group else "it")


def _deliberate(error: BaseException) -> bool:
    """Whether our own code raised the error on purpose, as configs do when a value is out of range."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.startswith(("qwen3_lit.", "qwen3_kernels."))


def _explain_build_error(error: Exception, settings: Sequence[Setting]) -> Exception:
    """The UserError for a mistake in a recipe that showed while the classes were built, or the defect itself."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(root, UserError):
        return UserError(explain_value_error(str(root), settings))
    if isinstance(root, ValueError) and _deliberate(root):
        return UserError(explain_value_error(str(root), settings))
    return root if isinstance(root, Exception) else error


def run_lightning(verb: str, argv: Sequence[str]) -> int:
    """Parse, build and run one verb; returns 0. Every mistake in the recipe raises UserError."""
    files, arguments, typed = split_arguments(argv)
    stacks = [read_settings(path) for path in files]
    check_stack([*stacks, typed])
    settings = [setting for stack in (*stacks, typed) for setting in stack]
    if not any(setting.path[0] == "model" for setting in settings) and not {"-h", "--help"} & set(argv):
        raise UserError(f"a recipe is missing: qwen3-lit {verb} -c RECIPE (`qwen3-lit ls` lists them)")
    check_empty(settings)
    import_classes(class_names(settings))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    warnings.filterwarnings("ignore", message=r".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    # Lightning 2.6 still calls what jsonargparse 4.49 renamed; its users can do nothing about it.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
    chatter = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    chatter.addFilter(lambda record: "Tip:" not in record.getMessage())
    try:
        cli = PhaseCLI(verb, arguments, files)
    except ArgumentError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        line = explain(str(error), settings, known_keys, nearest_class)
        raise UserError(line) from error
    except MisconfigurationException as error:
        raise UserError(explain_value_error(str(error), settings)) from error
    except ValueError as error:
        explained = _explain_build_error(error, settings)
        raise explained from (error if explained is not error else None)
    try:
        cli.run()
    except UserError as error:
        raise UserError(explain_value_error(str(error), settings)) from error
    return 0
