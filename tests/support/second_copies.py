"""Optimizers that keep a second copy of the weights, as their papers define them, under the names that packages use."""

from collections import OrderedDict, defaultdict

import torch
from torch.optim import Optimizer


class ScheduleFree(Optimizer):
    """Schedule-free SGD and RMSprop (arXiv 2405.15682): gradients at y = (1 − β) z + β x, x the average of z.

    The parameters are y while it trains and x between `eval()` and `train()`. With `explicit`, x and y are in the state
    as well, and the parameters are copies of them.
    """

    def __init__(self, parameters, lr, beta=0.9, explicit=False, squares=0.0):
        super().__init__(parameters, dict(lr=lr, beta=beta, weight_sum=0.0))
        self.explicit, self.squares, self.step_count = explicit, squares, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.step_count += 1
        for group in self.param_groups:
            lr, beta = group["lr"], group["beta"]
            group["weight_sum"] += lr**2
            average = lr**2 / group["weight_sum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"] = p.clone()
                    if self.explicit:
                        state["x"], state["y"] = p.clone(), p.clone()
                    state["exp_avg_sq"] = torch.zeros_like(p)
                g = p.grad
                if self.squares:
                    state["exp_avg_sq"].mul_(self.squares).addcmul_(g, g, value=1 - self.squares)
                    g = g / ((state["exp_avg_sq"] / (1 - self.squares**self.step_count)).sqrt() + 1e-8)
                if self.explicit:
                    x, y, z = (state[name] for name in "xyz")
                    z.sub_(g, alpha=lr)
                    x.lerp_(z, average)
                    p.copy_(y.copy_(x).lerp_(z, 1 - beta))
                else:
                    p.lerp_(state["z"], average).sub_(g, alpha=lr * (1 - beta * (1 - average)))
                    state["z"].sub_(g, alpha=lr)

    def average_of(self, p):
        """x, in place of which `eval()` of the packages computes it in the parameters."""
        return p.lerp(self.state[p]["z"], 1 - 1 / self.param_groups[0]["beta"]) if p in self.state else p


class Lookahead(Optimizer):
    """Lookahead (arXiv 1907.08610): each k steps slow ← slow + α (fast − slow), fast ← slow.

    As the packages do, it leaves out `Optimizer.__init__`. `name`, and whether the inner optimizer's state has it.
    `hooks`: whether its own steps run hooks.
    """

    def __init__(self, optimizer, k=3, alpha=0.5, name="slow_param", inner=False, hooks=False):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.optimizer, self.k, self.alpha, self.name, self.count = optimizer, k, alpha, name, 0
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state = optimizer.state if inner else defaultdict(dict)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p][name] = p.detach().clone()
        if hooks:
            self._patch_step_function()

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    p.copy_(self.state[p][self.name].lerp_(p, self.alpha))


class HookedLookahead(Lookahead):
    """Its steps run hooks: torch patches a class once for all."""


class Masters(torch.optim.SGD):
    """SGD on wider copies of the parameters, which are written over them: in the state under `name`; else `place`."""

    def __init__(self, parameters, lr, name=None, place=None, dtype=torch.float64):
        super().__init__(parameters, lr)
        own = [p for group in self.param_groups for p in group["params"]]
        wide = [p.detach().to(dtype, copy=True) for p in own]
        if place == "dict":
            self.wide = dict(zip(own, wide, strict=True))
        elif place == "by id":
            self.wide = {id(p): w for p, w in zip(own, wide, strict=True)}
        elif place == "list":
            self.wide = wide
        elif place == "apex":
            wider = iter(wide)
            self.param_groups_master = [{"params": [next(wider) for _ in g["params"]]} for g in self.param_groups]
        else:
            for p, w in zip(own, wide, strict=True):
                self.state[p][name] = w
        self._pairs = lambda: zip(own, wide, strict=True)

    @torch.no_grad()
    def step(self, closure=None):
        for p, wide in self._pairs():
            if p.grad is not None:
                wide.sub_(p.grad.to(wide.dtype), alpha=self.param_groups[0]["lr"])
                p.copy_(wide)


class MadGrad(Optimizer):
    """MADGRAD (arXiv 2101.11075) with momentum: z = x0 − s / ∛v, x ← (1 − c) x + c z."""

    def __init__(self, parameters, lr, momentum=0.5):
        super().__init__(parameters, dict(lr=lr, c=1 - momentum))
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            step = group["lr"] * self.count**0.5
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= dict(x0=p.clone(), s=torch.zeros_like(p), grad_sum_sq=torch.zeros_like(p))
                state["s"].add_(p.grad, alpha=step)
                state["grad_sum_sq"].addcmul_(p.grad, p.grad, value=step)
                z = state["x0"] - state["s"] / (state["grad_sum_sq"].pow(1 / 3) + 1e-6)
                p.lerp_(z, group["c"])
