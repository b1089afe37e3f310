"""The measurements, by module name: the question that each answers, and the columns of its table.

`python -m benchmarks` draws and compares only the ratios, because seconds and bytes depend on the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Measurement:
    """Describes one module of this package, for the page.

    question: the question it answers, with an explanation of columns that need one. labels: the columns that name a
    row. more, less: the columns of ratios for which a larger, or a smaller, value is better.
    """

    question: str
    labels: tuple[str, ...]
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()

    @property
    def ratios(self) -> tuple[str, ...]:
        """All columns that are drawn and compared."""
        return self.more + self.less


MEASUREMENTS: Mapping[str, Measurement] = {
    "startup": Measurement("How long does a command take to start?", ("",), less=("× the interpreter alone",)),
    "encoding": Measurement(
        "How fast is the image encoder at its published size? The peak is the speed of its matrix products alone. "
        "Also: the share of the time in bfloat16 that each of the slowest operators takes (in brackets torch's name).",
        ("",),
        more=("speed-up", "share of peak"),
    ),
    "beams": Measurement(
        "How long does beam search take? Equal ids: answers with the same token ids as the baseline's.",
        ("prompts", "beams"),
        more=("speed-up",),
    ),
    "reuse": Measurement(
        "How long do many questions about one video take? MiB kept: the size of the cache. MiB at most: the peak "
        "memory above that before the questions.",
        ("",),
        more=("speed-up",),
    ),
    "training_step": Measurement(
        "How much time and memory does a training step with masking and MVM take, compared with a plain "
        "implementation? Logits' share: the part of the multiplications that computes logits.",
        ("vocabulary", "checkpointing"),
        less=("time ratio", "memory ratio"),
    ),
    "masking": Measurement(
        "How much time and memory does masking save in training, for each number of frames?",
        ("frames",),
        less=("masked, time", "masked with MVM, time", "masked, memory", "masked with MVM, memory"),
    ),
    "packing": Measurement(
        "How much time and memory does packing save, with texts as long as in the published data? Padding: its share "
        "of all positions in many batches, and in the few that are timed. With a mask: packed, but with a mask between "
        "the samples instead of separate attention.",
        ("recipe",),
        less=("time ratio", "with a mask, time ratio", "memory ratio"),
    ),
    "data_pipeline": Measurement(
        "How fast are videos turned into training batches?", ("video", "workers"), more=("speed-up",)
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
        "How much memory does loading a checkpoint need? Peak / weights: the peak memory divided by the size of the "
        "loaded weights.",
        ("layout", "loaded by", "as"),
        less=("peak / weights",),
    ),
}

ENGINE = Measurement(
    "Does an inference engine such as vLLM give the same answers as this package, and how fast? Equal ids: answers "
    "with the same token ids as the baseline's.",
    ("",),
    more=("speed-up",),
)

# `python -m benchmarks` does not run these, but shows their results: at the published size (--published, on a GPU),
# with an engine (`python -m benchmarks.engine --engine URL`), in 4 and 8 bits (`python -m benchmarks.quantization`).
ON_REQUEST: Mapping[str, Measurement] = {
    **{
        f"{name}_published": replace(MEASUREMENTS[name], question=f"{MEASUREMENTS[name].question} Published size.")
        for name in ("training_step", "masking", "packing")
    },
    "quantization": Measurement(
        "How much memory and time does the published model need on a CPU, in 4 and 8 bits?",
        ("",),
        less=("peak / float16 weights",),
    ),
    "engine": ENGINE,
    "engine_smollm2": replace(ENGINE, question=f"{ENGINE.question} The language model is SmolLM2-135M."),
}
