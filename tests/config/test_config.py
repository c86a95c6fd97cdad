"""The config: TOML files contain only changes to defaults; errors name unknown or contradictory settings."""

import dataclasses

import pytest

from cpr_fast.config import Config, ConfigError, Cycle, load
from cpr_fast.config.sections import CONVOLUTIONAL


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_file_overrides_only_what_it_names(tmp_path):
    config = load(write(tmp_path, "[data]\nbatch_size = 8\n[optim]\nlr = 1\n"))
    assert config.data.batch_size == 8
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config == dataclasses.replace(
        Config(),
        data=dataclasses.replace(Config().data, batch_size=8),
        optim=dataclasses.replace(Config().optim, lr=1.0),
    )


def test_cycles_are_read_as_written(tmp_path):
    text = """
    [schedule]
    cycles = [
      { view = "rgb", epochs = 3, mining = "none", milestones = [1, 2] },
      { view = "flow", epochs = 2, top_k = 1, lr = 1e-4 },
    ]
    """
    assert load(write(tmp_path, text)).schedule.cycles == (
        Cycle("rgb", 3, "none", (1, 2)),
        Cycle("flow", 2, "cascade", (), 1, 1e-4),
    )


def test_round_trip_through_json_data():
    config = Config()
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[data]\nbatchsize = 8",
            "unknown key 'data.batchsize'; did you mean 'batch_size'\\? valid keys: index, split",
        ),
        ("[optimizer]\nlr = 1", "unknown key 'optimizer'; did you mean 'optim'. valid keys: data, model"),
        ("[data]\nbatch_size = '8'", "data.batch_size: expected int, got '8'"),
        ("[data]\nbatch_size = true", "data.batch_size: expected int, got True"),
        ("data = 3", "data: expected a table, got 3"),
        ("[data]\naugment = 'x'", "data.augment: expected one of 'coclr', 'iic', 'none', got 'x'"),
        ("[memory]\nsize = 8", "memory.size: expected at least data.batch_size = 16 entries, got 8"),
        ("[memory]\nsize = 0", "memory.size: expected a positive number, got 0"),
        ("[mining]\nratio = 1.5", r"mining.ratio: expected a fraction in \(0, 1\], got 1.5"),
        ("[mining]\ntop_k = 4096", r"top_k \(cycle 3\): expected 1..memory.size = 2048, got 4096"),
        ("[probe]\nlr = 0", "probe.lr: expected a positive number, got 0"),
        ("[finetune]\nbackbone_lr = -1", "finetune.backbone_lr: expected 0 or more, got -1"),
        ("[finetune]\ndropout = 1", r"finetune.dropout: expected a fraction in \[0, 1\), got 1"),
        ("[schedule]\ncycles = []", "schedule.cycles: expected at least one cycle"),
        ("[schedule]\ncycles = [{ view = 'rgb' }]", r"schedule.cycles\[0\] \(cycle 1\): missing 'epochs'"),
        ("[schedule]\ncycles = [{ view = 'rgb', epochs = 0 }]",
         r"cycles\[0\].epochs \(cycle 1\): expected at least 1, got 0"),
        ("[schedule]\ncycles = [{ view = 'rgb', epochs = 1 }, { view = 'rgb', epochs = 1.5 }]",
         r"schedule.cycles\[1\].epochs \(cycle 2\): expected int, got 1.5"),
        ("[schedule]\ncycles = [{ view = 'rgb', epoch = 1 }]",
         r"unknown key 'schedule.cycles\[0\].epoch' \(cycle 1\); did you mean 'epochs'"),
        ("[schedule]\ncycles = [{ view = 'rgb', epochs = 1, lr = inf }]",
         r"schedule.cycles\[0\].lr \(cycle 1\): expected a finite number"),
        ("[data]\nsize = 16", "data.size: model.arch 's3d' expects at least 5 frames of 17 pixels, got 32 of 16"),
        ("[data]\ncrop_area = 0", r"data.crop_area: expected a fraction in \(0, 1\], got 0.0"),
        ("[optim]\nlr = nan", "optim.lr: expected a finite number, got nan"),
        ("[data]\nbatch_size = 8\nbatch_size = 9", "not valid TOML"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


@pytest.mark.parametrize("arch", CONVOLUTIONAL)
def test_every_backbone_has_a_least_clip(tmp_path, arch):
    with pytest.raises(ConfigError, match=f"model.arch '{arch}' expects at least"):
        load(write(tmp_path, f"[model]\narch = '{arch}'\n[data]\nframes = 1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlr = inf", "optim.lr: expected a finite number, got inf"),
        ("[optim]\nweight_decay = nan", "optim.weight_decay: expected a finite number, got nan"),
        ("[optim]\nweight_decay = -1", "optim.weight_decay: expected 0 or more, got -1"),
        ("[optim]\nmomentum = -0.1", "optim.momentum: expected a fraction in 0..1, got -0.1"),
        ("[health]\nmin_feature_std = nan", "health.min_feature_std: expected a finite number, got nan"),
        ("[probe]\nlr = inf", "probe.lr: expected a finite number, got inf"),
        ("[finetune]\nweight_decay = -1", "finetune.weight_decay: expected 0 or more, got -1"),
        ("[memory]\nsize = 10_000_000_000_000", "memory.size: expected at most 2,147,483,647, got 10,000,000,000,000"),
        ("[data]\nframes = 9_999_999_999", "data.frames: expected at most"),
        ("[data]\nworkers = 100_000", "data.workers: expected at most 1,024, got 100,000"),
        ("[run]\nseed = 99999999999999999999", "run.seed: expected at most"),
        ("[run]\nout = ''", "run.out: expected the name of a folder, got ''"),
        ("[schedule]\ngamma = 0", "schedule.gamma: expected a positive number, got 0"),
        ("[schedule]\ncycles = [{view = 'rgb', epochs = 1, lr = -1}]", r"cycles\[0\].lr \(cycle 1\): expected a pos"),
        ("[schedule]\ncycles = [{view = 'rgb', epochs = 1, lr = nan}]", r"cycles\[0\].lr \(cycle 1\): expected a fin"),
        ("[schedule]\ncycles = [{view = 'rgb', epochs = 9, milestones = [2, -1]}]",
         r"schedule.cycles\[0\].milestones \(cycle 1\): expected epochs of 1 or more, got -1"),
    ],
)  # fmt: skip
def test_numbers_that_no_training_survives_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


