"""`AuditReport`: what happened to each weight when a checkpoint was loaded, by part of the model.

A weight that the model needs must be there and have the right shape. If not, an error names its key.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from stllm.common.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


class Part(NamedTuple):
    """A part of the model. prefix: beginning of our keys. hint: a pattern to recognise its keys in other formats.

    given_by: the setting that names the file of its weights. switch: a setting that leaves the part out. Messages
    mention them when weights are missing.
    """

    name: str
    prefix: str
    hint: str
    given_by: str = ""
    switch: str = ""


VISION_KEYS = r"visual_encoder|vision_model|^(?:blocks|norm|fc_norm|head|cls_token|mask_token|pos_embed|patch_embed)\b"
LANGUAGE_KEYS = r"language_model|embed_tokens|rotary|layers\.|lm_head|^model\."
BY_CKPT = "model.ckpt (or an InstructBLIP file as model.q_former_model)"
PARTS = (  # a key belongs to the first part that fits
    Part("temporal adapter", "vision_encoder.adapter.", r"BTAdapter", switch="model.vit_model=eva_clip_g"),
    Part("ln_vision", "vision_encoder.ln_vision.", r"(?!)", "model.q_former_model"),
    Part("qformer", "qformer.", r"Qformer|qformer", "model.q_former_model"),
    Part("vision encoder", "vision_encoder.", VISION_KEYS, "model.vit_ckpt (eva_vit_g.pth)"),
    Part("projection", "projection.", r"(?:llama|llm|t5|opt|language)_proj", BY_CKPT),
    Part("video input", "video_input.", r"residual_index|down_proj|up_proj", switch="model.video_input=all"),
    Part("mvm decoder", "mvm_decoder.", r"mvm", switch="model.mvm_decode=False"),
    Part("language model", "language_model.", LANGUAGE_KEYS, "model.llama_model"),
)
OTHER = "other"
# in the order of a video's way
PART_NAMES = ("vision encoder", "temporal adapter", "ln_vision", "qformer", *(part.name for part in PARTS[4:]))
STATES = ("loaded", "fresh", "missing", "wrong_shape", "unexpected", "ignored")
MAX_NAMED = 6


def part_of(key: str) -> str:
    """Return the part that one of our keys belongs to."""
    return next((part.name for part in PARTS if key.startswith(part.prefix)), OTHER)


def part_of_theirs(key: str) -> str:
    """Guess the part that a key belongs to which is not in our format."""
    return next((part.name for part in PARTS if re.search(part.hint, key)), OTHER)


@dataclass
class AuditReport:
    """The audit of one loading.

    source: name of the checkpoint. parts: part -> state (one of `STATES`) -> keys. Entries of the state wrong_shape are
    `key: found (...), expected (...)`. notes: other facts to report, such as resized position embeddings.
    """

    source: str
    parts: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, state: str, part: str, entry: str) -> None:
        """Record a key. state: one of `STATES`."""
        self.parts.setdefault(part, {name: [] for name in STATES})[state].append(entry)

    def keys(self, state: str) -> list[str]:
        """List all entries of one state, part after part."""
        return [entry for _, audit in self._ordered() for entry in audit[state]]

    def raise_for_problems(self) -> None:
        """Raise UserError if weights are missing or have a wrong shape; it names them."""
        wrong, missing = self.keys("wrong_shape"), self.keys("missing")
        # without a part's weights its sizes are guessed, so other parts can seem to have wrong shapes
        part_missing = any(audit["missing"] and not audit["loaded"] for audit in self.parts.values())
        if wrong and not part_missing:
            raise UserError(
                f"{self.source}: {_counted(wrong)} of another size than the configuration asks for: {named(wrong)}; "
                "use the configuration that these weights were made with"
            )
        if not missing:
            return
        parts = [part for part in PARTS if part.name in self.parts and self.parts[part.name]["missing"]]
        if given_by := sorted({part.given_by for part in parts if part.given_by}):
            advice = f"the download may be incomplete; when building from pieces, name them with {', '.join(given_by)}"
        else:
            off = " and ".join(part.switch for part in parts) or "in the configuration"
            advice = f"switch off what needs them ({off}), or use a checkpoint that has them"
        lacking = f"{_counted(missing)} missing that the configuration needs: {named(missing)}"
        raise UserError(f"{self.source}: {lacking}; {advice}")

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON: by part, the number of loaded weights and the names of all others."""
        parts = {
            part: {"loaded": len(audit["loaded"]), **{state: audit[state] for state in STATES[1:]}}
            for part, audit in self._ordered()
        }
        return {"source": self.source, "parts": parts, "notes": self.notes}

    def table(self) -> "Table":
        """Return the number of weights by part and state, as a table for the terminal."""
        from rich.box import SIMPLE
        from rich.table import Table

        # seven columns have to fit 80 characters
        table = Table(title=f"audit of {self.source}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("part", no_wrap=True)
        for state in STATES:
            table.add_column(state.replace("_", " "), justify="right")
        for part, audit in self._ordered():
            counts = [len(audit[state]) for state in STATES]
            table.add_row(part, *(str(count) if count else "" for count in counts))
        return table

    def details(self) -> list[str]:
        """Return a line for each part and state other than loaded, with the keys, and then the notes."""
        lines = [
            f"{part}, {state.replace('_', ' ')}: {named(audit[state])}"
            for part, audit in self._ordered()
            for state in STATES[1:]
            if audit[state]
        ]
        return [*lines, *self.notes]

    def _ordered(self) -> list[tuple[str, dict[str, list[str]]]]:
        order = {part: number for number, part in enumerate((*PART_NAMES, OTHER))}
        return sorted(self.parts.items(), key=lambda item: order[item[0]])


def named(keys: list[str]) -> str:
    """Join the first `MAX_NAMED` keys for a message, followed by the number of the others."""
    more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(keys[:MAX_NAMED]) + more


def _counted(keys: list[str]) -> str:
    return "1 weight is" if len(keys) == 1 else f"{len(keys)} weights are"
