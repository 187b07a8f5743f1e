"""What a memory keeps. A new policy is written with: `from flatcl.utils.engine.policies import Policy`."""

from flatcl.utils.engine.policies._policy import Policy

__all__ = ["Policy"]
