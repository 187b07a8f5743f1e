"""What a memory keeps, a policy in each file. What a new one is written with: `from flatcl.utils.engine.policies import
Policy`; `@POLICIES.register("my_policy")` in a plugin makes it a value of --buffer_policy."""

from flatcl.utils.engine.policies._policy import Policy

__all__ = ["Policy"]
