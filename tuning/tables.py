"""The paper's tables as data: which rows and columns each has, and what is trained for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from tuning.plan import STUDY_KEYS, checked_name, evaluated_in_time, found_model, load_domains, shared
from tuning.space import Space, make_space
from wesam.adapt import checked
from wesam.config import Config, PromptKind, Value
from wesam.data import Domain, load_domain, located
from wesam.drawings import DRAWINGS, Drawing, drawable
from wesam.errors import InputError, one_of
from wesam.methods import METHODS, check_read, get_method, method_preset

Kind = Literal["methods", "losses", "cross", "modules", "long"]

TITLES = {
    "tent": "TENT", "shot": "SHOT", "soft-teacher": "Soft Teacher", "tribe": "TRIBE", "dept": "DePT", "wdass": "WDASS",
    "wesam": "WeSAM", "wesam+": "WeSAM+", "supervised": "Supervised",
}  # fmt: skip
"""Of methods whose name is not written as it is."""

LOSSES: dict[str, tuple[str, dict[str, Value]]] = {
    "self": ("self-training alone", {"loss.anchor": 0.0, "loss.contrastive": 0.0}),
    "self-anchor": ("+ anchor", {"loss.contrastive": 0.0}),
    "self-contrastive": ("+ contrastive", {"loss.anchor": 0.0}),
    "all": ("all three", {}),
}

MODULES: list[dict[str, Value]] = [
    {"train": "decoder"},
    {"train": "norms"},
    {"train": "encoder"},
    {"lora.targets": "qv"},
    {"lora.targets": "qkv"},
    {"lora.targets": "encoder"},
    {"train": "lora+norms"},
    {"train": "lora+decoder"},
]
"""What is trained, as changes to the method's configuration."""

LONGER = 10
"""So many times the steps has the table ``long``."""

FREE, ON_VAL = "nothing", "val"
"""What a cell was chosen on: one that nothing is trained for was not chosen at all."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: a method with changes to its configuration, or what nothing is trained for."""

    key: str
    """Its name in MLflow."""
    title: str
    prompts: tuple[PromptKind, ...]
    """The kinds of weak labels that it is trained with or, where nothing is trained, scored with."""
    method: str = ""
    """What trains; empty where nothing is trained."""
    drawing: Drawing | None = None
    """What is drawn; of a row that nothing is trained for and that draws nothing, the model as it is: Direct."""
    changes: Mapping[str, Value] = field(default_factory=dict)

    @property
    def needs_masks(self) -> bool:
        """Whether it learns from true masks, and so is no method for weak labels."""
        return bool(self.method) and get_method(self.method).needs_masks


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: a metric of the runs of a row."""

    title: str
    metric: str
    """Of the runs of a row that is trained."""
    free: str = ""
    """The same of the others; empty where they have none."""
    prompt: PromptKind | None = None
    """Of the runs; None: the one that the row has alone."""
    unit: Literal["score", "count", "GiB", "seconds"] = "score"

    def of(self, row: Row) -> tuple[PromptKind | None, str]:
        """The kind of prompt, and the metric, of a row's runs; None or "" where it has none."""
        prompt = self.prompt or row.prompts[0]
        return prompt if prompt in row.prompts else None, self.metric if row.method else self.free


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table: its kind, its data, and the budget that all its rows share."""

    kind: Kind
    name: str
    """Of the table in MLflow."""
    domains: tuple[str, ...]
    """As given, but found from any working directory."""
    model: str
    prompts: tuple[PromptKind, ...]
    methods: tuple[str, ...]
    seeds: int
    trials: int
    """Of the search before, for each row on each domain with each kind of prompt; 1: its defaults are taken."""
    base: Config
    """Steps, batch, crop, ...: of each row's configuration the fields in :data:`tuning.plan.SHARED`."""
    fixed: tuple[str, ...] = ()
    """Texts ``path.to.field=value`` that hold for every row."""

    def __post_init__(self) -> None:
        checked_name(self.name, "--name")

    @property
    def steps(self) -> int:
        """Of each training."""
        return self.base.steps * (LONGER if self.kind == "long" else 1)

    def config(self, row: Row, prompt: PromptKind) -> Config:
        """A row's configuration before any search, with the seed of its search."""
        config = method_preset(self.model, row.method or "wesam")
        config = config.replace({**shared(self.base), "steps": self.steps, "prompt": prompt})
        return config.parse(list(self.fixed)).replace(row.changes)

    def space(self, row: Row, prompt: PromptKind) -> Space:
        """What is searched for a row: what its method reads in the default space, but for what is given."""
        config = self.config(row, prompt)
        given = {*row.changes, *(text.partition("=")[0] for text in self.fixed)}
        return {
            path: axis
            for path, axis in make_space({}, config)[0].items()
            if path not in given and ("lora" in config.train or not path.startswith("lora."))
        }


