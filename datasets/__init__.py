"""Benchmarks, one file each. What a new one is written with: `from flatcl.datasets import Benchmark, Split, ...`."""

from flatcl.datasets._benchmark import Benchmark, DomainBenchmark, Split, Task

__all__ = ["Benchmark", "DomainBenchmark", "Split", "Task"]
