"""Configuration: merging of layers, published YAMLs, and error messages of one sentence."""

import dataclasses
import logging
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from stllm.common.config import describe_changes, flat, load_config, model_types, save_config
from stllm.common.errors import UserError
from stllm.common.registry import Registry
from stllm.common.schema import ModelSettings, RunSettings

SECTIONS = "model, datasets, run, evaluation, suite"
PUBLISHED = """
model:
  arch: st_llm_hf
  model_type: instructblip_vicuna0
  use_grad_checkpoint: True
  max_txt_len: 256
  end_sym: "###"
  prompt_template: '###Human: {} ###Assistant: '
  llama_model: /weights/vicuna
  ckpt: /weights/instruct_blip_vicuna7b_trimmed.pth
  q_former_model: /weights/instruct_blip_vicuna7b_trimmed.pth
  qformer_text_input: True
  freeze_LLM: False
  video_input: residual
  residual_size: 16
  use_mask : True
  mvm_decode: True
preprocess:
  vis_processor: {train: {name: blip2_image_train}}
datasets:
  caption_videochat: {num_frames: 64, vis_processor: {train: {name: blip2_image_train}}}
  conversation_videochat1: {num_frames: 64}
  caption_videochatgpt: {num_frames: 64}
  caption_webvid: {num_frames: 64}
  vqa_webvid_qa: {num_frames: 64}
run:
  task: video_text_it
  bf16: True
  tf32: False
  output_dir: output
  num_train_epochs: 2
  dataloader_num_workers: 4
  per_device_train_batch_size: 16
  per_device_eval_batch_size: 16
  gradient_accumulation_steps: 1
  evaluation_strategy: "no"
  learning_rate: 2e-5
  weight_decay: 0.
  warmup_ratio: 0.03
  lr_scheduler_type: 'cosine'
  logging_steps: 50
  model_max_length: 1024
  save_strategy: "epoch"
  save_total_limit: 1
  deepspeed: 'stllm/train/zero2.json'
"""
TINY = "model: {model_type: tiny}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "my.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(path=None, options=(), model_type="tiny") -> str:
    """Load a configuration that must fail, and return the error's sentence."""
    with pytest.raises(UserError) as caught:
        load_config(path, options, model_type)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_published_recipe_loads_unchanged(write, caplog) -> None:
    caplog.set_level(logging.INFO)
    cfg = load_config(write(PUBLISHED))
    model: Any = OmegaConf.to_object(cfg.model)
    assert isinstance(model, ModelSettings)
    assert (model.video_input, model.use_mask, model.freeze_LLM) == ("residual", True, False)
    assert model.ckpt == model.q_former_model == "/weights/instruct_blip_vicuna7b_trimmed.pth"
    assert load_config(write(PUBLISHED), ["model.ckpt=''"]).model.ckpt is None  # an empty text names nothing
    assert (model.image_size, model.num_query_token, model.vit_model) == (None, None, "eva_clip_g")
    assert len(cfg.datasets) == 5 and all(entry == {"num_frames": 64} for entry in cfg.datasets.values())
    assert cfg.run.eval_strategy == "no" and cfg.run.learning_rate == 2e-5 and cfg.run.qa_sampling == "one"
    assert "tf32" not in cfg.run and "model_max_length" not in cfg.run and "evaluation_strategy" not in cfg.run
    unused = ("model.prompt_template", "run.tf32", "run.model_max_length", "section preprocess")
    for key in (*unused, "datasets.caption_videochat.vis_processor"):
        assert f"{key} has no effect: " in caplog.text


def test_trainer_arguments_can_be_built_from_a_published_run(write, tmp_path) -> None:
    from transformers import TrainingArguments

    run = OmegaConf.to_container(load_config(write(PUBLISHED)).run)
    assert isinstance(run, dict)
    ours = {f.name for f in dataclasses.fields(RunSettings)}
    given = {str(key): value for key, value in run.items() if key not in ours}
    arguments = TrainingArguments(**{**given, "output_dir": str(tmp_path), "bf16": False, "deepspeed": None})
    assert arguments.get_warmup_steps(1000) == 30


