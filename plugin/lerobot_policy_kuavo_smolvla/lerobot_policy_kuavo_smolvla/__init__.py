"""Registers the policy type `kuavo_smolvla` with lerobot; policy and processors are found from the
configuration.
"""

from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig

__all__ = ["KuavoSmolVLAConfig"]
