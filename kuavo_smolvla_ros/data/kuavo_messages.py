"""The robot's own messages, for recordings that do not carry definitions and for recordings made by tests.

Bags of ROS 1 and MCAP files define their types themselves, and those definitions are used. Older sqlite3
recordings do not.
"""

from __future__ import annotations

from rosbags.typesys import get_types_from_msg
from rosbags.typesys.store import Typestore

_DEFINITIONS = {
    "kuavo_msgs/msg/jointData": """
float64[] joint_q
float64[] joint_v
float64[] joint_vd
float64[] joint_torque
""",
    "kuavo_msgs/msg/imuData": """
geometry_msgs/Vector3 gyro
geometry_msgs/Vector3 acc
geometry_msgs/Vector3 free_acc
geometry_msgs/Quaternion quat
""",
    "kuavo_msgs/msg/endEffectorData": """
string[] name
float64[] position
float64[] velocity
float64[] effort
""",
    "kuavo_msgs/msg/sensorsData": """
std_msgs/Header header
builtin_interfaces/Time sensor_time
kuavo_msgs/jointData joint_data
kuavo_msgs/imuData imu_data
kuavo_msgs/endEffectorData end_effector_data
""",
    "kuavo_msgs/msg/lejuClawState": """
std_msgs/Header header
int8[] state
kuavo_msgs/endEffectorData data
""",
    "kuavo_msgs/msg/lejuClawCommand": """
std_msgs/Header header
kuavo_msgs/endEffectorData data
""",
    "kuavo_msgs/msg/robotHandPosition": """
std_msgs/Header header
uint8[] left_hand_position
uint8[] right_hand_position
""",
    "kuavo_msgs/msg/jointCmd": """
std_msgs/Header header
float64[] joint_q
float64[] joint_v
float64[] tau
float64[] tau_max
float64[] tau_ratio
float64[] joint_kp
float64[] joint_kd
int32[] control_modes
""",
}


def register_kuavo_messages(store: Typestore) -> Typestore:
    """Add the robot's messages to a store that has the standard ones; returns the store."""
    types = {}
    for name, text in _DEFINITIONS.items():
        types |= get_types_from_msg(text, name)
    store.register(types)
    return store