@pytest.mark.parametrize("name", model_types())
def test_shipped_defaults_load(name) -> None:
    cfg = load_config(model_type=name)
    assert cfg.model.model_type == name
    assert cfg.model.qformer_text_input == (not name.startswith("minigpt4"))
    assert cfg.model.vit_model == ("eva_btadapter_g" if "btadapter" in name else "eva_clip_g")
    assert cfg.datasets == {} and cfg.run == {}


def test_later_layers_override_earlier_ones(write) -> None:
    model = "model: {model_type: tiny, video_input: mean, vision: {depth: 6}}"
    path = write(model + "\ndatasets: {a: {fps: 1, num_frames: 2}}")
    cfg = load_config(path, ["model.vision.num_heads=2", "datasets.a.fps=3", "model.use_mask=yes"])
    assert (cfg.model.video_input, cfg.model.vision.depth, cfg.model.vision.num_heads) == ("mean", 6, 2)
    assert cfg.model.vision.embed_dim == 32 and cfg.model.use_mask is True
    assert cfg.datasets == {"a": {"fps": 3, "num_frames": 2}}


def test_the_defaults_are_chosen_after_the_overrides_are_read(write, monkeypatch) -> None:
    path = write("model: {model_type: instructblip_vicuna0}")
    assert load_config(path, model_type="minigpt4_vicuna0").model.model_type == "instructblip_vicuna0"
    assert load_config(path, ["model.model_type=tiny"]).model.vision.embed_dim == 32
    monkeypatch.setenv("FAMILY", "tiny")
    assert load_config(path, ["model.model_type=${oc.env:FAMILY}"]).model.vision.embed_dim == 32


def test_changing_the_architecture_drops_the_default_keys() -> None:
    llm = load_config(None, ["model.llm.model_type=gpt2", "model.llm.n_embd=8"], "tiny").model.llm
    assert llm == {"model_type": "gpt2", "n_embd": 8}
    assert load_config(None, ["model.llm.num_hidden_layers=1"], "tiny").model.llm.hidden_size == 48


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("model.num_query_tokn=3", "unknown key 'model.num_query_tokn'; did you mean 'num_query_token'?"),
        ("model.freeze_llm=true", "unknown key 'model.freeze_llm'; did you mean 'freeze_LLM'?"),
        ("model.vision.dept=3", "unknown key 'model.vision.dept'; did you mean 'depth'?"),
        ("model.qformer.zzz=3", "unknown key 'model.qformer.zzz'; known are cross_attention_frequency, dropout, "),
        ("model.num_query_token=many", "'model.num_query_token' must be a whole number, found 'many'"),
        ("model.num_query_token=2.5", "'model.num_query_token' must be a whole number, found 2.5"),
        ("model.residual_size=null", "'model.residual_size' must be a whole number, found None"),
        ("model.vision.depth=x", "'model.vision.depth' must be a whole number, found 'x'"),
        ("model.freeze_vit=maybe", "'model.freeze_vit' must be true or false, found 'maybe'"),
        ("model.drop_path_rate=[1]", "'model.drop_path_rate' must be a number, found [1]"),
        ("model.lora_target_modules=q", "'model.lora_target_modules' must be a list, found 'q'"),
        ("model.lora_target_modules={a: 1}", "'model.lora_target_modules' must be a list, found {'a': 1}"),
        ("model.lora_target_modules=[null]", "'model.lora_target_modules[0]': "),
        ("model.image_size=99999999999999999999", "'model.image_size' must be between -2**63 and 2**63, found a"),
        ("model.llm=3", "'model.llm' must be a mapping of keys, found 3"),
        ("model=3", "'model' must be a mapping of keys, found 3"),
        ("model.video_input=resid", "unknown model.video_input 'resid': known are all, mean, residual; did you mean"),
        ("model.model_type=tini", "unknown model.model_type 'tini': known are "),
        ("model.vit_chunk_size=0", "'model.vit_chunk_size' must be at least 1, found 0"),
        ("model.mask_rate_max=2", "'model.mask_rate_max' must be from 0 to 1, found 2.0"),
        ("model.mask_rate_min=0.9", "'model.mask_rate_min' must not exceed 'model.mask_rate_max', found 0.9 and 0.7"),
        (
            "modl.video_input=all",
            "unknown section 'modl', expected model, datasets, run, evaluation, suite; did you mean 'model'?",
        ),
        (
            "video_input=all",
            "unknown section 'video_input', expected model, datasets, run, evaluation, suite; did you mean 'model.vid",
        ),
        ("model.video_input", "found 'model.video_input', expected key=value"),
        ("=3", "found '=3', expected key=value"),
        ("model.ckpt={x: 1", "'model.ckpt={x: 1' has a value that is not valid YAML"),
        ("model.ckpt=${oc.env:STLLM_UNSET}", "'model.ckpt': environment variable 'STLLM_UNSET' not found: set it"),
        ("model.ckpt=${model.nothing}", "'model.ckpt': Interpolation key 'model.nothing' not found"),
        ("run.output_dir=???", "'run.output_dir' is left open (???): give it a value"),
        ("run.lerning_rate=1", "unknown key 'run.lerning_rate'; did you mean 'learning_rate'?"),
        ("run.learning_rate=fast", "'run.learning_rate' must be a number, found 'fast'"),
        ("run.qa_sampling=some", "unknown run.qa_sampling 'some': known are all, one"),
        ("model.end_sym=''", "'model.end_sym' must not be empty, found ''"),
        ("run.max_tries=0", "'run.max_tries' must be at least 1, found 0"),
    ],
)
def test_an_error_in_the_options(option, sentence) -> None:
    assert message(options=[option]).startswith(f"--options: {sentence}")


