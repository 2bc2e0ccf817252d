"""Reading, checking, describing and writing the settings."""

import dataclasses
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from eightgig.config import (
    AUTO,
    Config,
    DataConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    default_cache_dir,
    describe_settings,
    example_config,
    is_safe_name,
    read_config,
    setting_groups,
    write_config,
    write_example,
)
from eightgig.errors import ConfigError
from eightgig.run.log import hide_home

MINIMAL = "model:\n  name: some/model\ndata:\n  path: data.jsonl\n"


def _write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _read(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> Config:
    return read_config(_write(folder, text), overrides)


def _faults(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """One text for each fault: place within the file, message and fix."""
    with pytest.raises(ConfigError) as caught:
        _read(folder, text, overrides)
    error = caught.value
    assert error.exit_code == 2
    assert all(finding.why for finding in error.findings)
    prefix = f"{folder / 'config.yaml'}:"
    return [
        f"{finding.place}{finding.message} {finding.fix}".replace(prefix, "")
        for finding in error.findings
    ]


def _fault(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    (only,) = _faults(folder, text, overrides)
    return only


def test_there_are_at_most_60_settings() -> None:
    assert sum(len(names) for names in setting_groups().values()) <= 60


def test_every_setting_has_a_sentence() -> None:
    for setting in describe_settings():
        assert setting.help.endswith((".", ")", "..."))
        assert len(setting.help) <= 96, setting.name
        assert "\n" not in setting.help


def test_what_is_not_written_has_its_default(tmp_path: Path) -> None:
    config = _read(tmp_path, MINIMAL)
    assert config.lora == LoraConfig()
    assert config.train == TrainConfig()
    assert config.memory == MemoryConfig()


def test_values_are_read_as_the_type_of_their_setting(tmp_path: Path) -> None:
    config = _read(
        tmp_path,
        MINIMAL
        + """
  held_out: 50
  packing: no
  columns: {prompt: question}
lora:
  target_modules: [q_proj, v_proj]
train:
  learning_rate: 2e-4
  num_train_epochs: 2
  trial: false
memory:
  budget: 6750MiB
  host_budget: 17179869184
  micro_batch_tokens: 4_096
  offload: []
""",
    )
    assert config.data.held_out == 50.0
    assert config.data.packing is False
    assert config.data.columns == {"prompt": "question"}
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.train.learning_rate == 2e-4
    assert config.train.num_train_epochs == 2.0
    assert config.train.trial is False
    assert config.memory.budget == 6750 << 20
    assert config.memory.host_budget == 16 << 30
    assert config.memory.micro_batch_tokens == 4096
    assert config.memory.offload == ()
    assert config.memory.layer_slots == AUTO


def test_a_commit_is_text_though_it_looks_like_a_number(tmp_path: Path) -> None:
    config = _read(tmp_path, MINIMAL.replace("data:", '  revision: "0123456"\ndata:'))
    assert config.model.revision == "0123456"


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    text = MINIMAL.replace("data:", "train:\n  num_epochs: 3\ndata:")
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, text)
    assert caught.value.message == f'{tmp_path / "config.yaml"}:4: unknown key "num_epochs".'
    assert caught.value.fix == 'Write "num_train_epochs".'


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("base_model", 'Write "name" under "model".'),
        ("model_name_or_path", 'Write "name" under "model".'),
        ("sequence_len", 'Write "max_length" under "data".'),
        ("cutoff_len", 'Write "max_length" under "data".'),
        ("max_seq_length", 'Write "max_length" under "data".'),
        ("val_set_size", 'Write "held_out" under "data".'),
        ("lora_r", 'Write "r" under "lora".'),
        ("lora_rank", 'Write "r" under "lora".'),
        ("micro_batch_size", 'Write "per_device_train_batch_size" under "train".'),
        ("learning-rate", 'Write "learning_rate" under "train".'),
        ("Learning Rate", 'Write "learning_rate" under "train".'),
        ("learing_rate", 'Write "learning_rate" under "train".'),
        ("lora.r", 'Write "r" under "lora".'),
        ("lr", 'Write "learning_rate" under "train".'),
        ("memmory", 'Write "memory".'),
        ("logging_steps", "Delete the line: every optimizer step is logged."),
        ("bf16", "Delete the line: the compute type follows the GPU."),
        ("xyzzy", "Delete the line, or write one of model, data, lora, train, memory, run."),
    ],
)
def test_names_of_other_tools_are_known(tmp_path: Path, key: str, fix: str) -> None:
    assert _fault(tmp_path, f"{key}: 1\n{MINIMAL}") == f'1: unknown key "{key}". {fix}'


