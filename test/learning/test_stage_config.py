"""The shipped configuration says what the curriculum is, and the command line changes it as one expects."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from kuavo_smolvla_ros.errors import UsageError, UserError
from kuavo_smolvla_ros.learning.schedule import Schedule
from kuavo_smolvla_ros.learning.stage import Initialisation, Stage, StageError
from kuavo_smolvla_ros.learning.stage_config import load_curriculum, read_request
from kuavo_smolvla_ros.paths import config_dir
from kuavo_smolvla_ros.policy.language import TASK_INSTRUCTIONS

NAMES = ("task1_moving_grasp", "task2_weighing", "task3_placement", "task4_sorting")
FILES = [f"tasks/{name}" for name in NAMES]
TENTH = Fraction(1, 10)


@pytest.fixture(scope="module")
def curriculum() -> tuple[Stage, ...]:
    return load_curriculum()


def one(*overrides: str, task: str = "tasks/task2_weighing") -> Stage:
    """The one stage of a command line."""
    (stage,) = read_request([f"task={task}", *overrides]).stages
    return stage


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A copy of the configuration, to be changed."""
    return Path(shutil.copytree(config_dir() / "policy", tmp_path / "policy"))


class TestTheFourStages:
    """Each value of the curriculum's tables."""

    def test_names_instructions_and_numbers(self, curriculum: tuple[Stage, ...]) -> None:
        assert [stage.name for stage in curriculum] == list(NAMES)
        assert {stage.name: stage.task.instruction for stage in curriculum} == TASK_INSTRUCTIONS
        assert [stage.task.number for stage in curriculum] == [1, 2, 3, 4]

    def test_replay_shares(self, curriculum: tuple[Stage, ...]) -> None:
        assert [[share / TENTH for share in stage.shares] for stage in curriculum] == [
            [10],
            [2, 8],
            [1, 2, 7],
            [1, 1, 2, 6],
        ]
        assert [stage.task_names for stage in curriculum] == [NAMES[: i + 1] for i in range(4)]

    def test_rates_and_epochs(self, curriculum: tuple[Stage, ...]) -> None:
        assert [stage.optimizer.lr for stage in curriculum] == [5e-5, 3.5e-5, 2.5e-5, 2e-5]
        assert [stage.training.epochs for stage in curriculum] == [20, 25, 30, 35]
        for stage in curriculum:
            assert 1e-6 <= stage.optimizer.vision_lr <= 5e-6

    def test_vision_layers(self, curriculum: tuple[Stage, ...]) -> None:
        layers = [dict(stage.policy)["unfreeze_vision_layers"] for stage in curriculum]
        assert layers == [tuple(range(-1, -count - 1, -1)) for count in (9, 7, 5, 3)]

    def test_optimizer_schedule_and_batch(self, curriculum: tuple[Stage, ...]) -> None:
        for stage in curriculum:
            optimizer = stage.optimizer
            assert (optimizer.betas, optimizer.eps) == ((0.9, 0.999), 1e-8)
            assert (optimizer.weight_decay, optimizer.grad_clip_norm) == (5e-7, 1.0)
            assert stage.schedule == Schedule(1500, 25_000, 1e-6)
            assert stage.training.effective_batch_size == 64

    def test_starts(self, curriculum: tuple[Stage, ...]) -> None:
        assert curriculum[0].init == Initialisation("pretrained", "lerobot/smolvla_base")
        assert [stage.init.target for stage in curriculum[1:]] == list(NAMES[:3])

    def test_thresholds(self, curriculum: tuple[Stage, ...]) -> None:
        assert [stage.thresholds.retained_below for stage in curriculum[1:]] == [0.7, 0.8, 1.0]
        assert {stage.thresholds.own_below for stage in curriculum} == {0.5}

    def test_the_policy_accepts_every_stage(self, curriculum: tuple[Stage, ...]) -> None:
        for stage, trained in zip(curriculum, (9, 7, 5, 3), strict=True):
            config = stage.policy_config(backbone="tiny", device="cpu")
            assert len(config.freezing.unfreeze_vision_layers or ()) == trained
            assert not config.freezing.train_expert_only
            assert config.optimizer_lr == stage.optimizer.lr
            assert config.chunk_size == 50
            assert set(config.instructions) >= {task.instruction for task in stage.tasks}

    def test_every_value_is_explained(self) -> None:
        # A number without its reason cannot be changed by someone who was not there.
        text = (config_dir() / "policy" / "smolvla_sequential_base.yaml").read_text()
        assert text.count("#") > 40

    def test_paraphrases_are_no_longer_than_the_longest_instruction(
        self, curriculum: tuple[Stage, ...]
    ) -> None:
        longest = max(len(stage.task.instruction.split()) for stage in curriculum)
        for stage in curriculum:
            assert len(stage.task.paraphrases) == len(set(stage.task.paraphrases)) == 3
            assert all(len(text.split()) <= longest for text in stage.task.paraphrases)

    def test_composing_twice_gives_the_same_hashes(self, curriculum: tuple[Stage, ...]) -> None:
        assert [stage.hash for stage in load_curriculum()] == [stage.hash for stage in curriculum]
        assert len({stage.hash for stage in curriculum}) == 4