@dataclass(frozen=True, kw_only=True)
class Group:
    """A row on a domain with a kind of prompt: the runs of one configuration, or of one search."""

    row: Row
    given: str
    """The domain, as given."""
    domain: str
    """Its name."""
    prompt: PromptKind
    config: Config
    tests: tuple[PromptKind, ...]
    """What test is prompted with."""
    after: tuple[int, ...]
    """Steps after which the model meets test as it then is."""
    cost: bool
    """Whether the memory of a step is wanted."""

    @property
    def key(self) -> tuple[str, str, str]:
        """By which its runs are known."""
        return self.row.key, self.domain, self.prompt

    @property
    def name(self) -> str:
        """``ROW-DOMAIN-PROMPT``."""
        return "-".join(self.key)


def title_of(method: str) -> str:
    """What a method is called."""
    return TITLES.get(method, method)


def rows(plan: Plan) -> list[Row]:
    """The rows of a table, in order."""
    direct = Row(key="direct", title="Direct", prompts=plan.prompts)
    method = plan.methods[0]
    if plan.kind == "methods":
        drawn = [
            Row(key=f"drawn-{kind}", title=title, drawing=kind, prompts=can)
            for kind, title in DRAWINGS.items()
            if (can := tuple(p for p in plan.prompts if drawable(kind, p)))
        ]
        return [*drawn, direct, *(Row(key=m, title=title_of(m), method=m, prompts=plan.prompts) for m in plan.methods)]
    if plan.kind == "losses":
        prompts: tuple[PromptKind, ...] = (*plan.prompts, "grid")
        losses = [
            Row(key=key, title=title, method=method, changes=changes, prompts=prompts)
            for key, (title, changes) in LOSSES.items()
        ]
        return [Row(key="direct", title="Direct", prompts=prompts), *losses]
    if plan.kind == "cross":
        return [
            Row(key="direct", title="Direct", prompts=plan.prompts[:1]),
            *(Row(key=f"{method}-{p}", title=f"trained with {p}", method=method, prompts=(p,)) for p in plan.prompts),
        ]
    if plan.kind == "modules":
        said = [(", ".join(f"{k} = {v}" for k, v in changes.items()), changes) for changes in MODULES]
        return [direct, *(Row(key=_word(t), title=t, method=method, changes=c, prompts=plan.prompts) for t, c in said)]
    ends: dict[str, dict[str, Value]] = {"with": {}, "without": {"loss.anchor": 0.0}}
    return [
        direct,
        *(
            Row(key=f"{k}-anchor", title=f"{k} the anchor loss", method=method, changes=c, prompts=plan.prompts)
            for k, c in ends.items()
        ),
    ]


def columns(plan: Plan) -> list[Column]:
    """The columns of a table, which it has for each domain."""
    if plan.kind == "cross":
        return [Column(title=f"{p} at test", metric=(m := f"test_miou.{p}"), free=m) for p in plan.prompts]
    kinds: tuple[PromptKind, ...] = (*plan.prompts, "grid") if plan.kind == "losses" else plan.prompts
    out = []
    for prompt in kinds:
        test = f"test_miou.{scored(plan, prompt)}"
        if plan.kind == "long":
            ends = {"best on val": test, **{f"after {n} steps": f"test_miou.after_{n}" for n in _ends(plan)}}
            out += [Column(title=f"{prompt}, {t}", metric=m, free=test, prompt=prompt) for t, m in ends.items()]
        else:
            out.append(Column(title=prompt, metric=test, free=test, prompt=prompt))
    if plan.kind == "modules":
        first = plan.prompts[0]
        out += [
            Column(title="trained parameters", metric="parameters", prompt=first, unit="count"),
            Column(title="memory of a step (GiB)", metric="peak_gib", prompt=first, unit="GiB"),
            Column(title="seconds per step", metric="seconds_per_step", prompt=first, unit="seconds"),
        ]
    return out


