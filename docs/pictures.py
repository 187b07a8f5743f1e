"""Draws the pictures of the pages, from the records and from one real step: `python -m docs.pictures`."""

import contextlib
import io
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from flatcl.utils.arguments import resolve
from flatcl.utils.engine.build import build
from flatcl.utils.engine.pictures import save
from flatcl.utils.optim._sharpness import dot, norm
from flatcl.utils.reports import plots
from flatcl.utils.reports.groups import Stat, group_runs
from flatcl.utils.reports.runs import load_runs, select

DOCS = Path(__file__).resolve().parent
RECORDS = DOCS.parent / "tests/records/sharpness"
PANELS = {"perm-mnist": "domain-il", "seq-fmnist": "class-il"}
METHODS = {"er": "ER", "derpp": "DER++", "mgser_sam": "MGSER-SAM"}
PLAIN = ("sgd", "adam", "adamw")  # no sharpness in them
INK, FAINT, BETTER, SAME, WORSE = "#222222", "#e3e7eb", "#0072b2", "#8a949e", "#d55e00"  # of Okabe & Ito's palette
Results = Mapping[str, Mapping[str, Stat]]


def results(dataset: str, setting: str) -> Results:
    """{method: {optimizer: final average accuracy}} of the records, from low to high."""
    found: dict[str, dict[str, Stat]] = {method: {} for method in METHODS}
    runs = load_runs([RECORDS / dataset])
    for group in group_runs(runs, ["model", "optimizer"], setting):
        found[group.by["model"]][group.by["optimizer"]] = group.stat("final_average_accuracy")
    return {method: dict(sorted(own.items(), key=lambda item: item[1].mean)) for method, own in found.items()}


