"""The members of every axis, a line each: all that is said of them outside their folders.

A line has where a member's class is, what it is in a few words, its settings with their types, defaults and
help, and what must be known of it without torch: fields, flags, TOML keys, help and the checks of a
configuration are made of lines. Taking a member imports its module. Everything else that is asked of a member
is an attribute of its class (`base.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from hizoo_lite.errors import UserError

if TYPE_CHECKING:
    from hizoo_lite.base import Curvature, Estimator, Objective, Optimizer, Space

Member = TypeVar("Member")


class Setting:
    """A setting of a member, which a configuration has as a field of that name.

    Attributes:
        kind: its type; choices are a Literal. "auto" in it leaves the value to the member, see `configured`.
        default: what it is if none is given.
        help: what it is, in a few words.
        argument: of the member's constructor, and its attribute; "" for the setting's own name.
        rules: minimum, above, maximum (numbers), size, pattern (texts), as `config.py` has them.
    """

    def __init__(self, kind: Any, default: Any, help: str, *, argument: str = "", **rules: Any) -> None:
        self.kind, self.default, self.help = kind, default, help
        self.argument, self.rules = argument, rules


@dataclass(frozen=True)
class Line:
    """What is known of a member before its module is imported.

    Attributes:
        path: its class; "module:class" if the module is not the one of the member's name in the folder.
        help: what it is, in a few words.
        settings: its own, by name.
        takes: settings that are written elsewhere, in `TrainConfig` or with another member of the axis.
        in_weights: of a space: it trains weights inside the blocks. Their scales are float32, steps have one
            direction, and a replay needs the model.
        of_scales: of a space: it has nothing to train if weights are not quantized.
        source: the paper that it is from, "" if it has none.
        holds: what it keeps in memory beside the model.
        pays: when it is the one to take, in a few words.
        structured: of a space: its z depend on each other from weight to weight, so that nothing can be
            learnt from their squares: Sigma is the identity.
    """

    path: str
    help: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    in_weights: bool = False
    of_scales: bool = False
    structured: bool = False
    source: str = ""
    holds: str = "nothing"
    pays: str = ""


class Registry(Mapping[str, type[Member]], Generic[Member]):
    """Classes by name, the default one first. `axis` is the field of `TrainConfig` that names one."""

    def __init__(self, axis: str, folder: str, **lines: Line) -> None:
        self.axis, self.folder, self.lines = axis, folder, lines

    @property
    def settings(self) -> dict[str, Setting]:
        """Those of all members, by name."""
        return {name: setting for line in self.lines.values() for name, setting in line.settings.items()}

    def arguments(self, name: str) -> dict[str, str]:
        """All settings of a member: from the argument of its constructor to the field of `TrainConfig`."""
        line, known = self.lines[name], self.settings
        called = {field: known[field].argument for field in (*line.settings, *line.takes) if field in known}
        return {called.get(field) or field: field for field in (*line.settings, *line.takes)}

    def __getitem__(self, name: str) -> type[Member]:
        module, _, attribute = self.lines[name].path.rpartition(":")
        return getattr(import_module(module or f"{self.folder}.{name}"), attribute)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.lines

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def make(self, name: str, **options: Any) -> Member:
        """The member called `name`, made with `options`. UserError for an unknown name or option."""
        if name not in self:
            raise UserError(f"--{self.axis}: unknown name {name!r}, allowed are {', '.join(sorted(self))}")
        make: Any = self[name]
        try:
            return make(**options)
        except TypeError as error:
            raise UserError(f"--{self.axis} {name}: {error}") from error

    def configured(self, config: Any, **options: Any) -> Member:
        """The member that a `TrainConfig` names, with its settings; "auto" leaves one to the member."""
        name = getattr(config, self.axis)
        member: Any = self[name]
        given = {argument: getattr(config, field) for argument, field in self.arguments(name).items()}
        left = member.left_open(config) if "auto" in given.values() and hasattr(member, "left_open") else {}
        return self.make(name, **left | {k: v for k, v in given.items() if v != "auto"} | options)

    def said_by(self, part: Member | None) -> dict[str, Any]:
        """What an object in place of a name says, by the fields of `TrainConfig`; None is nothing said."""
        if part is None:
            return {}
        name: str = part.name  # type: ignore[attr-defined]
        fields = self.arguments(name) if name in self else {}
        said = {field: getattr(part, argument) for argument, field in fields.items()}
        return {self.axis: name} | {field: value for field, value in said.items() if value is not None}

    def complete(self, part: Member, config: Any) -> Member:
        """The object; if it leaves something open (None), a copy that has what the configuration says."""
        name: str = part.name  # type: ignore[attr-defined]
        own = self.arguments(name).items() if name in self else ()
        left_open = {argument: setting for argument, setting in own if getattr(part, argument) is None}
        if left_open:
            part = copy.copy(part)
        for argument, setting in left_open.items():
            setattr(part, argument, getattr(config, setting))
        return part

    def having(self, field: str) -> list[str]:
        """The members that a setting is of."""
        return [name for name, line in self.lines.items() if field in (*line.settings, *line.takes)]


SPACES: Registry[Space] = Registry(
    "space",
    "hizoo_lite.spaces",
    lora=Line(
        "LoRA",
        "adapters",
        {
            "rank": Setting(int, 8, "rank of the adapters", minimum=1),
            "alpha": Setting(
                float | None, None, "adapters are scaled by alpha / rank; without it 2 * rank", above=0.0
            ),
            "rslora": Setting(bool, False, "scale by alpha / sqrt(rank) instead"),
            "train_a": Setting(
                bool,
                False,
                "train A as well as B if gradients are estimated; without it A keeps its random start",
            ),
        },
        takes=("targets", "blocks", "exact_blocks", "head"),
        source="arXiv 2106.09685",
        holds="4 bytes a trained value, and the noise of a step and of the next",
        pays="if the result is to be an adapter, and to begin with",
    ),
    dense=Line(
        "Dense",
        "the weights",
        {
            "dense_update": Setting(
                Literal["requantize", "residual"],
                "residual",
                "residual keeps a bf16 difference beside the codes, 2 bytes a weight; requantize rounds "
                "updated weights to their grid at random, without bias but with much noise in 4 bits",
                argument="update",
            )
        },
        takes=("targets", "blocks", "head"),
        in_weights=True,
        source="arXiv 2305.17333",
        holds="2 bytes a weight",
        pays="if all weights may change and there is room for their difference",
    ),
    lowrank=Line(
        "LowRank",
        "the weights, along directions of low rank (LOZO)",
        {
            "noise_rank": Setting(
                int | Literal["auto"],
                "auto",
                "rank of a direction; auto: 2 for lowrank, 24 for subspace",
                minimum=1,
            ),
            "noise_every": Setting(
                int | Literal["auto"],
                "auto",
                "steps after which their column space is drawn anew; auto: 50 for lowrank, 1000 for subspace",
                minimum=1,
            ),
            "momentum": Setting(
                float,
                0.0,
                "share of the moves before in a move; above 0 it is LOZO-M",
                minimum=0.0,
                maximum=0.999,
            ),
        },
        takes=("dense_update", "targets", "blocks", "head"),
        in_weights=True,
        structured=True,
        source="arXiv 2410.07698",
        holds="2 bytes a weight; with momentum 4 bytes times the rank a row",
        pays="as dense, if moves are to have a low rank",
    ),
    subspace=Line(
        "Subspace",
        "the weights, within a subspace of low rank (SubZero)",
        takes=("noise_rank", "noise_every", "dense_update", "targets", "blocks", "head"),
        in_weights=True,
        structured=True,
        source="arXiv 2410.08989",
        holds="2 bytes a weight and 4 bytes times the rank a row and column",
        pays="as dense, in 576 values a weight and window: less noise a step, less that can be reached",
    ),
    small=Line(
        "Small",
        "the weights that are small (Sparse-MeZO)",
        {
            "small_share": Setting(
                float,
                0.25,
                "how many of a layer's weights that is",
                argument="share",
                above=0.0,
                maximum=1.0,
            )
        },
        takes=("dense_update", "targets", "blocks", "head"),
        in_weights=True,
        structured=True,
        source="arXiv 2402.15751",
        holds="2 bytes a weight",
        pays="as dense, if large weights carry what must not be lost",
    ),
    sparse=Line(
        "Sparse",
        "a few sensitive weights, at places that are chosen once (SensZOQ)",
        {
            "sparse_share": Setting(
                float,
                0.001,
                "share of the weights of each layer that is trained; of mazo, of each row, at least one",
                argument="share",
                above=0.0,
                maximum=1.0,
            ),
            "sparse_by": Setting(
                Literal["gradients", "magnitude"],
                "gradients",
                "what they have the most of: squared gradients on the first examples, from one reverse pass "
                "before the first step, a block at a time; or size, for models that allow no reverse pass",
                argument="by",
            ),
        },
        source="arXiv 2406.02913",
        holds="8 bytes a trained value, and the noise of a step and of the next",
        pays="if all layers may change and nothing else; weights by themselves, in little room",
        takes=("targets", "blocks", "head"),
    ),
    mazo=Line(
        "MaZO",
        "of every row the few weights that matter most to all tasks of the run",
        {
            "mazo_greedy": Setting(
                float,
                1.0,
                "what the decrease of one step counts in the choice of weights, beside that of many",
                argument="greedy",
                minimum=0.0,
            ),
            "mazo_size": Setting(
                float, 1.0, "what the size of a weight counts in it", argument="size", minimum=0.0
            ),
        },
        source="arXiv 2502.11513",
        holds="8 bytes a trained value, and the noise of a step and of the next",
        pays="as sparse, if a run has several tasks that are not to cost each other",
        takes=("sparse_share", "targets", "blocks", "head"),
    ),
    scales=Line(
        "Scales",
        "only their absmax (QZO)",
        takes=("targets", "blocks", "head"),
        in_weights=True,
        of_scales=True,
        source="arXiv 2505.13430",
        holds="nothing",
        pays="if there is no room beside the quantized weights",
    ),
)

ESTIMATORS: Registry[Estimator] = Registry(
    "estimator",
    "hizoo_lite.estimators",
    hizoo=Line(
        "HiZOO",
        "slope and curvature",
        {
            "curvature_from": Setting(
                Literal["predictions", "losses"],
                "predictions",
                "how far apart the predictions of two points are; or the second difference of losses, as "
                "published",
            ),
            "directions": Setting(
                int | Literal["auto"],
                "auto",
                "random directions a step; hizoo: 1 is a pair of points, 2 forwards (3 with curvature from "
                "losses), n above 1 share one base, 1 + n forwards, auto: 2 for adapters, 1 for weights; "
                "mezo, kerzoo, dp: a pair each, 2 n forwards, auto: 1; fzoo: 1 + n forwards, auto: 8",
                minimum=1,
                maximum=254,  # with the base 255 points, `journal.MOST_BRANCHES`
            ),
            "curvature_every": Setting(
                int,
                1,
                "of losses: steps between two measurements, 2 + 1/k forwards a step",
                argument="every",
                minimum=1,
            ),
        },
        source="arXiv 2402.15173",
        pays="to begin with: its learning rate needs no grid",
    ),
    mezo=Line(
        "MeZO",
        "the slope alone",
        takes=("directions",),
        source="arXiv 2305.17333",
        pays="as what others are compared with; needs a learning rate from a grid",
    ),
    kerzoo=Line(
        "KerZOO",
        "slopes at random radii, weighted by a kernel",
        takes=("directions",),
        source="arXiv 2505.18886",
        pays="if mu is large, as in half precision: its bias falls with mu^4",
    ),
    fzoo=Line(
        "FZOO",
        "one-sided slopes along signs, by the deviation of their losses",
        takes=("directions",),
        source="arXiv 2506.09034",
        pays="if a block is dear to fetch: several directions share it, and steps have one length",
    ),
    grzo=Line(
        "GRZO",
        "advantages of groups of examples, each along a direction of its own",
        {
            "groups": Setting(
                int,
                4,
                "into how many groups a batch is divided, which go through the blocks by turns",
                minimum=2,
                maximum=127,  # each a pair, see `journal.MOST_BRANCHES`
            )
        },
        source="arXiv 2606.02857",
        pays="if examples agree more than directions do; blocks come once for each group",
    ),
    dp=Line(
        "DP",
        "the slope alone, with differential privacy",
        {
            "dp_clip": Setting(
                float,
                1e-3,
                "largest size of what one example adds to a step: its differences between the losses of two "
                "points, together over the directions",
                argument="clip",
                above=0.0,
            ),
            "dp_noise": Setting(
                float,
                1.0,
                "noise of a step's sums, in units of --dp-clip: its standard deviation, of laplace its scale",
                argument="noise",
                minimum=0.1,  # with less epsilon is beyond any meaning, and takes long to find
            ),
            "dp_mechanism": Setting(
                Literal["gaussian", "laplace"],
                "gaussian",
                "distribution of the noise; laplace is for one direction",
                argument="mechanism",
            ),
            "dp_delta": Setting(
                float,
                1e-5,
                "delta that epsilon is told at; below one over the training examples",
                argument="delta",
                above=0.0,
                maximum=0.5,
            ),
            "dp_epsilon": Setting(
                float | None,
                None,
                "budget: the run ends, saved, before the step that would take more",
                argument="epsilon",
                above=0.0,
            ),
        },
        takes=("directions",),
        source="arXiv 2401.04343",
        pays="if what is learnt of one example must be bounded, and told",
    ),
)

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    "hizoo_lite.objectives",
    loss=Line("Loss", "the task's own"),
    accuracy=Line("Accuracy", "whether the gold answer or class scores highest, of tasks with choices"),
    f1=Line("F1", "of the greedy answer, of tasks that write: a generation for each point"),
)

CURVATURES: Registry[Curvature] = Registry(
    "curvature",
    "hizoo_lite.curvature",
    grouped=Line(
        "Grouped",
        "a value for each tensor or row",
        {
            "curvature_per": Setting(
                Literal["tensor", "row"], "tensor", "one value for each tensor or row", argument="per"
            )
        },
        holds="8 bytes a tensor or row",
        pays="to begin with: what is learnt of one value is learnt of all",
    ),
    factored=Line(
        "Factored",
        "one for each row and column (HiZOO-L)",
        source="arXiv 2402.15173",
        holds="8 bytes a row and column",
        pays="in long runs, if rows differ more than tensors do",
    ),
    diagonal=Line(
        "Diagonal",
        "one for each parameter, as published",
        {
            "curvature_mode": Setting(
                Literal["paper", "reference"],
                "paper",
                "the paper's formula, or that of the published code",
                argument="mode",
            )
        },
        source="arXiv 2402.15173",
        holds="4 bytes a value",
        pays="as what was published",
    ),
    none=Line("NoCurvature", "Sigma is the identity", pays="with few blocks, whose curvatures are alike"),
)

OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer", "hizoo_lite.optimizers", sgd=Line("SGD", "moves along the gradient")
)
