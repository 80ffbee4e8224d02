"""Learns to pick by deep deterministic policy gradients, as AMC (He et al. 2018, arXiv:1802.03494) and HAQ do.

An actor walks through the knobs in the order in which layers run: from a state of the layer and of what is spent so
far it says how much of the layer is left, a number in [0, 1]. A critic learns what whole walks score (HAQ: Wang et al.
2019, arXiv:1811.08886).

Differs from the papers: HAQ's actions are limited to what the knobs behind can still make up for, as AMC's are, because
an actor whose every excess is repaired learns to ask for the most everywhere; what is learned from are the picks that
were evaluated, not those that were proposed; values of knobs stand for AMC's continuous ratios; rewards are scaled by
the first walks, because a score may have any unit; with fewer evaluations than theirs the random walks at the start are
fewer and noise falls faster, in proportion.
"""

from __future__ import annotations

import copy
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.core.modules import get_module
from gs_algos.search.agent import Evaluated
from gs_algos.search.problem import Problem
from gs_algos.search.space import Picks

HIDDEN = 300
ACTOR_LR, CRITIC_LR = 1e-4, 1e-3
TAU = 0.01  # share by which the slow copies follow in an update
DISCOUNT = 1.0
BATCH = 64
BASELINE = 0.5  # weight of the newest batch in the mean reward
SIGMA = 0.5  # of the noise on actions after the random walks


@dataclass(frozen=True)
class Settings:
    """Holds what AMC and HAQ set differently.

    Args:
        random: walks at the start that are random.
        learned: walks after them.
        decay: of the noise, a walk.
        replay: steps that are remembered, a knob.
    """

    random: int
    learned: int
    decay: float
    replay: int


AMC = Settings(random=100, learned=700, decay=0.95, replay=100)
HAQ = Settings(random=20, learned=580, decay=0.99, replay=128)


@dataclass(frozen=True)
class Step:
    """Remembers one action. following: the state behind it; last: there is no action behind it."""

    state: Tensor
    action: float
    reward: float
    following: Tensor
    last: bool


class DDPG:
    """Proposes what its actor picks, with falling noise; with prune rates by the settings of AMC, else by HAQ's."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.settings = AMC if any(knob.kind == "rate" for knob in problem.knobs) else HAQ
        theirs = self.settings.random + self.settings.learned
        self.shorter = min(1.0, problem.evaluations / theirs)
        self.random = max(1, round(self.settings.random * self.shorter))
        self.decay = self.settings.decay ** (1 / self.shorter)
        self.layers = layer_features(problem)
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.choose = random.Random(problem.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(problem.seed)
            width = self.layers.shape[1] + 3
            self.actor, self.critic = Actor(width), Critic(width)
        self.slow_actor, self.slow_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), ACTOR_LR, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), CRITIC_LR, fused=True)
        self.memory: deque[Step] = deque(maxlen=self.settings.replay * len(problem.knobs))
        self.walks = 0
        self.mean_reward: float | None = None
        self.scale = 0.0  # largest loss of score in the random walks
        self.actions: list[list[float]] = []  # of the last proposals

    def propose(self) -> list[Picks]:
        count = max(1, self.random - self.walks)  # random walks do not depend on each other
        walks = [self._walk() for _ in range(count)]
        self.actions = [actions for actions, _ in walks]
        return [picks for _, picks in walks]

    def observe(self, found: Sequence[Evaluated]) -> None:
        if self.walks < self.random:
            self.scale = max([self.scale, *(abs(one.score - self.problem.baseline) for one in found)])
        for one, actions in zip(found, self.actions, strict=False):  # the driver may have evaluated fewer
            self._remember(one, actions)
            self.walks += 1
            if self.walks > self.random:
                for _ in self.problem.knobs:
                    self._update()

    @torch.no_grad()
    def _walk(self) -> tuple[list[float], Picks]:
        """Returns the actions of one walk, and the picks that they are."""
        sigma = SIGMA * self.decay ** max(0, self.walks - self.random)
        picks: Picks = ()
        actions: list[float] = []
        for knob in self.problem.knobs:
            if self.walks < self.random:
                action = float(torch.rand((), generator=self.generator))
            else:
                mean = float(self.actor(self._state(picks, actions)))
                action = truncated_normal(mean, sigma, self.generator)
            pick = self._walled(picks, pick_of(action, len(knob.values)))
            actions.append(action_of(action, pick, len(knob.values)))
            picks = (*picks, pick)
        return actions, picks

    def _walled(self, before: Picks, pick: int) -> int:
        """Returns the largest pick up to this one with which the knobs behind can still meet the budget."""
        behind = self.problem.least[len(before) + 1 :]
        return next((p for p in range(pick, 0, -1) if self.problem.fits((*before, p, *behind))), 0)

    def _state(self, before: Picks, actions: Sequence[float]) -> Tensor:
        """Returns the state in front of a knob: its layer, what is saved and what can be saved yet, the last action."""
        problem, place = self.problem, len(before)
        kind = problem.limits[0].kind
        highest, lowest = ((*before, *ends[place:]) for ends in (problem.most, problem.least))
        most, high, low = (problem.total(picks, kind) for picks in (problem.most, highest, lowest))
        own = torch.tensor([1 - high / most, (high - low) / most, actions[-1] if actions else 1.0])
        return torch.cat([self.layers[place], own])

    def _remember(self, one: Evaluated, proposed: Sequence[float]) -> None:
        """Puts the walk to the picks that were evaluated into the memory; each step gets the reward of the whole."""
        reward = (one.score - self.problem.baseline) / (self.scale or 1.0)
        actions = [
            action_of(action, pick, len(knob.values))
            for action, pick, knob in zip(proposed, one.picks, self.problem.knobs, strict=True)
        ]
        places = range(len(actions))
        states = [self._state(one.picks[:place], actions[:place]) for place in places]
        for place in places:
            last = place + 1 == len(actions)
            following = states[place] if last else states[place + 1]
            self.memory.append(Step(states[place], actions[place], reward, following, last))

    @torch.enable_grad()
    def _update(self) -> None:
        """Takes one step of the critic towards what walks scored, and of the actor towards what the critic prefers."""
        batch = self.choose.sample(self.memory, min(BATCH, len(self.memory)))
        states, following = torch.stack([s.state for s in batch]), torch.stack([s.following for s in batch])
        actions, rewards, goes_on = (
            torch.tensor(values).unsqueeze(1)
            for values in ([s.action for s in batch], [s.reward for s in batch], [float(not s.last) for s in batch])
        )
        mean = float(rewards.mean())
        before = mean if self.mean_reward is None else self.mean_reward
        self.mean_reward = before + BASELINE * (mean - before)
        with torch.no_grad():
            value = self.slow_critic(following, self.slow_actor(following))
            target = rewards - self.mean_reward + DISCOUNT * goes_on * value
        self.critic_optimizer.zero_grad()
        nn.functional.mse_loss(self.critic(states, actions), target).backward()
        self.critic_optimizer.step()
        self.actor_optimizer.zero_grad()
        (-self.critic(states, self.actor(states)).mean()).backward()
        self.actor_optimizer.step()
        with torch.no_grad():
            for slow, fast in ((self.slow_actor, self.actor), (self.slow_critic, self.critic)):
                for ours, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
                    ours.lerp_(theirs, TAU)


class Actor(nn.Module):
    """Gives an action in (0, 1), `[B, 1]`, for states `[B, F]`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, state: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(state))