def overview() -> Figure:
    """Three methods under SGD and under each sharpness-aware optimizer, on two benchmarks."""
    figure = Figure(figsize=(10, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Three replay methods under 14 sharpness-aware optimizers: does it help?", fontsize=14, weight="bold"
    )
    for axes, (dataset, setting) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for place, own in enumerate(results(dataset, setting).values()):
            _strip(axes, place, own)
        axes.set_title(f"{dataset} ({setting}), memory of 500 images", fontsize=11)
        axes.set_xlabel("final average accuracy (%), mean ± std of 3 seeds")
        axes.set_yticks(range(len(METHODS)), METHODS.values(), fontsize=12)
        axes.set_ylim(len(METHODS) - 0.45, -0.62)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    key = [("o", SAME, "within SGD's standard deviation"), ("o", BETTER, "above it"), ("o", WORSE, "below it"),
           ("|", INK, "the same method with SGD, and its standard deviation")]  # fmt: skip
    handles = [axes.plot([], [], marker, color=colour, ms=9 if marker == "o" else 14, mew=2 if marker == "|" else 0)[0]
               for marker, colour, _ in key]  # fmt: skip
    figure.legend(handles, [text for _, _, text in key], loc="outside lower center", ncols=4, frameon=False)
    return figure


def _strip(axes: Axes, place: int, own: Mapping[str, Stat]) -> None:
    """One method's row: SGD as a line with a band, and a dot for each sharpness-aware optimizer."""
    sgd = own["sgd"]
    low, high = 100 * (sgd.mean - sgd.std), 100 * (sgd.mean + sgd.std)
    axes.fill_betweenx([place - 0.4, place + 0.4], low, high, color=FAINT, lw=0)
    axes.vlines(100 * sgd.mean, place - 0.4, place + 0.4, color=INK, lw=2)
    sharp = [(name, stat) for name, stat in own.items() if name not in PLAIN]
    for rank, (name, stat) in enumerate(sharp):
        mean, y = 100 * stat.mean, place + 0.36 - 0.72 * rank / (len(sharp) - 1)
        colour = BETTER if mean > high else WORSE if mean < low else SAME
        axes.errorbar(mean, y, xerr=100 * stat.std, fmt="o", color=colour, ms=5.5, elinewidth=0.7, alpha=0.95)
        if rank in (0, len(sharp) - 1):
            text, side = (f"{name}  ", "right") if rank == 0 else (f"  {name}", "left")
            edge = mean - 100 * stat.std if rank == 0 else mean + 100 * stat.std
            axes.text(edge, y, text, ha=side, va="center", color=colour, fontsize=9)


def of_records() -> dict[str, Figure]:
    """{file: picture} of the page of results, as `flatcl report --plot` draws them."""
    one, other = (select(load_runs([RECORDS / name]), {"model": "er"}) for name in PANELS)
    options = {"width": "page", "names": {"er": "ER"}, "say": lambda line: None}
    return {
        "bars_perm-mnist_er.svg": plots.figure("bars", one, **options),
        "compute_seq-fmnist_er.svg": plots.figure("compute", other, setting="class-il", **options),
    }


COMMAND = "--model mgser_sam --dataset seq-digits --stop_after 2 --rho 0.1 --device cpu --disable_log --non_verbose"
STEP = 10  # of the third task


def one_step() -> dict:
    """What happens in a step of the third task of seq-digits, `STEP`, taken from the program itself."""
    config = resolve(COMMAND.split())
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = build(config, torch.device("cpu"), None)
        trainer.run()
    method, optimizer, task = trainer.method, trainer.optimizer, trainer.benchmark[2]
    method.train()
    method.begin_task(task)
    optimizer.begin_task(task)
    for batch in itertools.islice(trainer.stream.epoch(task.train), STEP):
        before = method.remembered_ids().clone()
        ((objective, update),) = method.observe(batch, optimizer, trace=True)
    (clean, g), (perturbed, g_adv) = objective.passes
    g_s = objective.guides["memory"]
    stored = torch.isin(batch.ids, method.remembered_ids()) & ~torch.isin(batch.ids, before)
    return {
        "blocks": [block.x for block in objective.blocks],
        "clean": clean.terms,
        "perturbed": perturbed.terms,
        "norms": [norm(part).item() for part in (g, g_s, g_adv, update)],
        "cosine": (dot(g_adv, g_s) / (norm(g_adv) * norm(g_s))).item(),
        "rho": config.rho,
        "guide": config.guide,
        "lr": method.lr,
        "stored": stored.sum().item(),
        "batch": len(batch.ids),
        "memory": f"memory: {len(before)} images",
    }


def step_picture() -> Figure:
    """One step of mgser_sam: what is drawn, what each pass finds, what is updated and what is remembered."""
    step = one_step()
    figure = Figure(figsize=(10, 5.9), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(0, 5.9))
    axes.axis("off")
    title = f"One batch becomes one update: mgser_sam on seq-digits, step {STEP} of task 3"
    axes.text(0.2, 5.62, title, fontsize=14, weight="bold", color=INK, va="center")
    _box(axes, (0.2, 2.85, 9.6, 2.5), "1  draw (the only randomness, once a step)", BETTER)
    names = ("stream: x, y", "memory: x', stored logits z'", "memory: x'', labels y''")
    for row, (name, images) in enumerate(zip(names, step["blocks"], strict=True)):
        axes.text(0.35, 4.6 - 0.66 * row, name, fontsize=11, color=INK, va="center")
        for place, image in enumerate(images):
            at = axes.inset_axes((3.35 + 0.63 * place, 4.32 - 0.66 * row, 0.56, 0.56), transform=axes.transData)
            at.imshow(image[0], cmap="gray_r")
            at.set_xticks([])
            at.set_yticks([])
            at.spines[:].set_color(BETTER if row == 0 else WORSE)
    for place, (name, colour, lines) in enumerate(_stages(step)):
        left = 0.2 + 1.95 * place
        _box(axes, (left, 0.5, 1.8, 2.05), name, colour)
        axes.text(left + 0.1, 2.05, "\n".join(lines), fontsize=10, color=INK, va="top", linespacing=1.5)
        if place:
            _arrow(axes, (left - 0.17, 1.5), (left + 0.02, 1.5))
    _arrow(axes, (1.1, 2.85), (1.1, 2.53))
    key = "blue: the method.  grey: optimizer and engine; they call the method's loss (twice) and its combine (once)."
    axes.text(0.2, 0.25, key, fontsize=10.5, color=INK, va="center")
    return figure


def _stages(step: Mapping) -> list[tuple[str, str, list[str]]]:
    """(title, colour, lines) of the boxes after the draw."""
    g, g_s, g_adv, u = step["norms"]
    clean, perturbed = ([f"{name}: {value.item():.3f}" for name, value in step[of].items()]
                        for of in ("clean", "perturbed"))  # fmt: skip
    return [
        ("2  clean pass", SAME, [*clean, f"|g| = {g:.2f}", f"memory: |g_s| = {g_s:.2f}"]),
        ("3  ascent", SAME, ["perturbs the weights:", "w + rho g / |g|", f"rho = {step['rho']:g}"]),
        ("4  second pass", SAME, ["perturbed weights:", *perturbed, f"|g~| = {g_adv:.2f}"]),
        ("5  combine, step", SAME, [f"u = g~ + {step['guide']:g} g_s", f"cos(g~, g_s) = {step['cosine']:.2f}",
                                    f"|u| = {u:.2f}", f"w - {step['lr']:g} u"]),
        ("6  remember", BETTER, ["x, y, clean logits;", "reservoir sampling:",
                                 f"{step['stored']} of {step['batch']} images stored", f"({step['memory']})"]),
    ]  # fmt: skip


def _box(axes: Axes, place: tuple[float, float, float, float], title: str, colour: str) -> None:
    left, bottom, width, height = place
    shape = FancyBboxPatch(
        (left, bottom), width, height, "round,pad=0,rounding_size=0.08", fc="white", ec=colour, lw=1.8
    )
    axes.add_patch(shape)
    axes.text(left + 0.1, bottom + height - 0.22, title, fontsize=11.5, weight="bold", color=INK, va="center")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, shrinkA=0, shrinkB=0))


if __name__ == "__main__":
    save(overview(), DOCS / "overview.png")
    save(step_picture(), DOCS / "step.png")
    for name, figure in of_records().items():
        plots.save(figure, str(DOCS / name))
