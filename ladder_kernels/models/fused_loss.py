"""The loss of transformers' causal language models from their last hidden states, without logits.

As those compute it (``ForCausalLMLoss``): the label of a token is what the one before it predicts;
the mean over the labels that count, or their sum over ``num_items_in_batch``, if that is given.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ladder_kernels.models.architecture import FAMILIES
from ladder_kernels.models.hooked_backbone import HOOKED, HookedFamily
from ladder_kernels.models.quantized_layer import compute_dtype, is_quantised, nf4_view
from ladder_kernels.models.reclass import Reclassed
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.ops import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FusedLoss", "is_known", "refusal"]

_KNOWN = frozenset((*FAMILIES, *HOOKED)) - {"gpt2"}  # whose output has more fields

_NOT_OF_THE_DECODER = ("labels", "logits_to_keep", "return_dict")


def is_known(model: nn.Module) -> bool:
    """Whether ``model`` is transformers' own causal language model of a type that we know.

    Its forward then is: decoder, head, a scale or a cap from the configuration, loss.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.config.model_type not in _KNOWN:
        return False
    own = type(model).own if isinstance(model, FusedLoss) else type(model)
    return own is MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)


def refusal(model: PreTrainedModel) -> str | None:
    """Say why the loss of a known model needs its logits; ``None`` if it does not.

    Adapters, hooks and losses may come and go, so this is asked in every forward.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    head: Any = model.get_output_embeddings()
    dense = type(head) is nn.Linear
    if not dense and not is_quantised(head):
        return f"its head is a {type(head).__name__}, which is no plain matrix"
    if head.bias is not None:
        return "its head has a bias"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "its head has hooks"
    if dense and (
        type(head.weight) is not nn.Parameter
        or head.weight.shape != (head.out_features, head.in_features)
    ):
        return "the weight of its head is not there as one matrix"
    if model.loss_function is not ForCausalLMLoss:
        return "it has a loss of its own"
    return None


class FusedLoss(Reclassed):
    """Mixed into a causal language model: with labels, in training, a loss and no logits."""

    prefix: ClassVar[str] = ""  # a saved configuration has the name of the class

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward, which runs whenever somebody may want the logits."""
        given = dict(zip(_parameters(type(self).own), args, strict=False)) | kwargs
        return_dict = given.get("return_dict")
        if (
            self.training
            and given.get("labels") is not None
            and _is_zero(given.get("logits_to_keep"))
            and (self.config.return_dict if return_dict is None else return_dict)
            and refusal(self) is None
        ):
            return _forward(self, given)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _parameters(own: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(own.forward).parameters)[1:]


def _is_zero(logits_to_keep: Any) -> bool:
    return logits_to_keep is None or (isinstance(logits_to_keep, int) and logits_to_keep == 0)


def _forward(model: Any, given: dict[str, Any]) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    for_decoder = {k: v for k, v in given.items() if k not in _NOT_OF_THE_DECODER}
    outputs = model.base_model(**for_decoder)
    return CausalLMOutputWithPast(
        loss=_loss(model, outputs.last_hidden_state, given),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _loss(model: Any, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    ignore_index = given.get("ignore_index", -100)
    targets = given.get("shift_labels")
    if targets is None:
        targets = F.pad(given["labels"], (0, 1), value=ignore_index)[..., 1:]
    items = given.get("num_items_in_batch")
    hidden, head = _factors(model.get_output_embeddings(), hidden)
    loss = linear_cross_entropy(
        hidden.flatten(0, -2),
        head,
        targets.flatten().to(hidden.device),
        ignore_index,
        "mean" if items is None else "sum",
        getattr(model.config, "final_logit_softcapping", None),
        logit_scale=_logit_scale(model.config),
    )
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def _factors(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor | NF4Weight]:
    """What is multiplied, in the dtype in which the head would do it."""
    if type(head) is nn.Linear:
        return hidden, head.weight
    return hidden.to(compute_dtype(head, hidden)), nf4_view(head)


def _logit_scale(config: Any) -> float:
    family = HOOKED.get(config.model_type, HookedFamily())
    if family.scale is not None:
        return float(getattr(config, family.scale))
    if family.inverse_scale is not None:
        return 1.0 / float(getattr(config, family.inverse_scale))
    return 1.0
