"""LoRA (Hu et al., 2106.09685) with PEFT semantics, plus fully trainable classification heads.

A branch uses B + k*mu*dB, with k its point's offset, in float32 beside the shared base product; the adapter
products are batched over the branches. Saved in PEFT's own format, under PEFT's own names.

A classifier's head, or rows of a language model's head for the tokens of the answers, are trained beside
them (`heads.py`): those rows are an adapter of the head like any other in the saved file, with A the rows and
B their places, divided by the scaling.

A stays at its random start (as in LoRA-FA, 2308.03303) unless `train_a`. With B alone trained the adapter is
linear in its parameters, and the curvature along them keeps its size. Trained together, A grows with B and
the curvature with both: on SmolLM2 from 0.15 to 7 400 in 200 steps at a rate that suits B alone. Adapters
with exact gradients train both.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor

from hizoo_lite.arrays import Shape
from hizoo_lite.base import LinearDelta, Space
from hizoo_lite.branches import BranchState
from hizoo_lite.checkpoints.adapter import (
    PEFT_FILE,
    PEFT_METADATA,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    check_fits,
    check_heads,
    check_supported,
    peft_weights,
    read_peft_config,
)
from hizoo_lite.checkpoints.tensors import TensorFile, load_tensors, save_tensors
from hizoo_lite.engine.head import head_of
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model
from hizoo_lite.noise import generator
from hizoo_lite.spaces.changes import LoRAChanges
from hizoo_lite.spaces.heads import (
    HeadMode,
    attach_head,
    beside_heads,
    branch_values,
    check_mode,
    saved_modules,
)
from hizoo_lite.spaces.targets import Blocks, in_top, release, resolve_targets, restore

_log = logging.getLogger(__name__)

#: How far the products of all exact adapters together may move in the first step, in nats of a logit
#: (`optimizers/exact.py`): so far for each block that the model has, and so far at most. With less SNLI on
#: SmolLM2 learns little in a hundred steps; SST-2 likes half of it, a little (tools/LOG.md).
A_BLOCK, TOGETHER = 0.0075, 0.225
#: How far a logit may then move by a classifier's head, in nats. A whole nat, as beside estimates, makes the
#: head so sure of its examples that the loss on others is a third higher (tools/LOG.md).
HEAD_STEP = 0.1
_TASK_TYPE = {"causal": "CAUSAL_LM", "masked": None, "classifier": "SEQ_CLS"}


class LoRADelta(LinearDelta):
    """y_k += scaling * x_k A_k' B_k'; A: (rank, in_features), B: (out_features, rank), float32.

    names: of A and of B, None if it is the same in all branches. exact: their names if their inputs
    say how fast they move, and step how far B's product may then move, in nats of a logit.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        names: tuple[str | None, str | None],
        scaling: float,
        exact: tuple[str, str] = ("", ""),
        step: float = 1.0,
    ) -> None:
        self.a, self.b, self.names, self.scaling = a, b, names, scaling
        self.exact, self.step = exact, step

    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        assert y is not None
        if self.names[0] is None:
            inner = x @ self.a.t()
            if self.exact[0] and inner.requires_grad:
                inner.register_hook(partial(state.reached, self.exact[0], x.detach()))
        else:
            a = _values(self.a, self.names[0], state)
            inner = torch.bmm(x, a.transpose(1, 2))
        b = _values(self.b, self.names[1], state)
        out = y.baddbmm_(inner, b.transpose(1, 2), alpha=self.scaling)
        if self.exact[1] and out.requires_grad:
            reach = inner.detach() * (self.scaling / self.step)
            out.register_hook(partial(state.reached, self.exact[1], reach))
        return out


def _values(value: Tensor, name: str | None, state: BranchState) -> Tensor:
    """The parameter at every branch, made once for all chunks of a block."""
    if name is None:
        return branch_values(value, name, state)
    return state.once(name, lambda: branch_values(value, name, state))