def test_a_key_in_the_wrong_group_is_sent_to_its_own(tmp_path: Path) -> None:
    fault = _fault(tmp_path, MINIMAL + "lora:\n  learning_rate: 1\n")
    assert fault == '6: unknown key "learning_rate". Write "learning_rate" under "train".'


def test_every_name_offered_exists() -> None:
    from eightgig.config.names import _SYNONYMS

    known = {f"{group}.{name}" for group, names in setting_groups().items() for name in names}
    assert set(_SYNONYMS.values()) <= known
    assert not set(_SYNONYMS) & {name for names in setting_groups().values() for name in names}


def test_all_faults_are_raised_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    faults = _faults(
        tmp_path,
        """\
model:
  nme: some/model
lora:
  r: sixteen
  lora_dropout: 1.0
train:
  learning_rate: -1e-4
  optim: adamw8bit
  seed: 1
  seed: 2
""",
    )
    assert faults == [
        '1: "name" is missing under "model". Add "name: ..." under "model".',
        '1: "path" is missing under "data". Add "path: ..." under "data".',
        '2: unknown key "nme". Write "name".',
        '4: "r" is the text "sixteen". Write a whole number.',
        '5: "lora_dropout" is 1. Write a share from 0 to below 1.',
        '7: "learning_rate" is -0.0001. Write a number above 0.',
        '8: "optim" is the text "adamw8bit". Write "adamw_8bit".',
        '10: "seed" stands here a second time (first in line 9). Delete one of the two lines.',
    ]