def scored(plan: Plan, prompt: PromptKind) -> PromptKind:
    """What val is prompted with, and test where nothing else is said, for a row that trains with this kind."""
    return plan.base.replace({"prompt": prompt}).scored_with


def _ends(plan: Plan) -> tuple[int, ...]:
    return (plan.base.steps, plan.steps) if plan.kind == "long" else ()


def groups(plan: Plan) -> list[Group]:
    """All that is to be trained or scored for a table."""
    return [
        Group(
            row=row, given=given, domain=load_domain(given).name, prompt=prompt, config=plan.config(row, prompt),
            tests=plan.prompts if plan.kind == "cross" else (scored(plan, prompt),),
            after=_ends(plan) if row.method else (),
            cost=plan.kind == "modules" and bool(row.method) and prompt == plan.prompts[0],
        )
        for given in plan.domains
        for prompt in dict.fromkeys(p for row in rows(plan) for p in row.prompts)
        for row in rows(plan)
        if prompt in row.prompts
    ]  # fmt: skip


def make_plan(
    kind: str, domains: Iterable[str], *, name: str | None = None, model: str = "nano",
    prompts: Sequence[str] = ("box", "point", "coarse"), methods: Sequence[str] | None = None, seeds: int = 3,
    trials: int = 1, steps: int | None = None, crop: float | None = None, data: str = "",
    fixed: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """The table of this kind, checked; raises InputError for whatever cannot be run."""
    one_of("table", kind, get_args(Kind))
    model = found_model(model)
    for option, number in (("--seeds", seeds), ("--trials", trials)):
        if number < 1:
            raise InputError(f"{option} must be at least 1, got {number}")
    kinds = tuple(dict.fromkeys(one_of("prompt", p, get_args(PromptKind)) for p in prompts))
    if "grid" in kinds:
        raise InputError("--prompts: a grid is no label that a person gives; the table losses has it by itself")
    chosen = _methods(kind, methods)
    for text in fixed:
        if (path := text.partition("=")[0]) in (*STUDY_KEYS, "method", "steps"):
            raise InputError(f"--set {text}: {path} is an option of its own, or what the rows differ in")
    given = {k: v for k, v in (("steps", steps), ("crop", crop)) if v is not None}
    base = method_preset(model, "wesam").replace(given)
    if steps and not any(t.startswith("eval_every=") for t in fixed):
        base = evaluated_in_time(base)
    places = tuple(located(str(d), data) for d in domains)
    plan = Plan(
        kind=kind, name=name or f"table-{kind}", domains=places, model=model, prompts=kinds, methods=chosen,  # type: ignore[arg-type]
        seeds=seeds, trials=trials, base=base.parse(list(fixed)), fixed=tuple(fixed),
    )  # fmt: skip
    _check(plan, load_domains(places))
    return plan


def _methods(kind: str, given: Sequence[str] | None) -> tuple[str, ...]:
    known = tuple(dict.fromkeys(one_of("method", m, METHODS) for m in given or ()))
    if kind == "methods":
        return known or tuple(METHODS)
    if len(known) > 1 or (kind in ("losses", "long") and known not in ((), ("wesam",))):
        which = "wesam" if kind in ("losses", "long") else "one method"
        raise InputError(f"--methods: the table {kind} is of {which} alone")
    return known or ("wesam",)


def _check(plan: Plan, domains: Sequence[Domain]) -> None:
    check_read(plan.base, [row.method for row in rows(plan) if row.method])
    for row in rows(plan):
        for path in row.changes:
            if any(text.partition("=")[0] == path for text in plan.fixed):
                raise InputError(f"--set {path}: the rows of the table {plan.kind} differ in it")
        for prompt in row.prompts:
            config = plan.config(row, prompt)
            if row.method and plan.trials > 1 and not plan.space(row, prompt):
                raise InputError(f"--trials {plan.trials}: nothing is left to search for the row {row.title!r}")
            for domain in domains if row.method else ():
                checked(domain, config)
    for domain in domains:
        for split in ("train", "val", "test"):
            if (split != "train" or any(r.needs_masks for r in rows(plan))) and not domain.split(split)[0].has_masks:
                raise InputError(f"{domain.name} has no masks on {split}: a table is of mIoU")


def _word(text: str) -> str:
    """A text as part of a run's name."""
    return text.replace(" = ", "-").replace(", ", "-")