class TestCommandLine:
    def test_the_documented_one(self) -> None:
        request = read_request(["task=tasks/task1_moving_grasp", "policy.unfreeze_vision_layers=[-1,-2,-3]"])
        assert request.selected == ("task1_moving_grasp",)
        assert dict(request.stages[0].policy)["unfreeze_vision_layers"] == (-1, -2, -3)

    def test_all(self) -> None:
        request = read_request(["stages=all"])
        assert request.stages == request.curriculum
        assert request.selected == NAMES

    def test_an_override_changes_only_the_chosen_stage(self, curriculum: tuple[Stage, ...]) -> None:
        request = read_request(["task=tasks/task3_placement", "optimizer.lr=1e-5"])
        assert [stage.optimizer.lr for stage in request.curriculum] == [5e-5, 3.5e-5, 1e-5, 2e-5]
        assert [a.hash == b.hash for a, b in zip(request.curriculum, curriculum, strict=True)] == [
            True,
            True,
            False,
            True,
        ]

    def test_with_all_stages_it_changes_each(self) -> None:
        assert {stage.training.seed for stage in load_curriculum(["training.seed=7"])} == {7}

    def test_data_is_the_same_for_all(self) -> None:
        request = read_request(["task=tasks/task2_weighing", "data.root=/data", "data.held_out_share=0.2"])
        assert [task.datasets for task in request.stages[0].tasks] == [(f"/data/{n}",) for n in NAMES[:2]]
        assert {task.held_out_share for task in request.stages[0].tasks} == {0.2}

    def test_a_task_s_own_data_can_be_given(self) -> None:
        stage = one("task.datasets=[/a,/b]")
        assert [task.datasets for task in stage.tasks] == [("datasets/task1_moving_grasp",), ("/a", "/b")]

    def test_run_settings_change_no_hash(self, curriculum: tuple[Stage, ...]) -> None:
        request = read_request(["stages=all", "run.batch_size=8", "run.output_root=/elsewhere"])
        assert [stage.hash for stage in request.curriculum] == [stage.hash for stage in curriculum]
        assert (request.run.batch_size, request.run.root) == (8, Path("/elsewhere"))

    def test_moving_the_data_changes_no_hash(self, curriculum: tuple[Stage, ...]) -> None:
        moved = load_curriculum(["data.root=/elsewhere"])
        assert [stage.hash for stage in moved] == [stage.hash for stage in curriculum]

    def test_shares(self) -> None:
        stage = one("replay.shares.task1_moving_grasp=0.3", "replay.shares.task2_weighing=0.7")
        assert stage.shares == (Fraction(3, 10), Fraction(7, 10))

    def test_shares_may_be_fractions(self) -> None:
        stage = one("replay.shares={task1_moving_grasp:1/3,task2_weighing:2/3}")
        assert stage.shares == (Fraction(1, 3), Fraction(2, 3))

    def test_one_fraction_for_all_earlier_tasks(self) -> None:
        stage = one("replay.shares=null", "replay.fraction=0.2", task="tasks/task4_sorting")
        assert stage.shares == (Fraction(1, 15),) * 3 + (Fraction(4, 5),)

    def test_no_replay(self) -> None:
        assert one("replay.shares=null", "replay.fraction=0").shares == (0, 1)

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("scratch", Initialisation("scratch")),
            ("pretrained", Initialisation("pretrained", "lerobot/smolvla_base")),
            ("task1_moving_grasp", Initialisation("task", "task1_moving_grasp")),
            ("1", Initialisation("task", "task1_moving_grasp")),
            ("'task 1'", Initialisation("task", "task1_moving_grasp")),
            ("/some/folder", Initialisation("path", "/some/folder")),
            ("someone/model", Initialisation("path", "someone/model")),
        ],
    )
    def test_starts(self, value: str, expected: Initialisation) -> None:
        assert one(f"init={value}").init == expected

    def test_pretrained_weights_from_a_folder(self) -> None:
        stage = one("pretrained=/models/base", task="tasks/task1_moving_grasp")
        assert stage.init == Initialisation("pretrained", "/models/base")

    def test_lora(self) -> None:
        stage = one("adapter={rank:8,alpha:16,dropout:0.0,target_modules:[q_proj,v_proj]}")
        assert stage.adapter is not None
        assert (stage.adapter.rank, stage.adapter.target_modules) == (8, ("q_proj", "v_proj"))

    def test_a_field_of_the_policy_that_is_not_in_the_file(self) -> None:
        assert one("+policy.num_vlm_layers=8").policy_config(backbone="tiny").num_vlm_layers == 8

    def test_freezing_by_another_way(self) -> None:
        stage = one("policy.unfreeze_vision_layers=null", "policy.freeze_preset=conservative")
        assert stage.policy_config(backbone="tiny").freezing.given == ("preset",)


