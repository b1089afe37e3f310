"""Which tensor of which file goes where: a plan made from names and shapes alone, before anything is read."""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor

from stllm.models.checkpoints import contradictions
from stllm.models.checkpoints.audit import OTHER, AuditReport, part_of, part_of_theirs
from stllm.models.checkpoints.deciding import family_tokens, merged_shapes, names_of
from stllm.models.checkpoints.formats import Entry, Format, Source
from stllm.models.configuration import STLLMConfig
from stllm.models.st_llm import STLLM, config_of

LAYER = re.compile(r"[a-z_.]+\.\d+(?=\.)")  # the outermost numbered module of a key
POS_EMBED = "vision_encoder.backbone.pos_embed"
FRESH_PARTS = ("temporal adapter", "video input", "mvm decoder")  # what training may start without
# model.fresh: what training may start without when the user says so
ASKED_FRESH = {
    "vision_encoder": ("vision encoder", "ln_vision"),
    "qformer": ("qformer",),
    "projection": ("projection",),
    "language_model": ("language model",),
}
GIVES_PROJECTION = {Format.STLLM, Format.RELEASED, Format.INSTRUCTBLIP, Format.MINIGPT4}


@dataclass
class Plan:
    """Where each of the model's tensors comes from; `report` says what became of the rest."""

    report: AuditReport
    origins: dict[str, tuple[Source, Entry]] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)


def make_plan(model: STLLM, sources: Sequence[Source], *, training: bool = False, fresh: Sequence[str] = ()) -> Plan:
    """Matches the sources' weights, later ones over earlier ones, with the model's; training, fresh: as in `assemble`.

    Raises UserError for what does not belong together, see contradictions.py.
    """
    config = config_of(model)
    name = names_of(sources) or "the model"
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    contradictions.check_adapter(name, merged_shapes(sources), wanted, fresh_allowed=training)
    plan = Plan(AuditReport(source=name))
    plain = {key.replace(".base_layer.", "."): key for key in wanted}  # LoRA wraps the layers that it adapts
    for source in sources:
        for key, entry in source.entries.items():
            if plain.get(key, key) in wanted:
                plan.origins[plain.get(key, key)] = (source, entry)
            elif key not in wanted:
                plan.report.add("unexpected", part_of(key), entry.key)
        for key in source.ignored_keys():
            plan.report.add("ignored", part_of_theirs(key), key)
        for key in source.unknown_keys():
            plan.report.add("unexpected", part_of_theirs(key) if source.is_whole_model else OTHER, key)
    for layer in _surplus_layers(wanted, sources):
        plan.report.add("wrong_shape", part_of(layer), f"{layer}: found, but the configuration has fewer layers")
    _swap_tied(model, plan)
    _note_unused_language_models(plan, sources)
    _check_vocabulary(model, plan)
    tied = set(model.all_tied_weights_keys)
    asked = {part for name in fresh for part in ASKED_FRESH[name]}
    _leave_out_other_sizes(plan, wanted, asked)
    for key, tensor in wanted.items():
        if key in plan.origins:
            _check_shape(plan, key, tensor, config)
        elif key not in tied:
            may = part_of(key) in asked or _may_be_fresh(key, sources, config, training)
            state = "fresh" if may else "missing"
            plan.report.add(state, part_of(key), key)
            if state == "fresh":
                plan.fresh.add(key)
    return plan


def _note_unused_language_models(plan: Plan, sources: Sequence[Source]) -> None:
    """A `llama_model` beneath a whole checkpoint, all of whose weights the checkpoint has, too."""
    owners = {source.path: None for key, (source, _) in plan.origins.items() if part_of(key) == "language model"}
    for source in sources:
        if source.format is Format.CAUSAL_LM and source.path not in owners:
            taken = " + ".join(map(str, owners))
            plan.report.notes.append(f"the language model's weights are those of {taken}: none is from {source.path}")


