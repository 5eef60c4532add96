"""A process in which foreign code is tried: it may end there, or be ended, and nothing else does."""

from slipstream.sandbox.sandbox import Allowance, Sandbox, SandboxDiedError, SandboxError
from slipstream.sandbox.stack import on_roomy_stack, roomy_stack

__all__ = ["Allowance", "Sandbox", "SandboxDiedError", "SandboxError", "on_roomy_stack", "roomy_stack"]
