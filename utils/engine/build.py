"""A run's parts, built from its configuration: each once, in a fixed order, so that a seed gives one run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import cast

import torch

from flatcl.datasets._benchmark import Benchmark
from flatcl.models._method import Context, Method
from flatcl.utils import launch
from flatcl.utils.arguments import Config
from flatcl.utils.console import say
from flatcl.utils.engine import program, ranks, seeding, weights
from flatcl.utils.engine.augment import Augment
from flatcl.utils.engine.augment_check import look_at, pipeline
from flatcl.utils.engine.layout import lay_out, wants_channels_last
from flatcl.utils.engine.ranks import Ranks
from flatcl.utils.engine.results import RunFolder
from flatcl.utils.engine.trainer import Trainer
from flatcl.utils.errors import UsageError
from flatcl.utils.optim._driver import Driver, batchnorms
from flatcl.utils.registry import BACKBONES, OPTIMIZERS


def build(
    config: Config, device: torch.device, folder: RunFolder | None, group: Ranks | None = None, is_new: bool = True
) -> Trainer:
    """Benchmark, network, method, optimizer: each built once. Returns the trainer. `group`: the processes that train
    this run, if there are several. `is_new`: nothing is going to be loaded from a checkpoint."""
    given = weights.read(config.pretrained_weights) if is_new and config.pretrained_weights else None
    benchmark = cast(type[Benchmark], config.benchmark)(_for_benchmark(config), "cpu")
    benchmark.check_tasks()
    _place(benchmark, config.data_device, device)
    seeding.seed_everything(seeding.seed_of(config, "init"))
    augment = Augment(pipeline(benchmark) if config.augmentation else [], benchmark.mean, benchmark.std, device)
    look_at(augment, benchmark)
    backbone = BACKBONES.load(config.backbone)
    net = backbone(benchmark.shape, benchmark.num_classes, config.view(backbone))
    if given is not None:
        say(weights.put(given, net, config.pretrained_weights, config.backbone))
    if config.sync_bn and group is not None:
        net = _synced(net, config.backbone)
    if config.freeze_backbone:
        weights.freeze(net)
    channels_last = wants_channels_last(config.channels_last, net, benchmark.shape, device)
    context = Context(benchmark, augment, device, seeding.generator(config.seed, "buffer"), config)
    learner = cast(type[Method], config.learner)
    method = learner(net, config.view(learner), context).to(device)
    if config.init_seed is not None:  # what follows, such as augmentation, is not the initial weights'
        seeding.seed_everything(config.seed)
    method.amp = torch.bfloat16 if config.amp == "bf16" else None
    method.channels_last = channels_last
    lay_out(method, channels_last)
    if group is not None:
        method.ranks = group
        ranks.check_network(method)
    optimizer_type = cast(type[Driver], OPTIMIZERS.load(config.optimizer))
    optimizer = optimizer_type(
        method, config.lr, config.optim_wd, config.view(optimizer_type), seeding.generator(config.seed, "optimizer")
    )
    optimizer.clip = config.clip_grad
    if not optimizer.params:
        raise UsageError(
            f"--backbone {config.backbone} has nothing to train for --model {config.model}: all its parameters have "
            "requires_grad False. Set requires_grad of some of them to True."
        )
    if group is None:
        _record_steps(config.cuda_graph, method, optimizer, device)
    return Trainer(config, benchmark, method, optimizer, augment, folder)


def _for_benchmark(config: Config) -> Config:
    """What a benchmark sees: of all seeds, the one of what it draws."""
    seed = seeding.seed_of(config, "class_order")
    return config if seed == config.seed else replace(config, values={**config.values, "seed": seed})


def _synced(net: torch.nn.Module, name: str) -> torch.nn.Module:
    """The network for --sync_bn. Raises `UsageError` for BatchNorm layers that do more than torch's own."""
    odd = {type(layer).__name__ for layer in batchnorms(net) if not type(layer).__module__.startswith("torch.")}
    if odd:
        raise UsageError(
            f"--sync_bn does not support the layers {', '.join(sorted(odd))} of --backbone {name}. Drop it."
        )
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)


def _record_steps(wish: str, method: Method, optimizer: Driver, device: torch.device) -> None:
    """From now on the optimizer's steps are recorded and replayed, if that is wished for and possible."""
    recorder = program.recorder(device) if wish != "0" else None
    if wish == "1" and recorder is None:
        raise UsageError(f"--cuda_graph 1 needs a CUDA device, this run is on {device}. Use auto or 0.")
    if recorder is not None:
        optimizer.programs = program.Programs(method, optimizer, recorder)
        if wish == "1":
            optimizer.programs.check()


def _place(benchmark: Benchmark, where: str, device: torch.device) -> None:
    """Moves the images to the device unless they would fill it; then they stay in host memory."""
    if device.type == "cpu" or where == "cpu":
        return
    if where == "auto" and device.type == "cuda":
        needed = 3 * benchmark.num_bytes  # the set, a task's copy, and room for the network
        if needed > torch.cuda.mem_get_info(device)[0]:
            return
    benchmark.to(device)


@contextmanager
def computing(config: Config, device: torch.device) -> Iterator[None]:
    """Inside, torch computes as this run wants it to: with its number of threads, and, where steps are recorded on a
    GPU, with convolutions whose kernels are chosen by measurement. Other runs of the process are not touched."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    is_chosen = cudnn.benchmark
    torch.set_num_threads(min(config.threads, os.cpu_count() or 1))  # of a run that was made on a larger machine
    is_recorded = device.type == "cuda" and config.cuda_graph != "0" and launch.size() == 1
    cudnn.benchmark = is_chosen or is_recorded
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        cudnn.benchmark = is_chosen


def resolve_device(name: str) -> torch.device:
    """The device of --device, with its index, as tensors name it; raises `UsageError` if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=ranks.device_of(torch.device(name))).device
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise UsageError(f"--device {name} is not available. Choose from: auto, {', '.join(there)}.") from None
    if device.type == "meta":
        raise UsageError("--device meta cannot train. Choose from: auto, cpu, cuda.")
    return device