@pytest.mark.parametrize(
    "line",
    [
        "lora:\n  r: 16.0",
        'lora:\n  r: "16"',
        "lora:\n  r: true",
        "lora:\n  r: null",
        "lora:\n  r: [16]",
        "lora:\n  use_rslora: 1",
        "lora:\n  target_modules: 3",
        "lora:\n  target_modules: [q_proj, 3]",
        "lora:\n  target_modules: {q_proj: v_proj}",
        "lora: 16",
        "lora: [r]",
        "train:\n  learning_rate: fast",
        "train:\n  learning_rate: .nan",
        "train:\n  learning_rate: nan",
        "train:\n  learning_rate: .inf",
        "train:\n  learning_rate: 1e999",
        "train:\n  lr_scheduler_type: 3",
        "memory:\n  budget: much",
        "memory:\n  budget: 7.5",
        "memory:\n  budget: true",
        "run:\n  name: true",
        "run:\n  name: 2024",
        "run:\n  name: !!python/object/apply:os.getcwd []",
        "run:\n  name: !secret x",
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, line: str) -> None:
    assert _fault(tmp_path, MINIMAL + line + "\n").startswith(("5: ", "6: "))


@pytest.mark.parametrize(
    "line",
    [
        "lora:\n  r: 0",
        "lora:\n  r: -8",
        "lora:\n  lora_alpha: 0",
        "lora:\n  lora_dropout: 1",
        "lora:\n  lora_dropout: -0.1",
        "lora:\n  target_modules: []",
        'lora:\n  target_modules: [""]',
        'lora:\n  target_modules: ""',
        "lora:\n  target_modules: all-linear",
        'lora:\n  target_modules: "q_proj("',
        "train:\n  num_train_epochs: 0",
        "train:\n  max_steps: 0",
        "train:\n  max_steps: -2",
        "train:\n  per_device_train_batch_size: 0",
        "train:\n  gradient_accumulation_steps: 0",
        "train:\n  learning_rate: 0",
        "train:\n  learning_rate: -2e-4",
        "train:\n  warmup_ratio: 1.5",
        "train:\n  warmup_ratio: -0.1",
        "train:\n  warmup_steps: -1",
        "train:\n  weight_decay: -0.1",
        "train:\n  adam_beta1: 1",
        "train:\n  adam_beta2: -1",
        "train:\n  adam_epsilon: 0",
        "train:\n  max_grad_norm: -0.3",
        "train:\n  seed: -1",
        "memory:\n  budget: 8",
        "memory:\n  host_budget: 0",
        "memory:\n  layer_slots: 0",
        "run:\n  save_steps: -1",
        "run:\n  save_minutes: -1",
        "run:\n  save_total_limit: 0",
        "run:\n  name: ../elsewhere",
        'run:\n  name: ""',
        "run:\n  name: a/b",
        "run:\n  output_dir: ''",
    ],
)
def test_an_impossible_value_is_refused(tmp_path: Path, line: str) -> None:
    assert _fault(tmp_path, MINIMAL + line + "\n").startswith("6: ")


@pytest.mark.parametrize(
    "line",
    [
        'path: [a.jsonl, ""]',
        "held_out: -1",
        "held_out: 1.5",
        "max_length: 1",
        "max_length: 0",
        "path: ''",
        "path: []",
    ],
)
def test_an_impossible_value_of_the_data_is_refused(tmp_path: Path, line: str) -> None:
    text = "model:\n  name: some/model\ndata:\n"
    text += f"  {line}\n" if line.startswith("path") else f"  path: data.jsonl\n  {line}\n"
    assert _fault(tmp_path, text).startswith(("4: ", "5: "))


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (("train.warmup_steps=5", "train.warmup_ratio=0.1"), "warmup_ratio"),
        (("data.held_out_path=e.jsonl", "data.held_out=0.2"), "held_out"),
        (("data.held_out=0", "data.group_column=id"), "group_column"),
        (("data.held_out_path=e.jsonl", "data.group_column=id"), "group_column"),
        (("data.held_out=0", "train.early_stopping_patience=3"), "early_stopping_patience"),
        (("run.eval_steps=0", "train.early_stopping_patience=3"), "early_stopping_patience"),
        (("data.split=test",), "split"),
        (("data.format=text", "data.train_on=last_assistant"), "train_on"),
        (("data.format=text", "data.chat_template=some/model"), "chat_template"),
        (("model.name=./here", "model.revision=main"), "revision"),
        (("model.name=./here", "model.delete_download=true"), "delete_download"),
        (("model.name=demo", "model.revision=main"), "revision"),
        (("memory.device=cpu", "memory.kernels=triton"), "kernels"),
    ],
)
def test_a_setting_without_effect_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], fault: str
) -> None:
    assert f'"{fault}" has no effect' in _fault(tmp_path, MINIMAL, overrides)


def test_settings_of_the_command_line_go_over_those_of_the_file(tmp_path: Path) -> None:
    overrides = ("train.num_train_epochs=2", "memory.budget=8GiB", "memory.budget=7GiB")
    config = _read(tmp_path, MINIMAL + "train:\n  num_train_epochs: 5\n", overrides)
    assert config.train.num_train_epochs == 2.0
    assert config.memory.budget == 7 << 30