class Critic(nn.Module):
    """Values actions `[B, 1]` in states `[B, F]`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.of_state, self.of_action = nn.Linear(features, HIDDEN), nn.Linear(1, HIDDEN)
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return self.layers(self.of_state(state) + self.of_action(action))


def pick_of(action: float, count: int) -> int:
    """Returns which of `count` values an action in [0, 1] is, each of them an equal part: `round(count a - 1/2)`."""
    return min(int(count * action), count - 1)


def action_of(action: float, pick: int, count: int) -> float:
    """Returns the action if it is this pick, else the middle of those that are."""
    return action if pick_of(action, count) == pick else (pick + 0.5) / count


def truncated_normal(mean: float, sigma: float, generator: torch.Generator) -> float:
    """Draws from the normal distribution around a mean, inside [0, 1], by the inverse of its distribution function."""
    low, high = (0.5 * (1 + math.erf((end - mean) / (sigma * math.sqrt(2)))) for end in (0.0, 1.0))
    u = low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator)
    drawn = mean + sigma * math.sqrt(2) * float(torch.erfinv(2 * u - 1))
    return min(max(drawn, 0.0), 1.0)


def layer_features(problem: Problem) -> Tensor:
    """Describes the layer of each knob, `[knobs, F]`, each feature from 0 to 1.

    Its place, outputs, inputs and window, groups, positions of an output, numbers of its weight; whether the knob is
    one of inputs.
    """
    rows = []
    for place, knob in enumerate(problem.knobs):
        layer: Any = get_module(problem.network, knob.site)
        shape, call = layer.weight.shape, problem.calls.get(knob.site)
        positions = 1 if call is None else call.positions
        sizes = (shape[0], shape[1], math.prod(shape[2:]), getattr(layer, "groups", 1), positions, layer.weight.numel())
        rows.append([float(place), *map(math.log, sizes), float(knob.kind == "act")])
    features = torch.tensor(rows)
    low, high = features.amin(0), features.amax(0)
    return (features - low) / torch.where(high > low, high - low, torch.ones(()))
