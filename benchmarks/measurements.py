"""What is measured, by module name: the question, which columns of its table name a row, and which are ratios.

Ratios are what `python -m benchmarks` draws and compares: seconds and bytes are a machine's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Measurement:
    """One module of this package. more, less: columns of ratios of which more, or less, is better."""

    question: str
    labels: tuple[str, ...]
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()

    @property
    def ratios(self) -> tuple[str, ...]:
        """All columns that are compared."""
        return self.more + self.less


MEASUREMENTS: Mapping[str, Measurement] = {
    "startup": Measurement("How long until a command says its first word?", ("",), less=("× the interpreter alone",)),
    "encoding": Measurement(
        "How fast is the real-size image encoder, and how near the machine's peak?",
        ("",),
        more=("speed-up", "share of peak"),
    ),
    "beams": Measurement("What do the beams of an answer cost?", ("prompts", "beams"), more=("speed-up",)),
    "reuse": Measurement("What do many questions about one video cost?", ("",), more=("speed-up",)),
    "training_step": Measurement(
        "What does a step with masking and MVM cost, against the plain procedure?",
        ("vocabulary", "checkpointing"),
        less=("time ratio", "memory ratio"),
    ),
    "masking": Measurement(
        "What does masking save in training, over the number of frames?",
        ("frames",),
        less=("masked, time", "masked with MVM, time", "masked, memory", "masked with MVM, memory"),
    ),
    "packing": Measurement(
        "What does packing save, with texts as long as those of the published mixtures?",
        ("recipe",),
        less=("time ratio", "with a mask, time ratio", "memory ratio"),
    ),
    "data_pipeline": Measurement(
        "How fast do videos become training batches?", ("video", "workers"), more=("speed-up",)
    ),
    "decoding": Measurement(
        "How fast are frames sampled and decoded, beside the plain libraries?",
        ("video", "library"),
        more=("ours / plain", "our default / plain"),
    ),
    "evaluation": Measurement("How fast are a benchmark's questions answered?", ("set", ""), more=("speed-up",)),
    "serve": Measurement(
        "How many answers a second does the server give?", ("answers", "", "clients"), more=("speed-up",)
    ),
    "loading": Measurement(
        "How much memory does loading weights take?", ("layout", "loaded by", "as"), less=("peak / weights",)
    ),
}

ENGINE = Measurement("Does an engine give the same answers, and how fast?", ("",), more=("speed-up",))

# Not run with the others, but on the page where they were measured: at the published size (--published, on a GPU), with
# an engine (`python -m benchmarks.engine --engine URL`), and in 4 and 8 bits (`python -m benchmarks.quantization`).
ON_REQUEST: Mapping[str, Measurement] = {
    **{
        f"{name}_published": replace(MEASUREMENTS[name], question=f"{MEASUREMENTS[name].question} The published size.")
        for name in ("training_step", "masking", "packing")
    },
    "quantization": Measurement(
        "How much memory and time does the published size take in 4 and 8 bits on a CPU?",
        ("",),
        less=("peak / float16 weights",),
    ),
    "engine": ENGINE,
    "engine_smollm2": replace(ENGINE, question=f"{ENGINE.question} With SmolLM2-135M as language model."),
}