def test_the_command_line_can_write_every_kind_of_value(tmp_path: Path) -> None:
    overrides = (
        "run.name=2024",
        "data.columns={prompt: question}",
        "lora.target_modules=[q_proj]",
        "data.chat_template=null",
        "model.cache_dir=",
    )
    fault = _fault(tmp_path, MINIMAL, overrides)
    assert fault.startswith('--set model.cache_dir: "cache_dir" is nothing.')
    config = _read(tmp_path, MINIMAL, overrides[:-1])
    assert config.run.name == "2024"
    assert config.data.columns == {"prompt": "question"}
    assert config.data.chat_template is None


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.num_epochs=2", '--set train.num_epochs: unknown key "num_epochs".'),
        ("train.num_epochs=2", 'Write "train.num_train_epochs".'),
        ("learning_rate=2", 'Write "train.learning_rate".'),
        ("lora_r=2", 'Write "lora.r".'),
        ("lora.r=x", '--set lora.r: "r" is the text "x". Write a whole number.'),
        ("lora.r=0", '--set lora.r: "r" is 0.'),
        ("lora.r", "--set lora.r: there is no value. Write --set lora.r=VALUE."),
        ("lora.target_modules=[q_proj", "--set lora.target_modules: this is not a config: "),
        ("=3", '--set : unknown key "".'),
    ],
)
def test_a_fault_on_the_command_line_names_the_argument(
    tmp_path: Path, override: str, fault: str
) -> None:
    assert fault in _fault(tmp_path, MINIMAL, (override,))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: [\n", 2),
        ("model:\n\tname: x\n", 2),
        ("model: {name: x}}\n", 1),
        ("a: 1\n---\nb: 2\n", 2),
        ("model: &m {name: x}\ndata: *m\n", 2),
        ("model: " + "[" * 100 + "]" * 100, 1),
        ('model: "\\x00 \x01"', 1),
    ],
)
def test_what_is_no_config_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    assert _fault(tmp_path, text).startswith(f"{line}: this is not a config: ")


def test_a_list_is_no_config(tmp_path: Path) -> None:
    assert "a config is a list." in _faults(tmp_path, "- model\n")[0]


def test_an_empty_file_lacks_the_two_settings_without_a_default(tmp_path: Path) -> None:
    assert [fault[:11] for fault in _faults(tmp_path, "")] == ['1: "name" i', '1: "path" i']


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)
    ]
    started = time.monotonic()
    assert "aliases" in _fault(tmp_path, "\n".join(levels))
    assert time.monotonic() - started < 2


def test_a_data_file_given_as_config_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path, "#" * (256 * 1024 + 1))
    with pytest.raises(ConfigError, match=r"is 256\.0 KiB large"):
        read_config(path)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(tmp_path / "nothing.yaml")


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"model:\n  name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:2: byte 18 is not UTF-8"):
        read_config(path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert read_config(path).model.name == "some/model"


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    elsewhere = tmp_path / "elsewhere"
    (home / "models" / "mine").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = _read(
        home,
        """\
model: {name: models/mine, cache_dir: cache}
data: {path: [a.jsonl, "more/*.csv", owner/set], held_out_path: ../held_out.jsonl}
lora: {init_adapter: old}
run: {output_dir: here}
""",
    )
    assert _read(home, MINIMAL).run.output_dir == str(home / "runs")
    assert config.model.name == str(home / "models" / "mine")
    assert config.model.cache_dir == str(home / "cache")
    assert config.data.path == (str(home / "a.jsonl"), str(home / "more/*.csv"), "owner/set")
    assert Path(config.data.held_out_path or "").resolve() == tmp_path / "held_out.jsonl"
    assert config.lora.init_adapter == str(home / "old")
    assert config.run.output_dir == str(home / "here")


def test_paths_of_the_command_line_are_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = _read(tmp_path, MINIMAL, ("data.path=mine.jsonl", "run.output_dir=../out"))
    assert config.data.path == str(tmp_path / "here" / "mine.jsonl")
    assert Path(config.run.output_dir).resolve() == tmp_path / "out"


def test_a_home_folder_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="~nobody-here/x: there is no such home folder"):
        _read(tmp_path, MINIMAL, ("model.cache_dir=~nobody-here/x",))

    def lost() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", lost)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "eightgig"
    assert hide_home("/home/ann/x") == "/home/ann/x"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(ConfigError, match="no home folder"):
        default_cache_dir()


def test_a_hub_name_stays_a_name(tmp_path: Path) -> None:
    config = _read(
        tmp_path,
        "model: {name: google/gemma-4-12B-it, revision: main}\n"
        "data: {path: owner/set, split: test, chat_template: google/gemma-4-E2B-it}\n",
    )
    assert config.model.name == "google/gemma-4-12B-it"
    assert config.data.path == "owner/set"
    assert config.data.chat_template == "google/gemma-4-E2B-it"


