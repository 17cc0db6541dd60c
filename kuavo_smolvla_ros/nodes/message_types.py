"""Message classes by the name that a robot description gives them."""

from __future__ import annotations

import importlib
from typing import Any

from kuavo_smolvla_ros.errors import UserError


def message_class(name: str) -> Any:
    """`sensor_msgs/msg/JointState` to the class; a package that is not installed is named."""
    package, kind, message = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.{kind}"), message)
    except ImportError:
        raise UserError(
            f"the message package '{package}' is not installed, so {name} cannot be received; "
            "install and source it, or use a robot description with standard messages"
        ) from None
    except AttributeError:
        raise UserError(f"the package '{package}' has no message '{message}'") from None
