"""Stands in for trackio 0.43: records the calls. Parameters and their kinds are those of the package."""

from __future__ import annotations

from recording import record


class Run:
    def log(self, metrics, step=None):
        record("log", data=metrics, step=step)


def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
         resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
         auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None):  # fmt: skip
    record("init", project=project, name=name, config=config, resume=resume, embed=embed)
    print("a line that must not be on stdout")
    return Run()


def finish():
    record("finish")