def test_the_demo_model_is_not_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert _read(tmp_path, MINIMAL.replace("some/model", "demo")).model.name == "demo"


def test_the_written_copy_reads_back_equal(tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(name="owner/name", revision="0123", cache_dir="/somewhere"),
        data=DataConfig(
            path=("/a.jsonl", "/ö 'b': #.jsonl"),
            columns={"prompt": "yes", "completion": "12"},
            chat_template="/t.jinja",
            max_length=1024,
            held_out=7.0,
            group_column="no",
        ),
        lora=LoraConfig(target_modules=r"layers\.[0-3]\..*(q|v)_proj", use_rslora=True),
        train=TrainConfig(learning_rate=1e-300, adam_epsilon=1e-12, trial=False, max_steps=7),
        memory=MemoryConfig(budget=123456789, offload=("down_proj",), kernels="plain"),
        run=RunConfig(name="1e5", output_dir="/runs", eval_steps=3),
    )
    assert _read(tmp_path, write_config(config)) == config


def test_the_written_copy_holds_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(model=ModelConfig(name="a/b"), data=DataConfig(path="data.jsonl"))
    written = yaml.safe_load(write_config(config))
    assert written["data"]["path"] == str(tmp_path / "data.jsonl")
    assert written["run"]["output_dir"] == str(tmp_path / "runs")


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(min_size=1).filter(lambda text: text.strip() != ""),
    rate=st.floats(min_value=1e-308, max_value=1e6, exclude_min=True),
    count=st.integers(min_value=1, max_value=1 << 62),
)
def test_any_value_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, name: str, rate: float, count: int
) -> None:
    folder = tmp_path_factory.mktemp("config")
    config = Config(
        model=ModelConfig(name="a/b"),
        data=DataConfig(path="/data.jsonl", columns={"text": name, name: "text"}),
        train=TrainConfig(learning_rate=rate),
        memory=MemoryConfig(micro_batch_tokens=count),
        run=RunConfig(output_dir="/runs"),
    )
    assert _read(folder, write_config(config)) == config


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("model:data\n -[]{}'\"#&*!|>%@`,?.\t0r=")))
def test_no_text_makes_anything_but_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = _write(tmp_path_factory.mktemp("config"), text)
    with pytest.raises(ConfigError):
        read_config(path)


def test_the_example_says_all_and_reads_as_the_defaults(tmp_path: Path) -> None:
    text = example_config({"model.name": "some/model", "data.path": "my data: 1.jsonl"})
    config = _read(tmp_path, text)
    assert config == _read(tmp_path, MINIMAL.replace("data.jsonl", '"my data: 1.jsonl"'))
    for setting in describe_settings():
        assert f"  # {setting.help}\n" in text


def test_every_commented_default_of_the_example_is_the_default(tmp_path: Path) -> None:
    text = example_config({"model.name": "some/model", "data.path": "data.jsonl"})
    for setting in describe_settings():
        text = text.replace(f"  # {setting.name}: ", f"  {setting.name}: ")
    assert _read(tmp_path, text) == _read(tmp_path, MINIMAL)


def test_an_example_is_never_written_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.yaml"
    write_example(path, {"model.name": "a/b", "data.path": "data.jsonl"})
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="exists already"):
        write_example(path, {"model.name": "c/d", "data.path": "data.jsonl"})
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("name", ["run", "Gemma 4.first-try_2", "1", "größe"])
def test_usual_run_names_are_safe(name: str) -> None:
    assert is_safe_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/abs", ".hidden", "a.", "a ", "con", "NUL.txt",
     "a\n", "a\0", "-rf", "C:", "x" * 101],
)  # fmt: skip
def test_names_that_leave_the_folder_or_break_a_system_are_not(name: str) -> None:
    assert not is_safe_name(name)


def test_settings_are_frozen(tmp_path: Path) -> None:
    config = _read(tmp_path, MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora.r = 8  # type: ignore[misc]
