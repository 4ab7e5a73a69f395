"""ImageNet's whole path in small, by the programs and files of the real one, with a kill in every stage."""

import json

import numpy as np
import pytest

from piflow_jax.convert import inception as inception_weights
from piflow_jax.data import latent_cache
from piflow_jax.evaluation import samples_file
from tests import random_inception
from tests import small_autoencoder
from tests import tiny
from tests.data import making

_SMALL = ["--config.network.depth=1", "--config.network.width=32", "--config.network.heads=2",
          "--config.batch_size=16", "--config.steps=6", "--config.checkpoint_every=2", "--config.log_every=1",
          "--config.eval_every=0", "--config.image_every=0", "--config.optimizer.warmup_steps=2"]


@pytest.mark.rehearsal
def test_from_tars_to_every_figure_with_a_kill_in_each_stage(tmp_path):
  making.tars(tmp_path, classes=3, pictures=12, size=(40, 30))
  small_autoencoder.make(tmp_path / "autoencoder")
  inception_weights.write(random_inception.params(), tmp_path / "inception.safetensors")

  cache = tmp_path / "cache"
  make_cache = ("-m", "piflow_jax.data.imagenet", f"--source=tars:{tmp_path}",
                f"--autoencoder={tmp_path / 'autoencoder'}", f"--out={cache}", "--size=16", "--shards=6", "--batch=2")
  tiny.kill(lambda: list(cache.glob("*.array_record.json")), *make_cache)
  assert not (cache / latent_cache.FILE).exists()
  assert "36 records of 3 classes, 0 left out" in tiny.done(*make_cache)
  assert "whole" in tiny.done("-m", "piflow_jax.data.imagenet", f"--out={cache}", "--check")

  recipe, data = "--config=configs/imagenet_dit.py:tiny,", f"--config.data.path={cache}"
  # A teacher's time scale and norm are the student's recipe's.
  teacher, student = tmp_path / "teacher", tmp_path / "student"
  train_teacher = ("-m", "piflow_jax.main", f"{recipe}teacher,cache", data, f"--workdir={teacher}", *_SMALL,
                   "--config.network.time_scale=1.0", "--config.network.mlp_norm_eps=1e-6")
  train_student = ("-m", "piflow_jax.main", f"{recipe}repa-1nfe,cache", data, f"--workdir={student}", *_SMALL,
                   f"--config.teacher.checkpoint={teacher}", "--config.policy.components=4",
                   "--config.policy.logstd_width=16", "--config.method.total_substeps=16")
  for workdir, command in ((teacher, train_teacher), (student, train_student)):
    tiny.kill(lambda: (workdir / "checkpoints" / "2").exists(), *command)  # noqa: B023, called in this turn
    tiny.done(*command)
    assert [line["step"] for line in tiny.metrics(workdir) if "loss" in line] == [1, 2, 3, 4, 5, 6]

  own = (f"--workdir={student}", f"--autoencoder={tmp_path / 'autoencoder'}",
         f"--inception={tmp_path / 'inception.safetensors'}")
  reference, kept = tmp_path / "reference.npz", tmp_path / "kept.npz"
  tiny.done("-m", "piflow_jax.evaluate", *own, "--real=train", f"--save_reference={reference}")
  measure = ("-m", "piflow_jax.evaluate", *own, f"--reference={reference}", "--count=512", f"--keep={kept}",
             "--config.evaluation.batch_size=64")
  tiny.kill(lambda: kept.with_name("kept.npz.partial").exists(), *measure)
  assert not kept.exists()
  tiny.done(*measure)
  report = json.loads((student / "fid" / "adm,512.json").read_text())
  assert report["count"] == 512 and report["protocol"] == "adm"
  assert all(np.isfinite(value) for value in report["values"].values()) and len(report["values"]) == 6
  assert samples_file.shape_of(kept) == (512, 16, 16, 3)
