"""Loading models with a class head, of encoders and decoders alike, and calling them up to that head.

The head is the last linear module, the one that makes the logits. Its input is what the losses need: the pooled text of
an encoder, or the hidden states of a decoder, of which the last one of a text counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from distill.errors import ConfigError, in_one_line
from distill.models.body import max_positions
from distill.models.dropout import set_dropout
from distill.models.loading import MODEL_ERRORS, listed, without_report

_CLASSES = "ForSequenceClassification"
_MAX_GAP = 1e-3  # relative
_INIT_STD = 0.02


def is_classifier(folder: Path) -> bool:
    """Whether the model in a folder was saved with a class head."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MODEL_ERRORS:
        return False  # damaged; loading it will say so
    return any(name.endswith(_CLASSES) for name in config.architectures or ())


def labels_of(folder: Path) -> tuple[str, ...]:
    """The labels of a saved model with a class head, in the order of its classes."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return tuple(config.id2label[index] for index in range(config.num_labels))


def load_classifier(
    folder: Path,
    dtype: torch.dtype,
    labels: Sequence[str],
    padding_id: int,
    *,
    from_scratch: bool = False,
    dropout: float | None = None,
) -> PreTrainedModel:
    """Load a model folder with a head for these labels: its own, if saved for them in this order, else a new one.

    Only safetensors are read, and no code from the folder is run. Raises ConfigError unless the files hold exactly the
    weights of the body. `dropout` replaces the probabilities in its configuration, None for none.
    """
    try:
        config = _config(folder, labels, padding_id)
        if dropout is not None:
            set_dropout(config, dropout)
        if from_scratch:
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        else:
            model = _from_files(folder, config, dtype=dtype)
        assert isinstance(model, PreTrainedModel)
        _check_seam(model, padding_id)
    except MODEL_ERRORS as error:
        raise ConfigError(f"{folder} does not open as a model with a class head: {in_one_line(error)}") from None
    return model


def check_classifier(folder: Path, labels: Sequence[str], padding_id: int) -> None:
    """Raise ConfigError unless `load_classifier` will find the weights that it needs; none is read."""
    try:
        _from_files(folder, _config(folder, labels, padding_id), device_map="meta")
    except MODEL_ERRORS as error:
        raise ConfigError(f"{folder} does not open as a model with a class head: {in_one_line(error)}") from None


def padding_of(folder: Path) -> int | None:
    """The padding id that a model's configuration names; some count positions by it."""
    index = getattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), "pad_token_id", None)
    return index if isinstance(index, int) and index >= 0 else None


def text_limit(folder: Path) -> int | None:
    """Number of tokens that the model in a folder can read, None without a limit; no weight is read.

    Raises ConfigError if its type cannot have a class head.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        limit = max_positions(config)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except NotImplementedError:  # said by families whose positions are relative
        return None
    except MODEL_ERRORS as error:
        raise ConfigError(f"{folder} does not open as a model with a class head: {in_one_line(error)}") from None
    if limit is None:
        return None
    # RoBERTa and its kin number positions from behind the padding id.
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == limit]
    offset = max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
    return limit - offset


def class_head(model: Any) -> nn.Linear:
    """The linear module whose outputs are the logits of the classes."""
    outside = (child for name, child in model.named_children() if child is not model.base_model)
    modules = [module for child in outside for module in child.modules()]
    size = model.config.num_labels
    heads = [module for module in modules if isinstance(module, nn.Linear) and module.out_features == size]
    if not heads:
        raise ConfigError(f"{type(model).__name__} is not supported: it has no linear head of {size} classes")
    return heads[-1]


def new_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters between the body and the logits, with those of a pooler in the body."""
    body = dict(model.base_model.named_parameters())
    pooler = {id(weight) for name, weight in body.items() if _is_pooler(name)}
    kept = {id(weight) for weight in body.values()} - pooler
    return [weight for weight in model.parameters() if id(weight) not in kept]


