"""What a trial is ranked by: its score on val; with one configuration for several domains, what it gains on them."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Iterable, Mapping

from tuning.plan import WORDS, Plan
from wesam import Domain, Scores

JOINT = "joint"
"""What a search over several domains is called."""


def score(plan: Plan, now: Mapping[str, Scores], direct: Mapping[str, Scores]) -> float:
    """The score on val, by domain, as one number, higher is better.

    For a single domain it is the plan's objective; in a joint study the mean, or the least, of what the objective has
    gained over Direct on each domain.
    """
    if not plan.joint:
        (only,) = now.values()
        return only.value(plan.objective)
    gains = [s.value(plan.objective) - direct[d].value(plan.objective) for d, s in now.items()]
    return min(gains) if plan.joint == "worst" else statistics.mean(gains)


def word(plan: Plan, direct: Mapping[str, Scores]) -> str:
    """What :func:`score` is called."""
    named = " and ".join(dict.fromkeys(WORDS[s.name(plan.objective)] for s in direct.values()))
    return f"{JOINTLY[plan.joint]} in {named}" if plan.joint else named


JOINTLY = {"mean": "mean gain", "worst": "least gain"}


def metrics(now: Mapping[str, Scores]) -> dict[str, float]:
    """The scores as flat metrics: ``val_miou``, ...; of several domains their means, and each one's as
    ``val_miou.DOMAIN``.
    """
    parts = {d: {**s.known(), "collapsed": s.collapsed} for d, s in now.items()}
    shared = [k for k in next(iter(parts.values())) if all(k in p for p in parts.values())]
    found = {f"val_{k}": statistics.mean(p[k] for p in parts.values()) for k in shared}
    if len(parts) > 1:
        found |= {metric(f"val_{k}", d): v for d, p in parts.items() for k, v in p.items()}
    return found


def digest(domains: Iterable[Domain]) -> str:
    """Of the data of all these domains; a single one has its own."""
    digests = [d.digest for d in domains]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def metric(name: str, domain: str) -> str:
    """The name of a domain's own metric; MLflow allows no ``+`` in one."""
    return f"{name}." + re.sub(r"[^-.\w]", ".", domain)
