"""All runs of this record, in three stages: hyperparameters by the rules below, the table, the readings of MGSER-SAM.

`python tests/records/cifar10_online/run.py DATA RESULTS [--jobs 2] [--seeds 3] [--until choice|table|readings]`

DATA has CIFAR-10 (it is downloaded there if not). Flags of every run come after a lone --, such as `-- --device cuda
--cuda_graph auto`. What is finished below RESULTS is not run again, and what was interrupted is continued. The rules,
fixed before the first run:

- All choices are made at a memory of 500, seed 0, on the held-out tenth of the training images, after the first three
  of the five tasks (as Chaudhry et al., 2019, choose on the first tasks), by the final average accuracy in class-il.
- lr of er, er_ace and derpp: the best of 0.01, 0.03 and 0.1 (0.01 was added when 0.03 had turned out to be better than
  0.1 for all three). sgd and joint take er's, er_sam takes er's, derpp_sam and mgser_sam take derpp's.
- rho: one for er_sam, derpp_sam and mgser_sam, the best of 0.01, 0.02, 0.05 and 0.1 for derpp_sam (0.01 and 0.02 were
  added when 0.05 and 0.1 had turned out to be far worse than no perturbation).
- guide of mgser_sam: the better of 0.5 and 1.
- alpha and beta: those published for 50 epochs and the same memory.
- Readings of MGSER-SAM: the same split and tasks, three seeds. The default stays unless the 95 % interval of another
  reading's differences from it, paired by seed (t distribution), lies above 0 in class-il, and does so again with three
  further seeds, since six readings are compared.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from flatcl.utils.commands import sweep  # noqa: E402
from flatcl.utils.studies.engines.local import Local  # noqa: E402

LRS, RHOS, GUIDES, BUFFERS = ("0.01", "0.03", "0.1"), ("0.01", "0.02", "0.05", "0.1"), ("0.5", "1"), ("200", "500")
READINGS = (
    {},
    {"ascent_on": "memory"},
    {"ascent_on": "current"},
    {"sharp_on": "memory"},
    {"sharp_on": "current"},
    {"guide_mode": "align"},
    {"guide_mode": "align", "sharp_on": "memory"},
)
Axes = dict[str, str]


class Study:
    def __init__(self, data: str, results: str, num_jobs: int, flags: list[str]):
        self.shared = [
            "--protocol", "online", "--eval_tasks", "seen", "--base_path", data, "--results_path", results, *flags
        ]  # fmt: skip
        self.num_jobs = num_jobs

    def plan(self, cells: Iterable[Axes], *flags: str) -> list[sweep.Job]:
        return sweep.plan([{"dataset": "seq-cifar10", **cell} for cell in cells], [*self.shared, *flags])

    def run(self, jobs: list[sweep.Job]) -> None:
        """Ends the program where a run has failed or somebody has interrupted."""
        code = sweep.sweep(jobs, Local(self.num_jobs), sweep.flags_of_all(True), keep_changed=True)
        if code:
            sys.exit(code)

    def choose(self, cells: list[Axes], axis: str) -> str:
        """The value of `axis` with the highest mean over all else."""
        jobs = self.plan(cells, "--validation", "--stop_after", "3")
        self.run(jobs)
        done, found = sweep.look(jobs, keep_changed=True).done, {}
        for job in jobs:
            accuracy = done[job.hash].summary["metrics"]["class-il"]["final_average_accuracy"]
            found.setdefault(job.axes[axis], []).append(accuracy)
        means = {value: sum(own) / len(own) for value, own in found.items()}
        best = max(means, key=means.__getitem__)
        print(f"{axis}: {best} of {', '.join(f'{value} ({mean:.2%})' for value, mean in means.items())}", flush=True)
        return best


def choice(study: Study) -> dict[str, Axes]:
    """{method: its chosen flags}."""
    start = {"seed": "0", "buffer_size": "500"}
    lr = {
        model: study.choose([{"model": model, **start, "lr": lr} for lr in LRS], "lr")
        for model in ("derpp", "er", "er_ace")
    }
    lr |= {"sgd": lr["er"], "joint": lr["er"], "er_sam": lr["er"], "derpp_sam": lr["derpp"], "mgser_sam": lr["derpp"]}
    rho = study.choose([{"model": "derpp_sam", **start, "lr": lr["derpp"], "rho": rho} for rho in RHOS], "rho")
    guided = [{"model": "mgser_sam", **start, "lr": lr["derpp"], "rho": rho, "guide": guide} for guide in GUIDES]
    guide = study.choose(guided, "guide")
    chosen = {model: {"lr": own} for model, own in lr.items()}
    for model in ("er_sam", "derpp_sam", "mgser_sam"):
        chosen[model]["rho"] = rho
    chosen["mgser_sam"]["guide"] = guide
    return chosen


def table(study: Study, chosen: dict[str, Axes], seeds: int) -> None:
    cells = [
        {"model": model, "seed": str(seed), **size, **flags}
        for buffer_size in reversed(BUFFERS)
        for seed in range(seeds)
        for model, flags in sorted(chosen.items(), key=lambda item: item[0], reverse=True)
        for size in [{} if model in ("sgd", "joint") else {"buffer_size": buffer_size}]
    ]
    study.run(study.plan(cells))


def readings(study: Study, chosen: dict[str, Axes], seeds: int) -> None:
    cells = [
        {"model": "mgser_sam", "seed": str(seed), "buffer_size": "500", **chosen["mgser_sam"], **flags}
        for seed in range(seeds)
        for flags in READINGS
    ]
    study.run(study.plan(cells, "--validation", "--stop_after", "3"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("results")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--until", choices=("choice", "table", "readings"), default="readings")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    sweep.catch_stops()
    study = Study(args.data, args.results, args.jobs, words[cut + 1 :])
    chosen = choice(study)
    print(chosen, flush=True)
    if args.until != "choice":
        table(study, chosen, args.seeds)
    if args.until == "readings":
        readings(study, chosen, args.seeds)


if __name__ == "__main__":
    main()
