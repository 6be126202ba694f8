"""Commands for ``optimum-cli``: ``guard``, ``export guarded-onnx`` and ``export guarded-openvino``.

Optimum imports this at every start of its command line, so nothing heavy is imported before a command runs, and a
command whose exporter is not installed is not offered.
"""

from __future__ import annotations

import shutil
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from qcbguard_plugins.errors import UsageError

# What would make NNCF store other codes than rounding to nearest does, or other types than planned.
_UNPLANNED = (
    "dataset", "awq", "scale_estimation", "gptq", "lora_correction", "all_layers", "backup_precision",
    "quant_mode", "sensitivity_metric", "quantization_statistics_path",
)  # fmt: skip
_DEFAULT_GROUP_SIZE = 128


def commands() -> list[Any]:
    """The commands that work here, as Optimum registers them: a class, or a class and its parent."""
    found: list[Any] = [GuardCommand]
    for make in (_onnx_command, _openvino_command):
        try:
            found.append((make(), ExportCommand))
        except ImportError:
            continue
    return found


class GuardCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """``optimum-cli guard``: a guarded copy of a checkpoint folder, for whatever tool quantizes it next."""

    COMMAND = CommandInfo(name="guard", help="Take quantization-conditioned backdoors out of a checkpoint folder.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("-m", "--model", required=True, help="Folder of a full-precision checkpoint.")
        parser.add_argument(
            "--for", dest="formats", required=True, help="Format to guard for; 'qcbguard list' shows them all."
        )
        _add_guard_arguments(parser, "")
        parser.add_argument("output", help="Folder to make; it must not exist.")

    def run(self) -> None:
        """Guard, or exit with the code of the error."""
        _guard(self.args.model, self.args.formats, self.args.output, self.args)


def _add_guard_arguments(parser: Any, prefix: str) -> None:
    parser.add_argument(f"--{prefix}method", dest="guard_method", default="feedback", help="Defense (feedback).")
    parser.add_argument(f"--{prefix}seed", dest="guard_seed", help="Seed; a fresh one by default, recorded either way.")
    parser.add_argument(
        f"--{prefix}calibration", dest="guard_calibration", default="auto", help="builtin, self, auto, or a text file."
    )


def _guard(model: str, formats: str, output: str | Path, args: Any) -> None:
    """Run ``qcbguard guard`` and leave with its exit code where it is not 0."""
    from qcbguard_plugins.cli import main

    arguments = ["guard", model, "--for", formats, "--out", str(output), "--method", args.guard_method]
    arguments += ["--calibration", args.guard_calibration]
    if args.guard_seed is not None:
        arguments += ["--seed", args.guard_seed]
    code = main(arguments)
    if code:
        raise SystemExit(code)


def _verify(path: Path) -> None:
    from qcbguard_plugins.cli import main

    code = main(["verify", str(path)])
    if code:
        raise SystemExit(code)


def _keep_manifest(guarded: Path, output: Path) -> None:
    """Put the plan beside the export, where 'qcbguard verify' finds it."""
    from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE

    shutil.copyfile(guarded / MANIFEST_FILE, output / MANIFEST_FILE)


def _onnx_command() -> type:
    from optimum.commands.export.onnx import ONNXExportCommand

    class GuardedONNXExportCommand(ONNXExportCommand):  # type: ignore[misc]
        """``optimum-cli export guarded-onnx``: guard, then the stock export."""

        COMMAND = CommandInfo(
            name="guarded-onnx",
            help="Guard a checkpoint for ONNX Runtime's dynamic quantization, and export it to ONNX.",
        )

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            ONNXExportCommand.parse_args(parser)
            group = parser.add_argument_group("Guard")
            group.add_argument(
                "--guard-for",
                default="onnx:int8",
                help="onnx:int8 (then quantize with --avx512_vnni or --arm64), onnx:uint8 (--avx2 or --avx512); both "
                "with --per_channel, or with -tensor at the end without it.",
            )
            _add_guard_arguments(group, "guard-")

        def run(self) -> None:
            with tempfile.TemporaryDirectory() as folder:
                guarded = Path(folder) / "guarded"
                _guard(self.args.model, self.args.guard_for, guarded, self.args)
                self.args.model = str(guarded)
                super().run()
                _keep_manifest(guarded, Path(self.args.output))

    return GuardedONNXExportCommand


def _openvino_command() -> type:
    from optimum.commands.export.openvino import OVExportCommand

    class GuardedOpenVINOExportCommand(OVExportCommand):  # type: ignore[misc]
        """``optimum-cli export guarded-openvino``: guard, the stock export, and the comparison with the plan."""

        COMMAND = CommandInfo(
            name="guarded-openvino",
            help="Guard a checkpoint, export it to OpenVINO with int8 or int4 weights, and compare them with the plan.",
        )

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            OVExportCommand.parse_args(parser)
            _add_guard_arguments(parser.add_argument_group("Guard"), "guard-")

        def run(self) -> None:
            format_name = openvino_format(self.args)
            with tempfile.TemporaryDirectory() as folder:
                guarded = Path(folder) / "guarded"
                _guard(self.args.model, format_name, guarded, self.args)
                self.args.model = str(guarded)
                super().run()
                _keep_manifest(guarded, Path(self.args.output))
            _verify(Path(self.args.output))

    return GuardedOpenVINOExportCommand


def openvino_format(args: Any) -> str:
    """The format that the arguments of ``optimum-cli export openvino`` stand for.

    Sets those that Optimum would otherwise take from its own list of models, so that the plan is what is done.

    Raises:
        UsageError: They ask for no int8 or int4 weights, or for more than rounding to nearest.
    """
    if args.weight_format not in ("int8", "int4"):
        raise UsageError(
            f"--weight-format {args.weight_format} quantizes nothing that could be guarded",
            remedy="Give --weight-format int8 or int4, or use 'optimum-cli export openvino'.",
        )
    asked = [name for name in _UNPLANNED if getattr(args, name, None)]
    asked += ["ratio"] if getattr(args, "ratio", None) not in (None, 1.0) else []
    if asked:
        raise UsageError(
            "--" + ", --".join(name.replace("_", "-") for name in asked) + ": the weights would not be rounded to the "
            "nearest level of one grid, so they cannot be planned",
            remedy="Leave these out.",
        )
    suffix = "-sym" if args.sym else ""
    if args.weight_format == "int8":
        return f"openvino:int8{suffix}"
    args.ratio = 1.0
    args.group_size = args.group_size or _DEFAULT_GROUP_SIZE
    return f"openvino:int4-g{args.group_size}{suffix}"