class LoRA(Space):
    """Low-rank adapters on chosen linear layers of the blocks (LoRA, arXiv 2106.09685), as PEFT has them.

    y = W x + scaling B A x with A (rank, in_features) and B (out_features, rank), float32; B begins at zero.
    Only B is trained unless `train_a` (as LoRA-FA, arXiv 2308.03303): trained together, both grow and the
    curvature with them.

    Example:
        >>> LoRA(rank=8, alpha=32).scaling
        4.0
        >>> LoRA(rank=4, targets=["q_proj", "v_proj"], blocks="all").targets
        ['q_proj', 'v_proj']
    """

    name = "lora"
    changes = LoRAChanges
    weights = None  # nothing inside the blocks is changed

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        targets: str | Sequence[str] = "attention",
        rslora: bool = False,
        head: HeadMode | None = None,
        train_a: bool = False,
        blocks: Blocks = "auto",
        exact_blocks: int | Literal["all"] = 0,
    ) -> None:
        """Nothing is made before `attach`.

        Args:
            rank: of the adapters, 1 or more.
            alpha: scaling is alpha / rank; None: 2 * rank.
            targets: "attention" (PEFT's default layers for the architecture: query and value), "all-linear",
                or names of linear layers (full, or the last part, such as "q_proj").
            rslora: scaling is alpha / sqrt(rank).
            head: "exact", "estimated" or "none": how a classifier's head is trained; "exact" also adds rows
                to a language model's head for the tokens of label words, except beside `exact_blocks`. None:
                as the run's settings say, "estimated" without any.
            train_a: train A as well as B; with exact gradients both always are.
            blocks: how many blocks have adapters, from the top, or "all"; "auto": as many as `exact_blocks`,
                a third without those.
            exact_blocks: in how many blocks, from the top, the adapters have exact gradients, or "all".

        Raises:
            UserError: if rank or head is not one of these.
        """
        if rank < 1:
            raise UserError(f"--rank: got {rank}, allowed is a whole number of 1 or more")
        self.rank, self.rslora, self.head, self.train_a = rank, rslora, check_mode(head), train_a
        self.alpha = float(2 * rank if alpha is None else alpha)
        self.targets, self.exact_blocks = targets, exact_blocks
        self.blocks: Blocks = exact_blocks if blocks == "auto" and exact_blocks else blocks
        self.parameters: dict[str, Tensor] = {}
        self.exact: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self.label_layer: str | None = None

    @classmethod
    def of_adapter(cls, folder: Path, model: Model, train_a: bool = False) -> LoRA:
        """The space that an adapter of PEFT fits, not yet attached.

        Args:
            folder: with PEFT's two files.
            model: that it is to be attached to.
            train_a: train A as well as B.

        Raises:
            UserError: if the model lacks the adapter's layers, or its form is not supported.
        """
        config, path = read_peft_config(folder), peft_weights(folder)
        # The file says which layers, not `target_modules`: a pattern may have exceptions (`exclude_modules`).
        entries = {name.removeprefix(PEFT_PREFIX): entry for name, entry in TensorFile(path).entries.items()}
        names = list(entries)
        layers = list(dict.fromkeys(name.partition(".lora_")[0] for name in names if ".lora_" in name))
        heads = [name for name in names if ".lora_" not in name]
        check_heads(path, heads, model.kind, model.trunk_name)
        head = head_of(model.linears, model.trunk_name, model.config.vocab_size)
        of_labels = head is not None and head.name in layers
        layers = [layer for layer in layers if head is None or layer != head.name]
        unknown = [layer for layer in layers if layer not in model.linears or model.block_of(layer) is None]
        if unknown or not layers:
            first = (
                f"first of {len(unknown)} that its blocks lack: {unknown[0]!r}" if unknown else "it has none"
            )
            raise UserError(f"{path}: its linear layers are not those of {model.source}; {first}")
        name, rank = f"{layers[0]}.lora_A.weight", int(config["r"])
        if name in entries and entries[name].shape[:1] != (rank,):  # before tensors of such a rank are made
            raise UserError(f"{path}: {name} has shape {entries[name].shape}, but r of the config is {rank}")
        return cls(
            rank,
            float(config["lora_alpha"]),
            layers,
            bool(config.get("use_rslora")),
            train_a=train_a,
            blocks="all",
            head="exact" if of_labels else "estimated",
        )

    @classmethod
    def of_config(cls, config: LoraConfig) -> LoRA:
        """The adapters that a `peft.LoraConfig` describes, in the blocks that "auto" means.

        Dropout is left out, with a warning: the points of a step would see other masks.

        Args:
            config: PEFT's.

        Raises:
            UserError: if it has settings that ours do not reproduce.

        Example:
            >>> from peft import LoraConfig
            >>> LoRA.of_config(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])).rank
            4
        """
        said, where = config.to_dict(), "LoraConfig"
        check_supported(where, said)
        for name in ("modules_to_save", "exclude_modules"):
            if said[name]:
                raise UserError(f"{where}: {name}: got {said[name]!r}, supported: None")
        targets = said["target_modules"]
        if isinstance(targets, str) and not (targets == "all-linear" or targets.replace("_", "").isalnum()):
            raise UserError(
                f"{where}: target_modules: got {targets!r}, supported: all-linear, or a list of layers' names"
            )
        if said["lora_dropout"]:
            _log.warning(
                "LoraConfig: lora_dropout: got %s, not used: there is no dropout", said["lora_dropout"]
            )
        chosen = "attention" if targets is None else targets if isinstance(targets, str) else sorted(targets)
        return cls(said["r"], float(said["lora_alpha"]), chosen, bool(said["use_rslora"]))

    @property
    def scaling(self) -> float:
        """The factor of the adapter product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def attach(self, model: Model, seed: int, labels: Sequence[int] | None = None) -> None:
        """Create A (uniform, as PEFT) and B (zero), and hang a delta on each target, in place of others.

        Args:
            model: that is adapted.
            seed: of A.
            labels: tokens that get a row of the head, at most `rank`; none are added for None, or if the head
                cannot take an adapter. An empty sequence makes as many rows as an adapter may have, to be
                loaded.

        Raises:
            UserError: if the model lacks the targets, or has fewer blocks than `exact_blocks`.
        """
        if self.exact_blocks != "all" and self.exact_blocks > len(model.blocks):
            raise UserError(
                f"--exact-blocks: got {self.exact_blocks}, allowed: all, 0 to {len(model.blocks)}, "
                "those of the model"
            )
        release(model)
        self.model, self.parameters, self.exact, self.frozen = model, {}, {}, {}
        self.target_names = resolve_targets(model, self.targets, self.blocks)
        exact_blocks = len(model.blocks) if self.exact_blocks == "all" else self.exact_blocks
        step = min(A_BLOCK * len(model.blocks), TOGETHER) / max(exact_blocks, 1)
        for target in self.target_names:
            linear = model.linears[target]
            names = (f"{target}.lora_A.weight", f"{target}.lora_B.weight")
            bound = 1 / math.sqrt(linear.in_features)  # kaiming_uniform with a = sqrt(5)
            draw = generator(seed, "init", names[0])
            drawn = draw.uniform(-bound, bound, (self.rank, linear.in_features)).astype("float32")
            a = torch.from_numpy(drawn).to(model.device)
            b = torch.zeros(linear.out_features, self.rank, device=model.device)
            if in_top(model, target, self.exact_blocks):
                self.exact |= {names[0]: a, names[1]: b}
                by_inputs = "", names[1]  # A moves as fast as B (`optimizers/exact.py`)
                linear.delta = LoRADelta(a, b, (None, None), self.scaling, exact=by_inputs, step=step)
            else:
                (self.parameters if self.train_a else self.frozen)[names[0]] = a
                self.parameters[names[1]] = b
                linear.delta = LoRADelta(a, b, names if self.train_a else (None, names[1]), self.scaling)
        head_step = HEAD_STEP if exact_blocks else 1.0
        into = self.parameters, self.exact, self.frozen
        self.head_names = attach_head(model, self.head, *into, head_step)
        self.label_layer = None
        wanted = self.head == "exact" and not self.exact_blocks
        if labels is not None and wanted and len(labels) <= self.rank:
            self._attach_labels(labels)

    def _attach_labels(self, labels: Sequence[int]) -> None:
        """A row of the head for each token, at zero."""
        model = self.model
        head = head_of(model.linears, model.trunk_name, model.config.vocab_size)
        if model.kind == "classifier" or head is None:
            return
        self.label_layer = head.name
        count = len(labels) or self.rank
        a = torch.zeros(count, head.in_features, device=model.device)
        b = torch.zeros(head.out_features, count, device=model.device)
        for row, token in enumerate(labels):
            b[token, row] = 1 / self.scaling
        a_name, b_name = (f"{head.name}.lora_{half}.weight" for half in "AB")
        self.exact[a_name], self.frozen[b_name] = a, b
        head.delta = LoRADelta(a, b, (None, None), self.scaling, exact=(a_name, ""))

    def detach(self) -> None:
        """Take every delta off the model again."""
        for name in [*self.adapted, *self.head_names]:
            self.model.linears[name].delta = None
        restore(self.model)

    @property
    def adapted(self) -> list[str]:
        """The layers that have A and B."""
        return [*self.target_names, *([] if self.label_layer is None else [self.label_layer])]

    def peft_config(self) -> LoraConfig:
        """The attached adapter as PEFT describes it."""
        unsaved = set(beside_heads(self.model, self.head_names)) - set(self.frozen)
        heads = saved_modules(self.head_names, self.model.trunk_name, unsaved)
        return LoraConfig(
            task_type=_TASK_TYPE[self.model.kind],
            base_model_name_or_path=str(self.model.source),
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            use_rslora=self.rslora,
            target_modules=self.adapted,
            modules_to_save=heads or None,
            fan_in_fan_out=self.model.config.model_type == "gpt2",
            bias="none",
            inference_mode=True,
        )

    def save(self, folder: Path | str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`, as PEFT does.

        PEFT has a set of layers, whose order is another one in every process; ours is that of their names.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.peft_config().save_pretrained(folder)
        config = read_peft_config(folder)
        config["target_modules"] = sorted(config["target_modules"])
        (folder / PEFT_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        tensors = {PEFT_PREFIX + name: p for name, p in self._tensors().items()}
        save_tensors(tensors, folder / PEFT_WEIGHTS, PEFT_METADATA)

    def load(self, folder: Path | str) -> None:
        """Read `adapter_model.safetensors` of `folder` into the attached parameters.

        Raises:
            UserError: before any is changed, if the file is damaged or does not fit.
        """
        path = peft_weights(folder)
        tensors = _read(path)
        own = self._fitting(tensors)
        check_fits(path, _shapes(tensors), _shapes(own))
        self._take(path, tensors, own)

    def begin_from(self, folder: Path | str) -> None:
        """Take over the values of the adapter in `folder`, of the same layers or some; the others begin new.

        Rows for labels, if both have them, must be of the same tokens.

        Raises:
            UserError: before any is changed, if the file is damaged or does not fit.
        """
        path = peft_weights(folder)
        tensors = _read(path)
        own = self._fitting(tensors)
        if unknown := sorted(set(tensors) - set(own)):
            raise UserError(
                f"--init-adapter: {path} has {unknown[0]!r}, which this run does not train; allowed: an "
                "adapter of layers that it trains (--blocks all for those of all blocks), and with rows for "
                "labels (of its head) only if the run has them"
            )
        own = {name: value for name, value in own.items() if name in tensors}
        check_fits(path, _shapes(tensors), _shapes(own))
        rows = f"{self.label_layer}.lora_B.weight"
        if rows in tensors and not torch.equal(tensors[rows].float(), own[rows].cpu()):
            raise UserError(
                f"--init-adapter: {path} has rows for other labels than this task's; allowed: an adapter for "
                "the same labels, or without such rows"
            )
        self._take(path, tensors, own)

    def _fitting(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file with these tensors can be read into."""
        beside = {n: p for n, p in beside_heads(self.model, self.head_names).items() if n in tensors}
        return {**self._tensors(), **beside}  # those of the labels' rows are copies, of the adapters' rank

    def _take(self, path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Copy the tensors that are in `own`. Raises `UserError` before that for what is no number."""
        for name, value in tensors.items():
            if not value.is_floating_point():
                raise UserError(f"{path}: {name} is {value.dtype}, allowed are floats")
        known = {**self.frozen, **self.exact, **self.parameters}
        beside = {name: value for name, value in own.items() if name not in known}
        for name, value in beside.items():
            self.model.originals.setdefault(name, value.clone())
        self.frozen |= beside
        for name, value in {**known, **beside}.items():
            if name in tensors:
                value.copy_(tensors[name][tuple(map(slice, value.shape))])

    def _tensors(self) -> dict[str, Tensor]:
        """All that PEFT's file holds, of one rank: the adapter of label rows has zeros behind them."""
        found = {**self.frozen, **self.exact, **self.parameters}
        if self.label_layer is not None:
            a_name, b_name = (f"{self.label_layer}.lora_{half}.weight" for half in "AB")
            missing = self.rank - len(found[a_name])
            found[a_name] = F.pad(found[a_name], (0, 0, 0, missing))
            found[b_name] = F.pad(found[b_name], (0, missing))
        return found


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of PEFT's file, by the names that ours have."""
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_tensors(path).items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: value.shape for name, value in tensors.items()}
