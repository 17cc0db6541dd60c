"""KuavoSim-v0: Gymnasium's own checker, bad actions, and LeRobot's rollout."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.sim.env import ENV_ID, KuavoSimEnv
from kuavo_smolvla_ros.sim.experts import make_expert
from kuavo_smolvla_ros.sim.tasks import TASKS, make_task


@pytest.fixture
def state_env():
    env = KuavoSimEnv(task=1, obs_type="state")
    yield env
    env.close()


@pytest.mark.parametrize("number", sorted(TASKS))
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space.*")
def test_gymnasiums_checker_is_content_with_every_task(number):
    env = gymnasium.make(ENV_ID, task=number, obs_type="state")
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space.*")
def test_gymnasiums_checker_is_content_with_pictures():
    env = gymnasium.make(ENV_ID, observation_height=48, observation_width=64, render_mode="rgb_array")
    check_env(env.unwrapped)
    observation, _ = env.reset(seed=1)
    assert set(observation["pixels"]) == {"head_cam_h", "wrist_cam_l", "wrist_cam_r"}
    assert {picture.shape for picture in observation["pixels"].values()} == {(48, 64, 3)}
    assert env.render().shape == (480, 640, 3)
    env.close()


def test_the_experts_reward_is_its_score(state_env):
    state_env.reset(seed=5)
    expert = make_expert(state_env.simulation, 5)
    gained, terminated, steps = 0.0, False, 0
    while not terminated:
        _, reward, terminated, truncated, info = state_env.step(expert.action().astype(np.float32))
        assert not truncated
        gained += reward
        steps += 1
    assert info["is_success"]
    assert gained == pytest.approx(1.0)
    assert info["score"] == pytest.approx(100)
    assert steps < 150


def test_an_idle_episode_is_truncated_at_the_tasks_time_limit(state_env):
    state_env.reset(seed=0)
    hold = state_env.simulation.target
    outcomes = [state_env.step(hold)[2:4] for _ in range(250)]
    assert outcomes[-1] == (False, True)
    assert set(outcomes[:-1]) == {(False, False)}


@pytest.mark.parametrize("bad", [np.full(16, np.nan), np.zeros(7), np.zeros(20), np.full(16, np.inf)])
def test_a_bad_action_is_refused_and_time_goes_on_with_the_last_target(state_env, bad):
    state_env.reset(seed=0)
    target = state_env.simulation.target
    _, _, terminated, truncated, info = state_env.step(bad)
    assert "refused" in info["refused"]
    assert not terminated
    assert not truncated
    assert state_env.simulation.target == pytest.approx(target)
    assert state_env.simulation.time_s == pytest.approx(0.1)


def test_an_action_beyond_the_limits_is_clipped_and_said_to_be(state_env):
    state_env.reset(seed=0)
    action = state_env.simulation.target
    action[4] -= 0.25
    *_, info = state_env.step(action)
    assert info["clipped"] == pytest.approx(0.25, abs=1e-4)
    assert "refused" not in info
    *_, info = state_env.step(state_env.simulation.target)
    assert info["clipped"] < 1e-4


def test_seeds(state_env):
    first, _ = state_env.reset(seed=3)
    part = state_env.simulation.position("part")
    state_env.reset()
    assert not np.allclose(state_env.simulation.position("part"), part)
    again, _ = state_env.reset(seed=3)
    assert np.array_equal(first["agent_pos"], again["agent_pos"])
    assert np.array_equal(state_env.simulation.position("part"), part)


@pytest.mark.parametrize(
    "wrong", [{"task": 9}, {"level": "hard"}, {"obs_type": "pixels"}, {"render_mode": "human"}]
)
def test_wrong_use_is_an_error_with_the_choices(wrong):
    with pytest.raises(UsageError):
        KuavoSimEnv(**{"obs_type": "state", **wrong})


def test_lerobots_own_rollout_runs_an_expert_to_success():
    """`lerobot-eval` makes the environment from its configuration and drives it with a policy."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("lerobot")
    from lerobot.envs.configs import EnvConfig
    from lerobot.envs.factory import make_env, make_env_pre_post_processors
    from lerobot.envs.utils import env_to_policy_features
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.scripts.lerobot_eval import rollout

    import kuavo_smolvla_ros.sim.lerobot_plugin  # noqa: F401

    config = EnvConfig.get_choice_class("kuavo_sim")(number=1, observation_height=48, observation_width=64)
    features = env_to_policy_features(config)
    assert features["observation.images.head_cam_h"].shape == (3, 48, 64)
    assert features["observation.state"].shape == features["action"].shape == (16,)
    vector = make_env(config, n_envs=1)["kuavo_sim"][0]
    simulation = vector.envs[0].unwrapped.simulation
    instructions = []

    class Expert(torch.nn.Module):
        def reset(self) -> None:
            self.expert = None

        def select_action(self, observation: dict) -> torch.Tensor:
            if self.expert is None:
                self.expert = make_expert(simulation, 4)
            instructions.extend(observation["task"])
            assert observation["observation.images.wrist_cam_l"].shape == (1, 3, 48, 64)
            return torch.from_numpy(self.expert.action()).float()[None]

    same = PolicyProcessorPipeline(steps=[], to_transition=lambda x: x, to_output=lambda x: x)
    before, after = make_env_pre_post_processors(config, SmolVLAConfig())
    outcome = rollout(vector, Expert(), before, after, same, same, seeds=[4])
    vector.close()
    assert bool(outcome["success"].any())
    assert outcome["reward"].sum() > 0.9
    assert set(instructions) == {make_task(1).instruction}
