"""What every method, optimizer, network, benchmark and policy must keep: `flatcl check` runs it, and so do the tests.

Each module has CONTRACTS, {title: contract}, and `subject`, which makes of a name what its contracts are given. A
contract raises `Broken` (an `AssertionError`) or `UsageError` with a message that says what is wrong, what was got and
what to do, `Skipped` where it cannot be asked for, and may return a note. A new kind of part is one module more.
"""
