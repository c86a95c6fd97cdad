"""Stands in for wandb 0.31: records the calls. Parameters and their kinds are those of the package."""

from __future__ import annotations

from recording import record


class Settings:
    def __init__(self, **data):
        self.data = data


class Metric:
    pass


class Config(dict):
    def update(self, d, allow_val_change=None):
        record("config.update", d=d, allow_val_change=allow_val_change)
        super().update(d)


class Summary(dict):
    def update(self, d):
        record("summary.update", d=d)
        super().update(d)


class Run:
    def __init__(self):
        self.config, self.summary = Config(), Summary()

    def log(self, data, step=None, commit=None):
        record("log", data=data, step=step)

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, goal=None,
                      overwrite=None):  # fmt: skip
        record("define_metric", name=name, step_metric=step_metric)
        return Metric()

    def finish(self, exit_code=None):
        record("finish", exit_code=exit_code)


def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
         config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
         mode=None, force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None,
         tensorboard=None, sync_tensorboard=None, monitor_gym=None, settings=None):  # fmt: skip
    record("init", project=project, dir=dir, id=id, name=name, mode=mode, resume=resume, settings=settings.data)
    print("a line that must not be on stdout")
    return Run()
