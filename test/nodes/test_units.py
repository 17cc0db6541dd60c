"""Parts of the nodes that need no ROS graph: instructions, bringup, chunk messages, clocks, faults."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import deserialize_message, serialize_message
from trajectory_msgs.msg import JointTrajectory

from kuavo_smolvla_ros.control.chunk import ActionChunk, Refusal, uniform_times_ns
from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.nodes.bringup import BRINGUPS
from kuavo_smolvla_ros.nodes.chunk_message import from_message, to_message
from kuavo_smolvla_ros.nodes.command_line import command_line
from kuavo_smolvla_ros.nodes.instruction import FREE_TASK, known_tasks, resolve
from kuavo_smolvla_ros.nodes.parameters import Param, refuse
from kuavo_smolvla_ros.nodes.sim_faults import ActiveFault, Fault, PixelNoise
from kuavo_smolvla_ros.nodes.time_factor import TimeFactor

KNOWN = {"task1": ("Pick up the moving object",), "task2": ("Weigh the package", "Put it on the scale")}
CAMERAS = ("head_cam_h", "wrist_cam_l")


class TestInstruction:
    @pytest.mark.parametrize(
        "text", ["task2", "Weigh the package", "  weigh THE   package. ", "Weigh the package\n"]
    )
    def test_task_is_found_by_name_or_sentence(self, text: str) -> None:
        verdict = resolve(text, KNOWN, "refuse")
        assert verdict.instruction is not None
        assert (verdict.instruction.task, verdict.instruction.sentence) == ("task2", "Weigh the package")
        assert verdict.remark == ""

    def test_a_paraphrase_is_its_tasks_and_stays_as_it_was_trained(self) -> None:
        verdict = resolve("put it on the scale.", KNOWN, "refuse")
        assert verdict.instruction is not None
        assert (verdict.instruction.task, verdict.instruction.sentence) == ("task2", "Put it on the scale")

    def test_a_policy_says_its_tasks_and_an_older_ones_sentences_tell_them(self) -> None:
        said = {"task5_cups": ["Stack the cups", "Put the cups on each other"]}
        sentences = ["Stack the cups", "Put the cups on each other", "Weigh"]
        assert known_tasks(said, sentences, {}) == {"task5_cups": tuple(said["task5_cups"])}
        older = known_tasks({}, ["Weigh", "Dance"], {"task2": "Weigh", "task3": "Place"})
        assert older == {"task2": ("Weigh",), "Dance": ("Dance",)}

    @pytest.mark.parametrize(
        ("policy", "taken", "remarked"), [("accept", 1, 0), ("warn", 1, 1), ("refuse", 0, 1)]
    )
    def test_unknown_sentence_goes_by_policy(self, policy: str, taken: int, remarked: int) -> None:
        verdict = resolve("Dance", KNOWN, policy)
        assert (verdict.instruction is not None, bool(verdict.remark)) == (taken, remarked)
        if verdict.instruction is not None:
            assert (verdict.instruction.task, verdict.instruction.sentence) == (FREE_TASK, "Dance")

    @pytest.mark.parametrize("text", ["", "  ", "\n"])
    @pytest.mark.parametrize("policy", ["accept", "warn", "refuse"])
    def test_nothing_is_no_instruction(self, text: str, policy: str) -> None:
        assert resolve(text, KNOWN, policy).instruction is None


class TestChunkMessage:
    @given(
        st.integers(1, 2**31 * 10**9 - 1),
        st.integers(2, 60),
        st.integers(0, 2**31),
        st.sampled_from([10.0, 30.0, 7.0]),
        st.sampled_from(["task1_moving_grasp", "free", "a/b c"]),
    )
    def test_round_trip_over_the_wire(
        self, stamp: int, steps: int, sequence: int, fps: float, task: str
    ) -> None:
        values = np.random.default_rng(steps).normal(size=(steps, 3))
        chunk = ActionChunk(
            stamp, uniform_times_ns(steps, fps), ("a", "b", "c"), values, task, sequence, "f" * 16
        )
        back = from_message(deserialize_message(serialize_message(to_message(chunk)), JointTrajectory))
        assert isinstance(back, ActionChunk)
        assert (back.stamp_ns, back.names, back.task) == (stamp, chunk.names, task)
        assert (back.sequence, back.fingerprint) == (sequence, chunk.fingerprint)
        assert back.times_ns.tolist() == chunk.times_ns.tolist()
        assert np.array_equal(back.values, values)

    def test_times_do_not_drift(self) -> None:
        assert uniform_times_ns(301, 30.0)[-1] == 10_000_000_000

    @pytest.mark.parametrize("frame", ["", "world", "abc/x/task", "abc/-1/task", "abc/1"])
    def test_foreign_frame_is_a_refusal(self, frame: str) -> None:
        message = JointTrajectory()
        message.header.frame_id = frame
        found = from_message(message)
        assert isinstance(found, Refusal)
        assert "fingerprint/sequence/task" in found.detail

    def test_empty_message_is_no_crash(self) -> None:
        message = JointTrajectory()
        message.header.frame_id = "abc/1/task"
        assert isinstance(from_message(message), (ActionChunk, Refusal))


class TestBringup:
    def test_policy_and_executor_agree_on_names(self) -> None:
        given = {"namespace": "kuavo", "checkpoint": "x", "robot": "kuavo"}
        executor, policy = BRINGUPS["policy"].processes(given)
        assert executor.parameters["policy"] == "/kuavo/policy"
        assert (policy.name, policy.namespace) == ("policy", "kuavo")
        assert executor.parameters["dry_run"] is True, "a first launch moves nothing"

    def test_simulator_alone_or_with_a_policy(self) -> None:
        assert [p.executable for p in BRINGUPS["sim"].processes({})] == ["sim_node"]
        with_policy = BRINGUPS["sim"].processes({"checkpoint": "x", "task": "2"})
        assert [p.executable for p in with_policy] == ["sim_node", "executor_node", "policy_node"]
        assert all(p.parameters["use_sim_time"] for p in with_policy[1:])
        assert with_policy[0].parameters["task"] == 2

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"chekpoint": "x"}, "has no argument 'chekpoint'; it has robot"),
            ({"dry_run": "maybe"}, "dry_run is true or false, not 'maybe'"),
            ({"mode": "fast"}, "mode is one of realtime, synchronous, not 'fast'"),
        ],
    )
    def test_wrong_argument_is_named(self, given: dict[str, Any], says: str) -> None:
        with pytest.raises(UsageError, match=says):
            BRINGUPS["policy"].processes(given)

    def test_number_that_is_none_is_named(self) -> None:
        with pytest.raises(UsageError, match="task is a number such as 1, not 'two'"):
            BRINGUPS["sim"].processes({"task": "two"})

    def test_text_stays_text_on_the_command_line(self) -> None:
        (_, policy) = BRINGUPS["policy"].processes({"instruction": "it's 1: go", "checkpoint": "1"})
        line = command_line(policy)
        assert "instruction:='it''s 1: go'" in line
        assert "checkpoint:='1'" in line


class TestTimeFactor:
    @pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
    def test_measures_how_fast_time_runs(self, factor: float) -> None:
        clock = TimeFactor()
        for i in range(300):
            clock.see(round(i * 0.01 * factor * 1e9), i * 0.01)
        assert clock.value() == pytest.approx(factor, rel=0.01)

    def test_knows_nothing_at_first_and_after_a_jump_back(self) -> None:
        clock = TimeFactor()
        assert clock.value() == 1.0
        for i in range(100):
            clock.see(i * 30_000_000, i * 0.01)
        clock.see(0, 1.0)
        assert clock.value() == 1.0


class TestFaults:
    def test_every_fault_can_be_asked_for(self) -> None:
        for kind in Fault:
            text = f"{kind.value}:head_cam_h" if kind.value.startswith("camera") else kind.value
            assert ActiveFault.parse(text, CAMERAS).kind is kind

    @pytest.mark.parametrize("text", ["camera_drop", "camera_drop:nose", "state_nan:head_cam_h", "fire", ""])
    def test_nonsense_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError):
            ActiveFault.parse(text, CAMERAS)

    @given(st.floats(0.5, 5.0), st.integers(0, 255))
    def test_noise_has_its_size_and_never_repeats(self, std: float, level: int) -> None:
        rng = np.random.default_rng(0)
        noise = PixelNoise(std)
        picture = np.full((48, 64, 3), level, np.uint8)
        first, second = noise.over(picture, rng), noise.over(picture, rng)
        assert first.dtype == np.uint8
        assert not np.array_equal(first, second)
        if 40 < level < 215:
            assert np.std(first.astype(float)) == pytest.approx(std, rel=0.15)

    def test_no_noise_changes_nothing(self) -> None:
        picture = np.zeros((4, 4, 3), np.uint8)
        assert PixelNoise(0.0).over(picture, np.random.default_rng(0)) is picture


class TestParameters:
    PARAMETERS = {"mode": Param("a", "which", choices=("a", "b")), "rate": Param(1.0, "Hz", 0.1, 5.0)}

    def test_value_outside_the_choices_is_refused(self) -> None:
        assert refuse(self.PARAMETERS, "mode", "b") is None
        assert refuse(self.PARAMETERS, "mode", "c") == "mode: 'c' is unknown; choose one of a, b"
        assert refuse(self.PARAMETERS, "use_sim_time", True) is None

    def test_bounds_reach_the_descriptor(self) -> None:
        described = self.PARAMETERS["rate"].descriptor()
        assert (described.floating_point_range[0].from_value, described.floating_point_range[0].to_value) == (
            0.1,
            5.0,
        )
        whole = Param(3, "n", 1, 9).descriptor()
        assert (whole.integer_range[0].from_value, whole.integer_range[0].to_value) == (1, 9)


def test_no_thread_is_left_behind() -> None:
    """These parts are plain code: importing and using them starts nothing."""
    assert not [t for t in threading.enumerate() if t.name in ("inference", "simulation", "pictures")]
