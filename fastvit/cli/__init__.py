"""``fastvit <command>``: one file a command, each with ``add_arguments(parser)`` and ``run(args) -> exit code``.

Exit codes: 0 fine, 1 a gate was missed, 2 wrong arguments or inputs, 3 something needed is missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from ..data import DataError
from ..dispatch import Unsupported
from ._common import MISSING, Failure

COMMANDS = {
    "info": "what this machine has, and which backend runs each op, or why not",
    "parity": "the certificate: forward and gradients against float64, beside stock PyTorch's own error",
    "bench": "time ops and models against stock PyTorch",
    "demo": "certificate, speed and k-NN accuracy on real pictures with a trained ViT; writes demo.png and demo.json",
    "predict": "pictures to classes, features or nearest neighbours",
    "convert": "a checkpoint (ONNX, torch or safetensors) to safetensors with timm's keys",
}
_EXIT_CODES = "exit codes: 0 fine, 1 a gate was missed, 2 wrong arguments or inputs, 3 something needed is missing"


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the ``chosen`` command's module is imported and gets its arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvit", description="Fused kernels for the Vision Transformer.", epilog=_EXIT_CODES
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, epilog=_EXIT_CODES)
        if name == chosen:
            module = importlib.import_module(f".{name}", __name__)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(argv[0] if argv else None).parse_args(argv)
    try:
        return args.run(args)
    except Failure as failure:
        print(f"fastvit {args.command}: {failure}", file=sys.stderr)
        return failure.code
    except (DataError, Unsupported) as error:
        print(f"fastvit {args.command}: {error}", file=sys.stderr)
        return MISSING
    except KeyboardInterrupt:
        print(f"fastvit {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `fastvit info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