def features(
    model: Any, ids_BT: Int[Tensor, "B T"], mask_BT: Int[Tensor, "B T"], last_B: Int[Tensor, "B"]
) -> Float[Tensor, "B H"]:
    """What the head reads: of a decoder, the hidden state at the last token of each text."""
    seen: list[Tensor] = []
    hook = class_head(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(ids_BT, attention_mask=mask_BT)
    finally:
        hook.remove()
    (inputs,) = seen
    return inputs if inputs.dim() == 2 else inputs[torch.arange(len(inputs), device=inputs.device), last_B]


def class_logits(model: Any, texts: Sequence[Sequence[int]], padding_id: int) -> Float[Tensor, "B C"]:
    """The logits of the classes for texts of unlike length, padded on the right, as the model itself computes them."""
    length_B = torch.tensor([len(ids) for ids in texts])
    mask_BT = (torch.arange(int(length_B.max())) < length_B[:, None]).long()
    ids_BT = torch.full(mask_BT.shape, padding_id)
    ids_BT[mask_BT.bool()] = torch.tensor([token for ids in texts for token in ids])
    logits_BC: Tensor = model(ids_BT.to(model.device), attention_mask=mask_BT.to(model.device)).logits
    return logits_BC


def _config(folder: Path, labels: Sequence[str], padding_id: int) -> Any:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    config.pad_token_id = padding_id  # decoders that have none find the end of a text by it
    return config


def _from_files(folder: Path, config: Any, **options: Any) -> Any:
    labels = [label.casefold() for label in config.id2label.values()]
    is_complete = is_classifier(folder) and [label.casefold() for label in labels_of(folder)] == labels
    with without_report():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    absent, unused = [*info["missing_keys"], *mismatched], info["unexpected_keys"]
    if not is_complete:  # the head is new, and the one that the model had is dropped
        absent, unused = ([name for name in names if _is_of_body(model, name)] for names in (absent, unused))
    problems = {"weights of the model are missing in its files": absent, "weights in the files are not used": unused}
    if any(problems.values()):
        counted = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names)
        raise ConfigError(f"{folder} does not hold the weights of {type(model).__name__}: {counted}")
    if not is_complete:
        _renew(class_head(model), config.initializer_range if hasattr(config, "initializer_range") else _INIT_STD)
    return model


@torch.no_grad()
def _renew(head: nn.Linear, std: float) -> None:
    """Forget the head of other classes, which has been loaded if there were as many of them."""
    head.weight.normal_(0.0, std)
    if head.bias is not None:
        head.bias.zero_()


def _is_of_body(model: Any, name: str) -> bool:
    """Whether a weight belongs to the layers of the body, under a name with or without that of the body."""
    inside = name.removeprefix(f"{model.base_model_prefix}.")
    layers = {child for child, _ in model.base_model.named_children()}
    return inside.partition(".")[0] in layers and not _is_pooler(inside)


def _is_pooler(name: str) -> bool:
    return name.startswith(("pooler.", "pooler_"))


@torch.inference_mode()
def _check_seam(model: Any, padding_id: int) -> None:
    """Raise ConfigError unless logits = head(features), and unless texts in a batch are read as each alone."""
    was_training = model.training
    model.eval()
    ids = [token for token in range(model.config.vocab_size) if token != padding_id][:12]
    texts = [tuple(ids[:4]), tuple(ids), tuple(ids[2:9])]
    alone_BC = torch.cat([class_logits(model, [text], padding_id) for text in texts])
    together_BC = class_logits(model, texts, padding_id)
    features_BH = torch.cat([_features_alone(model, text) for text in texts])
    seam_BC = class_head(model)(features_BH)
    model.train(was_training)
    size = alone_BC.abs().max().clamp(min=1e-3)
    for gap, what in (
        ((seam_BC - alone_BC).abs().max(), "its logits are not those of its last linear module"),
        ((together_BC - alone_BC).abs().max(), "a text is read otherwise in a batch than alone"),
    ):
        if not gap <= max(_MAX_GAP, torch.finfo(model.dtype).eps ** 0.5) * size:  # NaN is refused as well
            raise ConfigError(f"{type(model).__name__} is not supported: {what} (difference {gap:.3g})")


def _features_alone(model: Any, ids: Sequence[int]) -> Float[Tensor, "1 H"]:
    ids_1T = torch.tensor([ids], device=model.device)
    return features(model, ids_1T, torch.ones_like(ids_1T), ids_1T.new_tensor([len(ids) - 1]))
