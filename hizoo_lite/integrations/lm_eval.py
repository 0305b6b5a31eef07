"""EleutherAI's lm-evaluation-harness on our engine: `hizoo-lite eval --lm-eval TASKS`; or its own command
line, `lm-eval`, with this model beside its own:

    python -m hizoo_lite.integrations.lm_eval run --model hizoo_lite --model_args adapter=RUN --tasks piqa

or from Python:

    import hizoo_lite.integrations.lm_eval  # registers "hizoo_lite"
    lm_eval.simple_evaluate("hizoo_lite", {"pretrained": "models/mine", "adapter": "runs/mine"}, ["piqa"])

What is asked and how it is scored is the harness's; log-likelihoods are sums in float64. Models are quantized
and streamed as everywhere else. Importing this file needs the extra `lm-eval`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from hizoo_lite.engine.budget import Budget
from hizoo_lite.engine.generate import generate
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.memory.limits import Budgets
from hizoo_lite.model.model import Model
from hizoo_lite.tasks.collate import Encoded, collate, score_candidates
from hizoo_lite.tasks.tokens import open_ids, pad_id
from hizoo_lite.train.saved import load_to_write

#: What is to be scored: the texts, and the tokens of context and continuation.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]
#: Tokens of a text if neither the caller nor the model says how many; the harness's own number.
_MOST = 2048
#: What the harness asks for where its user has named no device, with and without a GPU.
_DEVICE = "cuda:0"


@register_model("hizoo_lite")
class HiZOOLM(TemplateLM):
    """A causal model with or without a saved adapter, or one that is loaded.

    Args:
        pretrained: folder or hub id, or a `Model`; None: the one that the adapter was made for.
        adapter: a run folder, or an adapter's of PEFT.
        batch_size: texts that go through the model together.
        max_length: tokens of a text; a longer one loses its beginning. None: the model's positions.
        max_batch_size: the harness's own; not read.
        flags: arguments of `load`, such as `bits`, `residency` and `device_budget`.

    Raises:
        UserError: if the model is not causal, or has no tokenizer.
    """

    def __init__(
        self,
        pretrained: Model | str | None = None,
        adapter: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        **flags: Any,
    ) -> None:
        super().__init__()
        self.batch_size = 8 if batch_size in (None, "auto") else int(str(batch_size))
        if isinstance(pretrained, Model):
            self.model = pretrained
        else:
            if flags.get("device") in (None, _DEVICE):
                flags = {**flags, "device": "auto"}
            length, rows = max_length or _MOST, self.batch_size
            self.model = load_to_write(pretrained, adapter, flags, length, rows, scores=True)
        if self.model.kind != "causal" or self.model.tokenizer is None:
            raise UserError(
                f"--lm-eval: {self.model.source} is {self.model.kind}; allowed: causal, with a tokenizer"
            )
        self.tokenizer = self.model.tokenizer
        self.max_length = min(max_length or self.model.positions or _MOST, self.model.positions or _MOST)
        limits = Budgets.parse(
            self.model.limits.device_budget, self.model.limits.host_budget, self.model.device
        )
        self.traversal = Traversal(self.model)
        self.traversal.guard = Budget(limits, self.model).fitting
        self.pad_id = pad_id(self.tokenizer, self.model.vocabulary)

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Tokens of `string`, without a second beginning-of-sequence token if a template has written one."""
        begun = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        special = not begun if add_special_tokens is None else add_special_tokens
        return open_ids(self.tokenizer, string, special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as a text; an assistant's last turn that is to be continued stays open."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of no token
        encoded = {
            number: self._encoded(*request[1:]) for number, request in enumerate(requests) if request[2]
        }
        for part in self._batches(sorted(encoded, key=lambda number: -len(encoded[number].rows[0]))):
            batch = collate([encoded[number] for number in part], self.pad_id)
            log_p, likeliest = self.traversal.scored(batch)
            sums = np.bincount(batch.token_slot, weights=log_p)
            misses = np.bincount(batch.token_slot, weights=~likeliest)
            for number, total, missed in zip(part, sums.tolist(), misses.tolist(), strict=True):
                found[number] = (total, missed == 0)
                texts = requests[number][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[number])
        return found

    def _encoded(self, context: Sequence[int], continuation: Sequence[int]) -> Encoded:
        """What is too long loses its beginning; the last token is not an input."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"--lm-eval: a continuation of {len(continuation)} tokens, allowed are {self.max_length}"
            )
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        rows, sites, scored = score_candidates([tokens], len(tokens) - len(continuation))
        return Encoded(rows, None, sites, scored, 1, 0, "answer")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that share no token that is scored."""
        windows: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            own = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            made: list[Scored] = [(None, *utils.make_disjoint_window(window)) for window in own]
            windows += made
            owners += [number] * len(made)
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        totals: list[float] = np.bincount(owners, weights=scores, minlength=len(requests)).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedily in batches of those that are written alike; samples one by one."""
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        for numbers in alike.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1])
            texts = [str(requests[number].args[0]) for number in numbers]
            for number, text in zip(numbers, self._written(texts, options), strict=True):
                found[number] = postprocess_generated_text(text, options["until"], None)
                self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
        return found

    def _written(self, texts: Sequence[str], options: Any) -> list[str]:
        most, until = min(options["max_gen_toks"], self.max_length - 1), [t for t in options["until"] if t]
        if options["do_sample"] and options["temperature"] > 0:
            sampling = {"temperature": options["temperature"], "top_p": options.get("top_p", 1.0)}
            return [generate(self.model, text, most, **sampling) for text in texts]
        prompts = [
            self.tok_encode(text)[-(self.max_length - most) :] or [self.prefix_token_id] for text in texts
        ]

        def ended(rows: Sequence[Sequence[int]]) -> list[bool]:
            shown = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            return [any(stop in text for stop in until) for text in shown]

        found = [""] * len(texts)
        for part in self._batches(sorted(range(len(texts)), key=lambda number: -len(prompts[number]))):
            rows = self.traversal.write([prompts[number] for number in part], self.pad_id, most, ended)
            written = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            for number, text in zip(part, written, strict=True):
                found[number] = text
        return found

    def _batches(self, order: Sequence[int]) -> Iterator[Sequence[int]]:
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]


def evaluated(model: HiZOOLM, tasks: Sequence[str], limit: int | None = None) -> dict[str, dict[str, Any]]:
    """The harness's results, by task and metric.

    Args:
        model: that is asked.
        tasks: the harness's names, or YAML files of one's own as the harness has them.
        limit: examples of each task; None: all.

    Raises:
        UserError: if the harness does not know a task, or a file is not there.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    own = {task: str(Path(task).expanduser()) for task in tasks if Path(task).suffix == ".yaml"}
    if missing := [file for file in own.values() if not Path(file).is_file()]:
        raise UserError(f"--lm-eval: {', '.join(missing)}: no such file")
    if unknown := [task for task in tasks if task not in own and task not in manager.all_tasks]:
        allowed = "tasks of `lm-eval ls tasks`, or YAML files of tasks"
        raise UserError(f"--lm-eval: got {', '.join(unknown)}; allowed: {allowed}")
    names = [own.get(task, task) for task in tasks]
    found = simple_evaluate(model, tasks=names, limit=limit, task_manager=manager, log_samples=False)
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def main() -> None:
    """The harness's own command line. What the model refuses is one line, and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