def _leave_out_other_sizes(plan: Plan, wanted: Mapping[str, Tensor], asked: Set[str]) -> None:
    """Of parts that may start fresh: a projection into another language model does not fit this one."""
    for key in [key for key in plan.origins if part_of(key) == "projection" and "projection" in asked]:
        source, entry = plan.origins[key]
        if entry.shape != tuple(wanted[key].shape):
            plan.report.notes.append(f"{entry.key} of {source.path} is for a language model of another width: left out")
            del plan.origins[key]


def _check_shape(plan: Plan, key: str, tensor: Tensor, config: STLLMConfig) -> None:
    source, entry = plan.origins[key]
    found, expected = entry.shape, tuple(tensor.shape)
    if found == expected:
        pass
    elif key == POS_EMBED and found[2] == expected[2] and _is_square(found[1] - 1) and _is_square(expected[1] - 1):
        size = config.vision_config["patch_size"] * int((found[1] - 1) ** 0.5)
        plan.report.notes.append(
            f"position embeddings are interpolated from image size {size} to {config.vision_config['image_size']}"
        )
    elif _grows(key, source) and found[1:] == expected[1:] and found[0] < expected[0]:
        plan.report.notes.append(f"{key} grows from {found[0]} to {expected[0]} rows: the added [PAD] is their mean")
    else:
        plan.report.add("wrong_shape", part_of(key), f"{entry.key}: found {found}, expected {expected}")
        return
    plan.report.add("loaded", part_of(key), key)


def _grows(key: str, source: Source) -> bool:
    """Whether [PAD] may be added: to the embeddings or the head of a language model that never was ST-LLM's."""
    return (
        source.format in (Format.CAUSAL_LM, Format.TRANSFORMERS_BLIP)
        and key.startswith("language_model.")
        and key.endswith((".weight", ".bias"))
    )


def _check_vocabulary(model: STLLM, plan: Plan) -> None:
    embedding = model.get_input_embeddings().weight
    key = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    if key not in plan.origins:
        return
    source, entry = plan.origins[key]
    if _grows(key, source):  # its rows are counted in `decide_config`
        return
    tokens = family_tokens(source.path, adds_pad=model.config.adds_pad, config=model.config.text_config)
    contradictions.check_vocabulary(str(source.path), entry.shape[0], config_of(model), tokens)


def _may_be_fresh(key: str, sources: Sequence[Source], config: STLLMConfig, training: bool) -> bool:
    if part_of(key) == "ln_vision" and not config.has_qformer and not any(source.is_whole_model for source in sources):
        return True  # it lies in the Q-Former's file: as published, it starts as the identity without one
    if not training:
        return False
    if not sources or part_of(key) in FRESH_PARTS or "lora_" in key:
        return True
    given = any(
        source.format in GIVES_PROJECTION or (source.format is Format.TRANSFORMERS_BLIP and source.is_whole_model)
        for source in sources
    )
    return part_of(key) == "projection" and not given


def _surplus_layers(wanted: Mapping[str, Tensor], sources: Sequence[Source]) -> list[str]:
    """Layers of the weights beyond the last one of the model, as `language_model.model.layers.32`."""
    kept = {match[0] for key in wanted if (match := LAYER.match(key))}
    found = {match[0] for source in sources for key in source.entries if (match := LAYER.match(key))}
    stacks = {layer.rpartition(".")[0] for layer in kept}
    return sorted(layer for layer in found - kept if layer.rpartition(".")[0] in stacks)


def _swap_tied(model: STLLM, plan: Plan) -> None:
    """Of two tied weights only the one that the other is tied to is filled, whichever the file has."""
    for target, origin in model.all_tied_weights_keys.items():
        if target in plan.origins:
            found = plan.origins.pop(target)
            plan.origins.setdefault(origin, found)


def _is_square(count: int) -> bool:
    return int(count**0.5) ** 2 == count
