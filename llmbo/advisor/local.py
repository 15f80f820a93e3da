"""A chat model in this process. JSON is enforced while decoding, by llguidance, which follows more of JSON Schema than its rivals
(JSONSchemaBench, arXiv:2501.10868) and brings no dependencies."""

from dataclasses import dataclass
from typing import Any

import llguidance
import llguidance.hf
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from llmbo.advisor.client import ClientError, Completion
from llmbo.advisor.render import SHORTEST_REPLY, Prompt
from llmbo.errors import first_line

MODE = "constrained decoding"


@dataclass
class TransformersClient:
    """Greedy decoding, so that equal prompts get equal replies on one machine."""

    model: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    _vocabulary: llguidance.LLTokenizer | None = None

    def complete(self, prompt: Prompt, deadline: float) -> Completion:
        try:
            matcher = self._matcher(prompt)
        except (ValueError, RuntimeError) as error:
            raise ClientError(f"this tokenizer cannot be constrained to JSON ({first_line(error)})", 1) from error
        ids = self._encoded(prompt)
        room = getattr(self.network.config, "max_position_embeddings", ids.shape[-1] + prompt.max_tokens)
        if ids.shape[-1] + min(prompt.max_tokens, SHORTEST_REPLY) > room:
            raise ClientError(f"the prompt has {ids.shape[-1]} tokens, the model takes {room} with its reply", 1)
        longest = min(prompt.max_tokens, room - ids.shape[-1])
        constraint = _Constraint(matcher, ids.shape[-1])
        try:
            with torch.inference_mode():
                output: Tensor = self.network.generate(  # type: ignore[operator]
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, max_time=deadline,
                    do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=self.tokenizer.eos_token_id,
                    logits_processor=LogitsProcessorList([constraint]),
                )  # fmt: skip
        except RuntimeError as error:  # out of memory, no token left to choose
            raise ClientError(first_line(error), 1) from error
        new = output[0, ids.shape[-1] :]
        text = str(self.tokenizer.decode(new, skip_special_tokens=True))
        return Completion(
            text,
            ids.shape[-1],
            len(new),
            MODE,
            None if constraint.finished(new) else "the reply was cut off: be shorter",
        )

    def _encoded(self, prompt: Prompt) -> Tensor:
        """`1 x T` token ids."""
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        if self.tokenizer.chat_template:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(f"{prompt.system}\n\n{prompt.user}\n\n", return_tensors="pt").input_ids
        return ids.to(self.network.device)

    def _matcher(self, prompt: Prompt) -> llguidance.LLMatcher:
        if self._vocabulary is None:
            rows = self.network.get_output_embeddings().weight.shape[0]
            self._vocabulary = llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=rows)  # type: ignore[arg-type]
        grammar = llguidance.LLMatcher.grammar_from_json_schema(prompt.schema, overrides={"whitespace_flexible": False})
        matcher = llguidance.LLMatcher(self._vocabulary, grammar)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher


class _Constraint(LogitsProcessor):
    """Forbids every token that would leave the grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, start: int) -> None:
        self._matcher = matcher
        self._seen = start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for token in input_ids[0, self._seen :].tolist():
            self._matcher.consume_token(token)
        self._seen = input_ids.shape[-1]
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        return scores.masked_fill(~allowed[: scores.shape[-1]].to(scores.device), -torch.inf)

    def finished(self, new: Tensor) -> bool:
        """Whether the tokens make a whole JSON object."""
        for token in new.tolist()[-1:] if not self._matcher.is_stopped() else []:
            self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped() or self._matcher.is_accepting())
