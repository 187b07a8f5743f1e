"""The flags that choose what executes the runs of a sweep: --engine local, ray or slurm, and what each takes."""

import argparse

from flatcl.utils.commands._parser import Parser
from flatcl.utils.errors import UsageError
from flatcl.utils.studies.engines import Engine
from flatcl.utils.studies.engines.local import Local
from flatcl.utils.studies.engines.ray import Ray
from flatcl.utils.studies.engines.slurm import Slurm

ENGINES = ("local", "ray", "slurm")
_FOR = {  # flags that not all engines take
    "jobs": ("local", "ray"),
    "address": ("ray",),
    "cpus_per_run": ("ray", "slurm"),
    "gpus_per_run": ("ray", "slurm"),
    "array": ("slurm",),
    "partition": ("slurm",),
    "time": ("slurm",),
    "gres": ("slurm",),
    "slurm_args": ("slurm",),
}


def add_engines(parser: Parser) -> None:
    add = parser.add_argument_group("where the runs are made").add_argument
    add("--engine", choices=ENGINES, default="local", help="this machine (default), a Ray cluster, a Slurm cluster")
    add("--jobs", type=int, metavar="N", help="local: worker processes (default: 1); ray: the most runs at a time")
    add("--address", metavar="HOST:PORT", help="ray: the cluster (default: auto, the one that is there, or a new one)")
    add("--cpus_per_run", type=float, metavar="N", help="ray, slurm: CPUs of a run (default: its --threads)")
    add("--gpus_per_run", type=float, metavar="N", help="ray, slurm: GPUs of a run (default: 0); fractions with ray")
    add("--array", type=int, metavar="N", help="slurm: tasks of the array job (default: 1)")
    add("--partition", help="slurm: where the tasks go")
    add("--time", help="slurm: time limit of a task, e.g. 8:00:00; it is put back into the queue before")
    add("--gres", help="slurm: in place of --gpus_per_run, e.g. gpu:a100:1")
    add("--slurm_args", action="append", metavar="KEY=VALUE", help="slurm: a further flag of sbatch; repeat for more")


def chosen(args: argparse.Namespace) -> Engine | Slurm:
    """Raises `UsageError` with all that is wrong with these flags."""
    given = [name for name in _FOR if getattr(args, name) is not None]
    problems = [
        f"--{name} is for --engine {' and '.join(_FOR[name])}, not {args.engine}. Drop it."
        for name in given
        if args.engine not in _FOR[name]
    ]
    for name in ("jobs", "array"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.append(f"--{name} must be at least 1, got {getattr(args, name)}.")
    cpus, gpus = args.cpus_per_run, args.gpus_per_run or 0.0
    if cpus is not None and not 0 < cpus < 1e6:
        problems.append(f"--cpus_per_run must be more than 0, got {cpus:g}.")
    if not 0 <= gpus < 1e6:
        problems.append(f"--gpus_per_run must be at least 0, got {gpus:g}.")
    elif gpus % 1 and (gpus > 1 or args.engine == "slurm"):
        whole = "a whole number: Slurm gives whole GPUs" if args.engine == "slurm" else "whole above 1"
        problems.append(f"--gpus_per_run must be {whole}, got {gpus:g}.")
    if args.engine == "slurm" and cpus is not None and cpus % 1:
        problems.append(f"--cpus_per_run must be a whole number, got {cpus:g}: Slurm gives whole CPUs.")
    if problems:
        raise UsageError(*problems)
    if args.engine == "local":
        return Local(args.jobs or 1)
    if args.engine == "ray":
        return Ray(args.address or "auto", cpus, gpus, args.jobs)
    return _slurm(args)


def _slurm(args: argparse.Namespace) -> Slurm:
    more = dict(text.partition("=")[::2] for text in args.slurm_args or ())
    cpus = None if args.cpus_per_run is None else int(args.cpus_per_run)
    engine = Slurm(
        args.array or 1, args.partition or "", args.time or "", cpus, int(args.gpus_per_run or 0), args.gres or "", more
    )
    problems = engine.problems()
    if problems:
        raise UsageError(*problems)
    return engine
