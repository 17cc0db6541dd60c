"""The second pass: samples of all streams on a uniform grid, decoded only where the grid uses them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.bag_frames import SizeError, check_picture
from kuavo_smolvla_ros.data.bag_types import decode
from kuavo_smolvla_ros.data.bags import Bag, FilePlace
from kuavo_smolvla_ros.data.episode_settings import EpisodeSettings
from kuavo_smolvla_ros.data.findings import Code
from kuavo_smolvla_ros.data.recording_index import StreamRecord
from kuavo_smolvla_ros.data.segments import Window, in_gaps
from kuavo_smolvla_ros.robot.description import Block, Camera, RobotSpec
from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.grid import GridSamples, Recorded, admit, sample_grid, uniform_grid
from kuavo_smolvla_ros.robot.image_files import ImageError
from kuavo_smolvla_ros.robot.stream_buffer import Arrival
from kuavo_smolvla_ros.robot.timeline import Budget, NoObservation, Reason, nanoseconds
from kuavo_smolvla_ros.robot.vectors import decode_block

Positions = NDArray[np.intp]
Vectors = NDArray[np.float64]
_NOT_FINITE = re.compile(r" is (nan|-?inf)$")  # how robot/vectors words it
RAW_IMAGE = "sensor_msgs/msg/Image"

_CODES = {
    Reason.MISSING: Code.GAP,
    Reason.FORGOTTEN: Code.GAP,
    Reason.STALE: Code.STALE,
    Reason.DEAD: Code.FROZEN,
    Reason.SKEWED: Code.SKEWED,
}


@dataclass(frozen=True)
class Cause:
    """Why there is nothing at a grid time."""

    code: Code
    stream: str
    sentence: str


@dataclass(frozen=True)
class Admitted:
    """One stream's messages in the order of their stamps: positions in the record, an array per clock
    setting.
    """

    record: StreamRecord
    eras: list[Positions]
    arrivals: Counter[Arrival]

    @classmethod
    def of(cls, record: StreamRecord) -> Admitted:
        eras, arrivals = admit(record.stamps_ns)
        return cls(record, eras, arrivals)

    @property
    def jumps_ns(self) -> list[int]:
        """Receive times at which the stream was seen to start anew."""
        receive = self.record.receive_ns
        return [int(receive[era.min()]) for era in self.eras[1:]]

    def within(self, window: Window) -> Positions:
        receive = self.record.receive_ns
        inside = [era[window.holds(receive[era])] for era in self.eras]
        return max(inside, key=len, default=np.empty(0, dtype=np.intp))


@dataclass
class Stretch:
    """A grid without long gaps, what was chosen at each of its times, and the vectors decoded from it."""

    samples: GridSamples  # of the inputs
    usable: NDArray[np.bool_]
    chosen: dict[str, Positions]  # stream -> position in the stream's record, -1 where nothing is usable
    state: Vectors
    action: Vectors
    moving: NDArray[np.bool_]  # the gap rule's flag
    faults: dict[int, Cause]  # grid step -> what could not be decoded

    @property
    def grid_ns(self) -> NDArray[np.int64]:
        return self.samples.grid_ns

    def cause(self, step: int) -> Cause:
        """Why grid step number `step` is not usable."""
        if step in self.faults:
            return self.faults[step]
        outcome = self.samples.outcome(step)
        if isinstance(outcome, NoObservation):
            problem = outcome.problems[0]
            return Cause(_CODES[problem.reason], problem.stream, str(problem).partition(": ")[2])
        return Cause(Code.NO_COMMAND, "", "no command had been given yet")


class Sampler:
    """Samples windows of one recording."""

    def __init__(
        self, bag: Bag, spec: RobotSpec, settings: EpisodeSettings, admitted: dict[str, Admitted]
    ) -> None:
        self._bag = bag
        self._spec = spec
        self._settings = settings
        self._admitted = admitted
        pictures = {camera.stream for camera in spec.cameras.values()}
        frozen = settings.max_frozen_s
        self.budgets = {
            name: Budget.of(spec.streams[name], frozen if name in pictures else None) for name in admitted
        }
        self._cameras: dict[str, list[Camera]] = {}
        for camera in spec.cameras.values():
            self._cameras.setdefault(camera.stream, []).append(camera)
        self._blocks: dict[str, list[Block]] = {}
        for block in (*spec.state, *spec.action):
            self._blocks.setdefault(block.stream, []).append(block)
        self.inputs = [name for name in admitted if spec.streams[name].direction == "in"]
        self.commands = [name for name in admitted if name not in self.inputs]

    @property
    def path(self) -> Path:
        return self._bag.path

    def recorded(
        self, names: Iterable[str], window: Window
    ) -> tuple[dict[str, Recorded], dict[str, Positions]]:
        """The streams as `robot/grid` takes them, and where each of their samples stands in its record."""
        streams, positions = {}, {}
        for name in names:
            record = self._admitted[name].record
            at = self._admitted[name].within(window)
            watched = self.budgets[name].max_frozen_ns is not None
            streams[name] = Recorded(record.stamps_ns[at], record.digests[at] if watched else None)
            positions[name] = at
        return streams, positions

    def sample(self, window: Window, start_ns: int, end_ns: int) -> Stretch:
        """Everything on the grid from `start_ns` to `end_ns`, both header times."""
        grid = uniform_grid(start_ns, end_ns, self._spec.fps)
        inputs, input_positions = self.recorded(self.inputs, window)
        commands, command_positions = self.recorded(self.commands, window)
        asked = self._settings.max_skew_s
        skew_ns = nanoseconds(self._spec.max_skew_s if asked is None else asked)
        samples = sample_grid(inputs, {n: self.budgets[n] for n in inputs}, skew_ns, grid)
        moving = self._moving(commands, grid)
        is_measured = self._settings.uncommanded == "measured"
        usable = samples.usable.copy()
        chosen = {name: np.full(grid.size, -1, dtype=np.intp) for name in self._admitted}
        for name, picks in samples.picks.items():
            chosen[name][samples.usable] = input_positions[name][picks]
        for name, stream in commands.items():
            picks = np.searchsorted(stream.stamps_ns, grid, side="right") - 1
            early = self._needs_none_yet(name, stream, grid, moving)
            picks[early] = 0
            known = picks >= 0
            chosen[name][known] = command_positions[name][picks[known]]
            if not is_measured:
                usable &= early | sample_grid({name: stream}, {name: self.budgets[name]}, None, grid).usable
        stretch = Stretch(
            samples=samples,
            usable=usable,
            chosen=chosen,
            state=np.full((grid.size, len(self._spec.state_names)), np.nan),
            action=np.full((grid.size, len(self._spec.action_names)), np.nan),
            moving=moving,
            faults={},
        )
        self._decode(stretch)
        if is_measured:
            self._take_measured(stretch)
        if self._spec.gap_rule is not None:
            stretch.action[:, -1] = stretch.moving
        return stretch

    def waits_for(self, name: str, window: Window, from_ns: int) -> bool:
        """Whether this stream's first command was missed at some time from `from_ns` on."""
        commands, _ = self.recorded(self.commands, window)
        first_ns = int(commands[name].stamps_ns[0])
        grid = uniform_grid(from_ns, max(from_ns, first_ns - 1), self._spec.fps)
        early = self._needs_none_yet(name, commands[name], grid, self._moving(commands, grid))
        return not early.all()

    def _needs_none_yet(
        self, name: str, stream: Recorded, grid: NDArray[np.int64], moving: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Times before a stream's first command at which its gate is closed: a base that is not told to walk.

        Nothing of it is executed then, and on the robot nothing is published before the first walk. Its first
        command stands there.
        """
        gate, rule = self._spec.streams[name].gate, self._spec.gap_rule
        if gate is None or rule is None or gate.joint != rule.joint or not stream.stamps_ns.size:
            return np.zeros(grid.size, dtype=np.bool_)
        is_closed = np.where(moving, not gate.is_open(1.0), not gate.is_open(0.0))
        early: NDArray[np.bool_] = is_closed & (grid < stream.stamps_ns[0])
        return early

    def _moving(self, commands: dict[str, Recorded], grid: NDArray[np.int64]) -> NDArray[np.bool_]:
        rule = self._spec.gap_rule
        if rule is None:
            return np.zeros(grid.size, dtype=np.bool_)
        others = [int(s.stamps_ns[-1]) for n, s in commands.items() if n != rule.stream and s.stamps_ns.size]
        longest_ns = nanoseconds(rule.longer_than_s)
        moving = in_gaps(commands[rule.stream].stamps_ns, longest_ns, max(others, default=None), grid)
        for name, stream in commands.items():
            gate = self._spec.streams[name].gate
            if gate is None or gate.joint != rule.joint or not gate.is_open(1.0) or not stream.stamps_ns.size:
                continue
            # The arms fall silent a moment before the base is told where to go for the first time.
            first_ns = stream.stamps_ns[0]
            moving &= ~((grid < first_ns) & (grid >= first_ns - longest_ns))
        return moving

    def _decode(self, stretch: Stretch) -> None:
        """Fill in state and action, look at the pictures; a step with a bad message becomes unusable."""
        used = {n: stretch.usable & (chosen >= 0) for n, chosen in stretch.chosen.items()}
        results = self._read({name: np.unique(stretch.chosen[name][used[name]]) for name in used})
        for into, blocks in ((stretch.state, self._spec.state), (stretch.action, self._spec.action)):
            edges = np.cumsum([0, *(len(block.joints) for block in blocks)]).tolist()
            for block, columns in zip(blocks, map(slice, edges[:-1], edges[1:]), strict=True):
                rows = results[block.stream]
                for step in np.flatnonzero(used[block.stream]).tolist():
                    row = rows[int(stretch.chosen[block.stream][step])]
                    if not isinstance(row, Cause):
                        into[step, columns] = row[block]
        for name, mask in used.items():
            for step in np.flatnonzero(mask).tolist():
                result = results[name][int(stretch.chosen[name][step])]
                if isinstance(result, Cause):
                    stretch.usable[step] = False
                    stretch.faults.setdefault(step, result)

    def _read(self, wanted: dict[str, Positions]) -> dict[str, dict[int, dict[Block, Vectors] | Cause]]:
        """What these messages hold, read in the order in which they lie: a chunk is unpacked once."""
        jobs = [
            (*self._admitted[name].record.place(position), name, position)
            for name, positions in wanted.items()
            for position in positions.tolist()
        ]
        results: dict[str, dict[int, dict[Block, Vectors] | Cause]] = {name: {} for name in wanted}
        for *place, name, position in sorted(jobs):
            results[name][position] = self._look_inside(name, self._bag.read(FilePlace(*place)))
        return results

    def _look_inside(self, name: str, raw: bytes) -> dict[Block, Vectors] | Cause:
        """The values of each block of a message (a picture has none), or what is wrong with it."""
        channel = self._admitted[name].record.channel
        assert channel is not None
        try:
            message = decode(channel, raw)
            for camera in self._cameras.get(name, ()):
                check_picture(message, camera, channel.type == RAW_IMAGE)
            return {block: decode_block(block, message) for block in self._blocks.get(name, ())}
        except SizeError as error:
            return Cause(Code.WRONG_SIZE, name, str(error))
        except ImageError as error:
            return Cause(Code.BAD_PICTURE, name, str(error))
        except MessageError as error:
            sentence = str(error).removeprefix(f"stream '{name}': ")
            code = Code.NOT_FINITE if _NOT_FINITE.search(sentence) else Code.UNDECODABLE
            return Cause(code, name, sentence)

    def _take_measured(self, stretch: Stretch) -> None:
        state_at = {name: i for i, name in enumerate(self._spec.state_names)}
        for column, joint in enumerate(n for block in self._spec.action for n in block.joints):
            silent = stretch.usable & np.isnan(stretch.action[:, column])
            if joint in state_at:
                stretch.action[silent, column] = stretch.state[silent, state_at[joint]]
            else:
                stretch.usable[silent] = False
