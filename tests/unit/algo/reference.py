"""The objective, slow and obviously right: a Python loop over trajectories, the textbook formulas, 200 bisections, float64."""

import math

import torch

FLAT = 2.5e-13


def clip_bounds(config):
    """(low, high) in log space; the clamp where there is none."""
    low = high = 20.0
    if config.eps_low_log is not None:
        low = config.eps_low_log
    if config.eps_low_ratio is not None:
        low = -math.log(1 - config.eps_low_ratio)
    if config.eps_high_log is not None:
        high = config.eps_high_log
    if config.eps_high_ratio is not None:
        high = math.log(1 + config.eps_high_ratio)
    return -low, high


def clip_tokens(r, log_probs, old, A, config):
    """(log-ratios whose gradient is that of their mean, clip fraction)."""
    low, high = clip_bounds(config)
    if config.clip == "weight":  # the value is clipped, the gradient flows as if it were not
        return r + (r.clamp(low, high) - r).detach(), float(((r < low) | (r > high)).double().mean())
    if A == 0 or config.clip_level == "sequence":
        return r, 0.0
    if config.clip == "divergence":  # the value stays, the gradient does not
        low, high = (config.clip_parameters.get(name, 0.2) for name in ("low", "high"))
        rise = log_probs.double().exp() - old.double().exp()
        masked = rise > high if A > 0 else rise < -low
        return torch.where(masked, r.detach(), r), float(masked.double().mean())
    return (
        (torch.clamp(r, max=high), float((r > high).double().mean()))
        if A > 0
        else (torch.clamp(r, min=low), float((r < low).double().mean()))
    )


def log_power_mean(x, p):
    if p == 0:
        return x.mean()
    if abs(p) < 1e-5:
        return x.mean() + p * x.var(correction=0) / 2
    excess = torch.expm1(p * x).mean()
    if excess < -0.5:  # so near -1 that the mean's own digits are lost in it
        return (torch.logsumexp(p * x, 0) - math.log(len(x))) / p
    return torch.log1p(excess) / p


def ess_fraction(x, p):
    w = torch.softmax(p * x, 0)
    return 1 / (w * w).sum() / len(x)


def bisect(x, target, low=0.0, high=1.0):
    for _ in range(200):
        middle = (low + high) / 2
        if ess_fraction(x, middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def choose_p(x, f, config, progress):
    flat = x.var(correction=0) <= FLAT + 1e-14 * (x * x).mean()
    if config.rule == "fixed":
        return config.p, None
    if config.rule == "schedule":
        return config.p_start + (config.p_end - config.p_start) * progress, None
    low = 0.0 if config.p_min is None else config.p_min
    if config.rule == "linear":
        high, reference = (1.0 if value is None else value for value in (config.p_max, config.clip_reference))
        return high - (high - low) * min(1.0, f / reference), None
    n1 = float(ess_fraction(x, 1.0))
    if config.rule == "ess_relative":
        target = n1 + (1 - n1) * f
        p = 1.0 if flat or f == 0 else 0.0 if f == 1 else bisect(x, target)
        return p, target
    keep = 0.998 if config.ess_target is None else config.ess_target
    target = keep + (1 - keep) * min(1.0, f / (0.02 if config.clip_reference is None else config.clip_reference))
    if flat or n1 >= target:
        return 1.0, target
    met_by_none = target >= 1 or ess_fraction(x, low) <= target  # n(p) = 1 at p = 0 alone, but for rounding
    return (low if met_by_none else bisect(x, target, low)), target


def reference_objective(log_probs, old, trajectory, advantages, weights, config, progress=0.0):
    """(loss with gradient, list of per-trajectory dicts)."""
    loss = torch.zeros((), dtype=torch.float64)
    low, high = clip_bounds(config)
    rows = []
    for i in range(len(advantages)):
        chosen = trajectory == i
        if not chosen.any():
            rows.append(dict(p=1.0, n=0.0, target=0.0, f=0.0, T=0, M=1.0))
            continue
        A, c = float(advantages[i]), float(weights[i])
        r = (log_probs[chosen].double() - old[chosen].double()).clamp(-20, 20)
        x, f = clip_tokens(r, log_probs[chosen], old[chosen], A, config)
        p, target = choose_p(x.detach(), f, config, progress)
        M = torch.exp(log_power_mean(x, p))
        term = M * A
        if config.clip_level == "sequence":
            bounded = M.clamp(math.exp(low), math.exp(high)) * A
            f = float(A != 0 and bounded.item() < term.item())
            term = torch.minimum(term, bounded)
        loss = loss - c * term
        n = float(ess_fraction(x.detach(), p))
        rows.append(dict(p=p, n=n, target=n if target is None else target, f=f, T=len(r), M=float(M.detach())))
    return loss, rows
