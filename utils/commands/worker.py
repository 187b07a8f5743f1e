"""Makes runs of a submitted sweep until none is left: what each task of `sweep --engine slurm` does."""

import sys
from collections.abc import Sequence
from pathlib import Path

from flatcl.utils.arguments import resolve
from flatcl.utils.commands import train
from flatcl.utils.commands._parser import Parser
from flatcl.utils.commands.sweep import USAGE, Job
from flatcl.utils.errors import UsageError
from flatcl.utils.files import user_path
from flatcl.utils.studies.engines import INTERRUPTED, Runner, slurm


def _jobs(submitted: slurm.Submitted) -> list[Job]:
    return [Job(axes, tuple(argv), resolve(argv)) for axes, argv in submitted.runs]


def _folder(argv: Sequence[str]) -> Path:
    parser = Parser(prog="flatcl worker", description=__doc__)
    parser.add_argument("folder", help="the folder of the submission, results/slurm/...")
    return user_path(parser.parse_args(argv).folder)


def main(argv: Sequence[str], runner: Runner = train.main) -> int:
    """0 nothing is left to do, 1 some runs failed, 2 bad input, 130 stopped."""
    slurm.catch_stops()
    try:
        submitted = slurm.read(_folder(argv))
        return slurm.Task(submitted, _jobs(submitted), runner).run()
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return USAGE
    except slurm.Stopped:  # before any run
        slurm.requeue()
        return INTERRUPTED