@pytest.mark.parametrize(("name", "text"), [("deep.json", "[" * 100_000), ("deep.toml", "a = " + "[" * 100_000)])
def test_a_file_that_is_nested_too_deeply_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name}.*: its tables or lists are nested too deeply"):
        load(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("optim", "cycle", "message"),
    [
        ("warmup_epochs = -1", "", "optim.warmup_epochs: expected 0 or more, got -1.0"),
        ("", "warmup_epochs = -0.5", "cycles[0].warmup_epochs (cycle 1): expected 0 or more, got -0.5"),
        ("warmup_epochs = 3", "", "optim.warmup_epochs: expected at most the 2 epochs of cycle 1, got 3"),
        ("", "warmup_epochs = 2.5", "cycles[0].warmup_epochs (cycle 1): expected at most the 2 epochs of cycle 1, "
         "got 2.5"),
        ("final_lr = 0.1", "", "optim.final_lr: expected at most the learning rate of cycle 1, 0.001, got 0.1"),
        ("", "lr = 0.1, final_lr = 0.2", "cycles[0].final_lr (cycle 1): expected at most the learning rate of "
         "cycle 1, 0.1, got 0.2"),
        ("final_lr = -1e-5", "", "optim.final_lr: expected 0 or more, got -1e-05"),
        ("schedule = 'linear'", "", "optim.schedule: expected one of 'steps', 'cosine', got 'linear'"),
        ("", "schedule = 'linear'", "cycles[0].schedule (cycle 1): expected one of 'steps', 'cosine', got 'linear'"),
        ("name = 'adamax'", "", "optim.name: expected one of 'adam', 'adamw', 'sgd', "),
        ("", "momentum = 1.5", "cycles[0].momentum (cycle 1): expected a fraction in 0..1, got 1.5"),
        ("", "ema_momentum = -0.1", "cycles[0].ema_momentum (cycle 1): expected a fraction in 0..1, got -0.1"),
        ("", "final_ema_momentum = 2", "cycles[0].final_ema_momentum (cycle 1): expected a fraction in 0..1, got 2.0"),
        ("", "final_weight_decay = -1", "cycles[0].final_weight_decay (cycle 1): expected 0 or more, got -1.0"),
        ("final_weight_decay = -1", "", "optim.final_weight_decay: expected 0 or more, got -1.0"),
        ("betas = [0.9]", "", "optim.betas: expected two fractions in [0, 1), got [0.9]"),
        ("betas = [0.9, 1.0]", "", "optim.betas: expected two fractions in [0, 1), got [0.9, 1.0]"),
        ("eps = 0", "", "optim.eps: expected a positive number, got 0.0"),
        ("clip_norm = -1", "", "optim.clip_norm: expected 0 or more, got -1.0"),
        ("clip_norm = inf", "", "optim.clip_norm: expected a finite number, got inf"),
        ("lr = 0", "", "optim.lr: expected a positive number, got 0.0"),
        ("\n[memory]\nfinal_ema_momentum = 1.1", "", "memory.final_ema_momentum: expected a fraction in 0..1, got 1.1"),
    ],
)  # fmt: skip
def test_schedules_that_no_cycle_can_follow_are_named(tmp_path, optim, cycle, message):
    own = f", {cycle}" if cycle else ""
    text = f"[schedule]\ncycles = [{{view = 'rgb', epochs = 2{own}}}]\n[optim]\n{optim}"
    with pytest.raises(ConfigError) as refused:
        load(write(tmp_path, text))
    assert message in str(refused.value)


def test_a_cycle_may_need_what_the_common_setting_does_not_fit(tmp_path):
    text = "[optim]\nwarmup_epochs = 5\n[schedule]\ncycles = [{view='rgb', epochs=2, warmup_epochs=2, final_lr=1e-3}]"
    (cycle,) = (config := load(write(tmp_path, text))).schedule.cycles
    assert (cycle.applied_to(config.optim).warmup_epochs, config.optim.warmup_epochs) == (2.0, 5.0)