OWN = """
task: {number: 5, name: task5_cups, description: Cups, instruction: Stack the cups}
replay: {fraction: 0.2}
optimizer: {lr: 2.0e-5, vision_lr: 2.0e-6}
training: {epochs: 3}
thresholds: {own_below: 0.5, retained_below: 1.0, forgotten_above: 1.25}
"""


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    """A fifth task's file, outside the package."""
    file = tmp_path / "my tasks" / "cups.yaml"
    file.parent.mkdir()
    file.write_text(OWN)
    return file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optimizer:", "optimzer:", "has a section 'optimzer' that means nothing; did you mean optimizer"),
        ("number: 5, ", "", r"task\.number is not given; set it in .*cups\.yaml"),
        ("number: 5", "number: 4", "task5_cups and task4_sorting both have task.number 4"),
        ("name: task5_cups", "name: task4_sorting", "contains task4_sorting twice|lists a task twice"),
        ("name:", "nam: x, name:", "fields `nam` are not valid"),
        ("{number", "[number", "is no YAML, line"),
        ("\ntask:", "\ndefaults: [/tasks/juggling]\ntask:", "tasks/juggling"),
    ],
)
def test_a_mistake_in_a_file_from_elsewhere_is_one_sentence(
    own_task: Path, old: str, new: str, message: str
) -> None:
    assert old in OWN
    own_task.write_text(OWN.replace(old, new))
    with pytest.raises(UserError, match=message) as raised:
        read_request([f"task={own_task}"])
    assert "\n" not in str(raised.value)


def test_a_file_from_elsewhere_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read: No such file"):
        read_request([f"task={tmp_path / 'none.yaml'}"])


def test_a_shipped_task_out_of_its_order_says_what_to_do(own_task: Path) -> None:
    for overrides in (
        [f"task={FILES[1]}", f"curriculum=[{FILES[1]}]"],
        [f"task={own_task}", f"curriculum=[{FILES[1]},{own_task}]"],
    ):
        with pytest.raises(
            StageError, match=r"replay.shares=null replay.fraction=0.2.* or a file of your own"
        ):
            read_request(overrides)


