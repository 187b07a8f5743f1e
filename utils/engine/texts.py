"""What a run says on the console: its configuration at the start, its results at the end."""

from flatcl.utils.arguments import MANY_TASKS, Config, written
from flatcl.utils.console import FROM_PYTHON
from flatcl.utils.engine.logs import WRITTEN


def describe(config: Config) -> str:
    """Every flag that differs from its default, and where it came from; seed and rho always."""
    lines = [f"{config.model} on {config.dataset} ({config.benchmark.setting}), config {config.hash}"]
    if config.continues is not None:
        lines.append(f"  continues {config.continues.run} after {config.continues.tasks} task(s)")
    for name in sorted(config.values):
        if name == "n_epochs" and config.budget_rows is not None:
            continue
        is_default = config.origins[name] == "default" or (
            config.origins[name].startswith("from ") and config.values[name] == config.flags[name].default
        )
        is_default |= config.values[name] == config.flags[name].default and config.origins[name].startswith("--")
        if not is_default or name in ("seed", "rho"):
            lines.append(f"  {name:18} {written(config.values[name]):14} {_origin(config.origins[name])}")
    if config.evaluated == "seen" and config.eval_tasks == "auto":
        lines.append(f"  {'eval_tasks':18} {'seen':14} auto, since there are more than {MANY_TASKS} tasks")
    return "\n".join(lines)


def _origin(layer: str) -> str:
    """Where a value comes from, for people."""
    return {"argv": "given" if FROM_PYTHON.get() else "command line"}.get(layer, layer)


def closing_table(summary: dict, tasks: list[int], folder) -> str:
    """The end of a run on the console: matrix (of more than 10 tasks its last row), metrics, cost, and where the files
    are. `tasks`: those trained."""

    def cells(values) -> str:
        return "".join("      –" if value is None else f"{100 * value:7.2f}" for value in values)

    lines, is_cut = [], False
    for setting, matrix in summary["accuracy"].items():
        heading, last = f"\nAccuracy in % [{WRITTEN[setting]}]", matrix[-1]
        if len(last) <= 10:
            lines.append(f"{heading}, after task (row) on task (column)")
            lines.append("      " + "".join(f"{task:>7}" for task in range(1, len(last) + 1)))
            lines += [f"{task + 1:>4}  {cells(row)}" for task, row in zip(tasks, matrix, strict=True)]
        else:
            is_cut = True
            lines.append(f"{heading}, at the end of training")
            for start in range(0, len(last), 10):
                end = min(start + 10, len(last))
                lines.append(f"{f'task {start + 1}-{end}':>16}  {cells(last[start:end])}")
    if is_cut and folder is not None:
        lines.append(f"\nAccuracy after every task: {folder.path / 'accuracy.json'}")
    lines.append("")
    names = list(next(iter(summary["metrics"].values())))
    lines.append(f"{'metric':37}" + "".join(f"{WRITTEN[setting]:>11}" for setting in summary["metrics"]))
    for name in names:
        values = [metrics[name] for metrics in summary["metrics"].values()]
        cells = ("          –" if value is None else f"{100 * value:9.2f} %" for value in values)
        unmeasured = name == "fwt_gem17" and summary["eval_tasks"] == "seen" and len(tasks) > 1
        note = "  not measured: only tasks seen are evaluated (--eval_tasks)" if unmeasured else ""
        if name == "fwt_gem17" and values[0] is None and any(value is not None for value in values):
            note = "  not defined in class-il: outputs of tasks to come do not compete (--class_il_argmax)"
        lines.append(f"{name:37}" + "".join(cells) + note)
    cost = summary["cost"]
    peak = "not known" if cost["peak_memory_mib"] is None else f"{cost['peak_memory_mib']:,.0f} MiB"
    lines.append(
        f"\n{cost['steps']:,} steps, {cost['forward_rows']:,} rows forward, {cost['backward_rows']:,} rows backward; "
        f"{cost['train_s']:.1f} s training, {cost['eval_s']:.1f} s evaluation, {cost['wall_s']:.1f} s in all; "
        f"peak memory {peak}"
    )
    if cost["skipped_steps"]:
        lines.append(f"{cost['skipped_steps']:,} steps were not taken: a loss or an update was not finite")
    if folder is not None:
        lines.append(f"run folder: {folder.path}")
    return "\n".join(lines)