def test_an_error_names_its_file(write) -> None:
    path = write("model: {model_type: tiny, num_query_token: many}")
    assert message(path, ["model.residual_size=2"]).startswith(f"{path}: 'model.num_query_token' must be")
    path = write("model: {model_type: tiny, mvm_decod: True}")
    assert message(path).startswith(f"{path}: unknown key 'model.mvm_decod'; did you mean 'mvm_decode'?")
    path = write(TINY + "run: {bf17: True}")
    assert message(path).startswith(f"{path}: unknown key 'run.bf17'; did you mean 'bf16'?")
    path = write("model: {video_input: '${oc.env:STLLM_UNSET}'}")
    assert message(path, ["model.model_type=tiny"]).startswith(f"{path}: 'model.video_input': environment variable")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [1", ", line "),
        ("model:\n\tx: 1", ", line 2: not valid YAML"),
        ("run: {}\nrun: {}", ", line 2: not valid YAML (found duplicate key run)"),
        ("[1, 2]", ": the file must be a mapping of keys, found [1, 2]"),
        ("just words", ": "),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(write, text, sentence) -> None:
    path = write(text)
    assert message(path).startswith(f"{path}{sentence}")


def test_an_unreadable_file_is_refused(tmp_path) -> None:
    assert message(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file, expected a YAML configuration"
    assert message(tmp_path) == f"{tmp_path}: a folder, expected a YAML configuration"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert message(tmp_path / "binary.yaml").startswith(f"{tmp_path}/binary.yaml: not valid YAML")


def test_empty_files_and_sections_are_accepted(write) -> None:
    assert load_config(write(""), model_type="tiny").model.video_input == "all"
    assert load_config(write("model:\nrun:\ndatasets:\n"), model_type="tiny").run == {}


def test_a_file_overrides_its_base(write, tmp_path) -> None:
    (tmp_path / "base").mkdir()
    run = "run: {learning_rate: 1e-4, warmup_ratio: 0.5}"
    write(TINY + "datasets: {a: {fps: 1, num_frames: 2}}\n" + run, "base/common.yaml")
    write("base: base/common.yaml\nmodel: {video_input: mean, ckpt: ./w}", "middle.yaml")
    path = write("base: ./middle.yaml\ndatasets: {a: {fps: 3}}\nrun: {warmup_steps: 7}")
    cfg = load_config(path, ["run.learning_rate=1e-5"])
    assert (cfg.model.model_type, cfg.model.video_input, cfg.model.ckpt) == ("tiny", "mean", str(tmp_path / "w"))
    assert cfg.datasets == {"a": {"fps": 3, "num_frames": 2}}
    assert (cfg.run.learning_rate, cfg.run.warmup_steps) == (1e-5, 7)


def test_paths_in_a_base_are_relative_to_it(write, tmp_path, monkeypatch) -> None:
    (tmp_path / "base").mkdir()
    write("model: {model_type: tiny, ckpt: ../weights}", "base/common.yaml")
    path = write("base: base/common.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config("my.yaml").model.ckpt == str(tmp_path / "weights") == load_config(path).model.ckpt


def test_an_error_in_a_base(write, tmp_path, monkeypatch) -> None:
    write(TINY + "run: {bf17: True}", "base.yaml")
    path = write("base: base.yaml")
    assert message(path).startswith(f"{tmp_path}/base.yaml: unknown key 'run.bf17'")
    monkeypatch.chdir(tmp_path)
    assert message("my.yaml").startswith("base.yaml: unknown key 'run.bf17'")
    assert message(write("base: bases.yaml")) == (
        f"{path}: 'base' names {tmp_path}/bases.yaml, which is no file: give its path relative to this YAML"
    )
    assert message(write("base: [a, b]")) == f"{path}: 'base' must be the path of a YAML file, found ['a', 'b']"
    assert message(write("bas: base.yaml")).endswith("did you mean 'base'?")
    assert message(options=["base=x.yaml"]).startswith(
        "--options: unknown section 'base', expected model, datasets, run"
    )
    write("base: my.yaml", "base.yaml")
    assert "base.yaml: 'base' names " in message(write("base: base.yaml")) and "in turn" in message(path)
    assert "in turn" in message(write("base: my.yaml"))


def test_a_model_type_must_be_named_somewhere(write) -> None:
    assert message(model_type=None).startswith("model.model_type is not set: name one of instructblip_vicuna0, ")
    path = write("model: {video_input: all}")
    assert message(path, model_type=None).startswith(f"{path}: model.model_type is not set")


def test_renamed_and_dropped_trainer_arguments(write) -> None:
    run = load_config(write(TINY + "run: {no_cuda: True, adafactor: True, evaluation_strategy: no, device: cuda}")).run
    assert run.use_cpu is True and run.optim == "adafactor" and run.eval_strategy == "no"
    assert "device" not in run and "no_cuda" not in run
    path = write(TINY + "run: {evaluation_strategy: steps, eval_strategy: steps}")
    assert "'run.evaluation_strategy' is the old name of 'run.eval_strategy' and both are given" in message(path)
    path = write(TINY + "run: {evaluation_strategy: steps}")
    assert load_config(path, ["run.eval_strategy=epoch"]).run.eval_strategy == "epoch"


def test_text_from_the_environment_becomes_numbers(write, monkeypatch) -> None:
    monkeypatch.setenv("LR", "3e-4")
    monkeypatch.setenv("FRAMES", "7")
    text = "model: {model_type: tiny, residual_size: '${oc.env:FRAMES}'}\nrun: {learning_rate: '${oc.env:LR}'}"
    cfg = load_config(write(text))
    assert cfg.model.residual_size == 7 and cfg.run.learning_rate == 3e-4
    monkeypatch.setenv("FRAMES", "some")
    assert "'model.residual_size' must be a whole number" in message(write(text))


def test_relative_paths_are_relative_to_the_yaml(write, tmp_path, monkeypatch) -> None:
    (tmp_path / "vicuna").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    path = write(
        "model: {model_type: tiny, llama_model: vicuna, ckpt: ./new, q_former_model: ../up.pth, vit_ckpt: ~/vit.pth}\n"
        "datasets: {a: {anno_root: data, media_root: /data, sampling: data}}\n"
        "run: {deepspeed: ./zero2.json, output_dir: o}"
    )
    cfg = load_config(path, ["model.qformer_tokenizer=./bert"])
    assert cfg.model.llama_model == str(tmp_path / "vicuna")
    assert cfg.model.ckpt == str(tmp_path / "new")
    assert cfg.model.q_former_model == str(tmp_path.parent / "up.pth")
    assert cfg.model.vit_ckpt == str(tmp_path / "vit.pth")
    assert cfg.model.qformer_tokenizer == str(elsewhere / "bert")
    assert cfg.datasets.a == {"anno_root": str(tmp_path / "data"), "media_root": "/data", "sampling": "data"}
    assert cfg.run.deepspeed == str(tmp_path / "zero2.json") and cfg.run.output_dir == "o"


def test_hub_names_are_not_changed(write) -> None:
    cfg = load_config(write("model: {model_type: tiny, llama_model: lmsys/vicuna-7b-v1.1}"))
    assert cfg.model.llama_model == "lmsys/vicuna-7b-v1.1"
    assert cfg.model.qformer_tokenizer is None  # the checkpoint's, or else bert-base-uncased


def test_a_saved_configuration_loads_equal(write, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ROOT", "/data")
    cfg = load_config(write(PUBLISHED), ["datasets.a.anno_root=${oc.env:ROOT}", "model.system='a: #b'"])
    save_config(cfg, tmp_path / "out" / "config.yaml")
    monkeypatch.delenv("ROOT")
    assert load_config(tmp_path / "out" / "config.yaml") == cfg
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


def test_a_saved_configuration_without_a_run_loads_equal(tmp_path) -> None:
    cfg = load_config(model_type="tiny")
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_names_come_from_the_registries() -> None:
    fields = {f.name: f for f in dataclasses.fields(ModelSettings) if isinstance(f.metadata.get("choices"), Registry)}
    assert set(fields) == {"arch", "vit_model", "video_input", "template"}
    for name, f in fields.items():
        names = f.metadata["choices"]
        assert f.default is None or f.default in names  # a default is not looked up
        for known in names:
            assert load_config(options=[f"model.{name}={known}"], model_type="tiny").model[name] == known
    assert load_config(options=["model.arch=st_llm"], model_type="tiny").model.arch == "st_llm"  # an alias


def test_training_arguments_are_imported_only_for_a_run_section() -> None:
    import subprocess
    import sys

    code = "import sys; from stllm.common.config import load_config; load_config(model_type='tiny')"
    code += "; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


FIELDS = [f for f in dataclasses.fields(ModelSettings) if f.type in (int, "int") and "low" in f.metadata]


@given(values=st.fixed_dictionaries({}, optional={f.name: st.integers(1, 10**6) for f in FIELDS}))
@settings(max_examples=25, deadline=None)
def test_every_whole_number_key_takes_a_whole_number(values) -> None:
    cfg = load_config(None, [f"model.{name}={value}" for name, value in values.items()], "tiny")
    assert {name: cfg.model[name] for name in values} == values


@given(option=st.text(string.printable, max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_option_is_accepted_or_refused_with_a_sentence(option) -> None:
    try:
        load_config(None, ["model." + option], "tiny")
    except UserError as error:
        assert str(error)


@given(text=st.text(max_size=40))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_accepted_or_refused_with_a_sentence(tmp_path, text) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_config(path, model_type="tiny")
    except UserError as error:
        assert str(error).startswith(str(path))


@given(system=st.text(string.ascii_letters + string.digits + " .,:;#'\"{}[]-_\n\t!?é×", max_size=60))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_system_message_survives_saving(tmp_path, system) -> None:
    cfg = load_config(model_type="tiny")
    cfg.model.system = system
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").model.system == system


def test_nested_settings_have_dotted_keys() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "d": [2]}


def test_the_first_change_is_described_and_others_are_listed() -> None:
    assert describe_changes({"a": 1}, {"a": 1}) == ""
    assert describe_changes({"a": 1}, {"a": "1"}) == "a was 1 and is now '1'"
    assert describe_changes({"b": 1, "a": 0}, {"c": 2, "a": 0}) == "b was 1 and is now None (and 1 more: c)"
    many = describe_changes({}, {f"k{number}": number for number in range(9)})
    assert many == "k0 was None and is now 0 (and 8 more: k1, k2, k3, k4, k5)"