class TestAnyCurriculum:
    def test_another_order(self) -> None:
        order = f"curriculum=[{','.join(reversed(FILES))}]"
        stages = load_curriculum([order, "init=scratch", "replay.shares=null", "replay.fraction=0.25"])
        assert [stage.name for stage in stages] == list(reversed(NAMES))
        assert stages[3].shares == (Fraction(1, 12),) * 3 + (Fraction(3, 4),)
        assert stages[0].shares == (1,)

    def test_fewer_tasks(self) -> None:
        stages = load_curriculum([f"curriculum=[{FILES[0]},{FILES[1]}]"])
        assert [stage.name for stage in stages] == list(NAMES[:2])

    def test_a_fifth_task_is_a_file(self, own_folder: Path) -> None:
        fifth = yaml.safe_load((own_folder / "tasks" / "task4_sorting.yaml").read_text())
        fifth["task"] |= {"number": 5, "name": "task5_cups", "instruction": "Stack the cups"}
        fifth["replay"] = {"shares": None, "fraction": 0.4}
        text = "# @package _global_\n" + yaml.safe_dump(fifth)
        (own_folder / "tasks" / "task5_cups.yaml").write_text(text)
        stages = load_curriculum([f"curriculum=[{','.join([*FILES, 'tasks/task5_cups'])}]"], own_folder)
        assert stages[4].shares == (TENTH,) * 4 + (Fraction(3, 5),)
        assert stages[4].init == Initialisation("task", "task4_sorting")
        assert [stage.hash for stage in stages[:4]] == [stage.hash for stage in load_curriculum()]

    def test_a_file_from_elsewhere_comes_after_the_others(
        self, own_task: Path, curriculum: tuple[Stage, ...]
    ) -> None:
        request = read_request([f"task={own_task}", "optimizer.lr=1e-6"])
        assert request.selected == ("task5_cups",)
        (stage,) = request.stages
        assert stage.task_names == (*NAMES, "task5_cups")
        assert stage.shares == (TENTH / 2,) * 4 + (Fraction(4, 5),)
        assert stage.init == Initialisation("task", "task4_sorting")
        assert (stage.optimizer.lr, stage.optimizer.vision_lr) == (
            1e-6,
            2e-6,
        )  # the command line above the file
        assert [s.hash for s in request.curriculum[:4]] == [s.hash for s in curriculum]

    def test_a_file_from_elsewhere_alone_and_after_the_first(self, own_task: Path) -> None:
        (alone,) = read_request([f"task={own_task}", f"curriculum=[{own_task}]", "init=scratch"]).curriculum
        assert (alone.shares, alone.init) == ((1,), Initialisation("scratch"))
        stages = read_request([f"task={own_task}", f"curriculum=[{FILES[0]},{own_task}]"]).curriculum
        assert stages[1].shares == (Fraction(1, 5), Fraction(4, 5))
        assert stages[1].init == Initialisation("task", NAMES[0])

    def test_a_path_may_be_relative_and_of_the_shipped_folder(
        self, own_task: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(own_task.parent)
        assert read_request([f"task={own_task.name}", f"curriculum=[{own_task}]", "init=scratch"]).stages
        shipped = config_dir() / "policy" / f"{FILES[1]}.yaml"
        assert read_request([f"task={shipped}"]) == read_request([f"task={FILES[1]}"])

    def test_one_task_that_is_not_the_first(self) -> None:
        given = (f"curriculum=[{FILES[1]}]", "init=pretrained", "replay.shares=null", "replay.fraction=0")
        assert read_request([f"task={FILES[1]}", *given]).curriculum[0].shares == (1,)

    def test_a_file_may_build_on_a_shipped_one(self, own_task: Path) -> None:
        second = own_task.with_name("second.yaml")
        second.write_text(
            "defaults: [/tasks/task2_weighing, _self_]\n"
            "init: pretrained\nreplay: {shares: null, fraction: 0.2}\n"
        )
        stages = read_request([f"task={own_task}", f"curriculum=[{second},{own_task}]"]).curriculum
        assert [stage.name for stage in stages] == ["task2_weighing", "task5_cups"]
        assert stages[0].optimizer.lr == 3.5e-5
        assert stages[0].init.kind == "pretrained"

    def test_what_is_changed_in_a_file_from_elsewhere_is_read_again(self, own_task: Path) -> None:
        assert read_request([f"task={own_task}"]).stages[0].training.epochs == 3
        own_task.write_text(OWN.replace("epochs: 3", "epochs: 4"))
        assert read_request([f"task={own_task}"]).stages[0].training.epochs == 4

    def test_a_changed_file_is_read_again(self, own_folder: Path) -> None:
        first = load_curriculum((), own_folder)
        file = own_folder / "tasks" / "task1_moving_grasp.yaml"
        file.write_text(file.read_text().replace("epochs: 20", "epochs: 21"))
        assert [stage.training.epochs for stage in first] == [20, 25, 30, 35]
        assert [stage.training.epochs for stage in load_curriculum((), own_folder)] == [21, 25, 30, 35]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "say which stage to train: task=tasks/NAME, .* or stages=all"),
        (["task=tasks/task1_moving_grasp", "stages=all"], "say which stage to train"),
        (["stages=2"], r"stages= is given once, with one name"),
        (["stages=some"], "stages=some means nothing"),
        (["task=tasks/juggling"], r"tasks/juggling is not in the curriculum \(tasks/task1_moving_grasp"),
        (["stages=all", "curriculum=[]"], r"curriculum is \[\]"),
        (
            ["stages=all", "curriculum=[tasks/juggling]"],
            "no task file tasks/juggling.yaml .* there are tasks",
        ),
        (["stages=all", f"curriculum=[{FILES[0]},{FILES[0]}]"], "contains task1_moving_grasp twice|twice"),
        (["stages=all", f"curriculum=[{FILES[1]}]"], "replay shares of task1_moving_grasp, but up to this"),
        (["stages=all", "foo=1"], "Could not override 'foo'"),
        (["stages=all", "optimizer.lr=fast"], "optimizer: `lr`: Couldn't parse 'fast' into a float"),
        (["stages=all", "optimizer.betas=0.9"], "optimizer.betas is 0.9; it is a list"),
        (["stages=all", "optimizer.lr=-1"], "optimizer.lr is -1.0; it must be positive"),
        (["stages=all", "+optimizer.beta3=1"], "optimizer: The fields `beta3` are not valid"),
        (["stages=all", "training.max_steps=true"], "no yes-or-no setting"),
        (["stages=all", "training.epochs=2.5"], "training: `epochs`"),
        (["stages=all", "task.datasets=null"], "task.datasets is None; it is a list"),
        (["stages=all", "run.batch_size=0"], "run.batch_size is 0; it is at least 1"),
        (["stages=all", "replay.fraction=0.2"], "give either replay.shares or replay.fraction"),
        (["stages=all", "replay.shares=null"], "give either replay.shares or replay.fraction"),
        (["stages=all", "replay.shares=0.2"], "replay.shares is 0.2; it maps tasks to shares"),
        (["stages=all", "validation=null"], "validation is None; it is a section"),
        (["stages=all", "data.root=\"'"], "the command line cannot be read"),
        (["task=tasks/task2_weighing", "replay.shares.task1_moving_grasp=0.3"], "sum to 1.1 instead of 1"),
        (["task=tasks/task2_weighing", "replay.shares.task1_moving_grasp=much"], "'much'; give a number"),
        (["task=tasks/task2_weighing", "replay.shares.task1_moving_grasp=1/0"], "'1/0'; give a number"),
        (["task=tasks/task1_moving_grasp", "init=previous"], "is the first stage"),
        (["task=tasks/task2_weighing", "init=task9"], "cannot start from task 9: before it come 1"),
        (["task=tasks/task2_weighing", "init=juggling"], "init is 'juggling'; it is pretrained, previous"),
        (["task=tasks/task2_weighing", "init=task4_sorting"], "init is 'task4_sorting'"),
    ],
)
def test_each_mistake_is_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_request(overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+policy.optimizer_lr=1", r"policy\.optimizer_lr is not set here but in optimizer\.lr"),
        ("+policy.init_from=x", r"policy\.init_from is not set here but in init"),
        ("+policy.chunk_siz=10", r"no setting 'chunk_siz'; did you mean policy\.chunk_size\?"),
        ("+policy.qqqq=10", "the policy has no setting 'qqqq'$"),
    ],
)
def test_settings_of_the_policy_that_do_not_belong(override: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        one(override).policy_config(backbone="tiny")


def test_freezing_that_contradicts_itself_is_refused() -> None:
    from kuavo_smolvla_ros.policy.freeze_plan import FreezingError, plan_freezing

    config = one("policy.train_expert_only=true").policy_config(backbone="tiny")
    with pytest.raises(FreezingError):
        plan_freezing(config.freezing, 12)


def test_a_value_no_file_gives_is_named(own_folder: Path) -> None:
    file = own_folder / "tasks" / "task1_moving_grasp.yaml"
    file.write_text(file.read_text().replace("  lr: 5.0e-5\n", ""))
    with pytest.raises(
        UsageError, match=r"optimizer\.lr is not given; set it in tasks/task1_moving_grasp\.yaml"
    ):
        load_curriculum((), own_folder)


def test_a_folder_without_a_base_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no smolvla_sequential_base\.yaml"):
        load_curriculum((), tmp_path)
