"""Configs by noun: fields, their comments, and the way to JSON and back."""

import json

import pytest

from configs import digits
from configs import gaussians
from configs import imagenet_dit
from piflow_jax import config as config_lib
from piflow_jax.models import dit
from piflow_jax.policy import gmm

CONFIGS = [*(digits.get_config(role) for role in digits.ROLES), gaussians.get_config(), gaussians.get_config("dx,4"),
           *(imagenet_dit.get_config(f"tiny,{recipe}") for recipe in (*imagenet_dit.RECIPES, "teacher"))]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_comes_back_from_json_as_it_was(config):
  plain = config_lib.to_plain(config)
  again = config_lib.from_plain(json.loads(json.dumps(plain)))
  assert config_lib.to_plain(again) == plain and again.is_locked


def test_infinity_and_texts_like_references_come_back():
  config = digits.get_config()
  config.sampling.h = float("inf")
  config.teacher.checkpoint = "@home"
  again = config_lib.from_plain(json.loads(json.dumps(config_lib.to_plain(config))))
  assert again.sampling.h == float("inf") and again.teacher.checkpoint == "@home"


@pytest.mark.parametrize("config", CONFIGS[:3], ids=range(3))
def test_every_field_has_a_comment(config):
  rows = config_lib.described(config)
  assert len({name for name, _, _ in rows}) == len(rows) > 40
  assert [name for name, _, comment in rows if not comment] == []
  known = {name: value for name, value, _ in rows}
  assert known["network.width"] == 96 and "method.make" not in known and "network" not in known


def test_a_noun_has_its_own_fields_and_no_others():
  with pytest.raises(ValueError, match="patches: dit has no such field, only depth, width"):
    dit.config(patches=2)
  config = gmm.config(components=3)
  with pytest.raises(AttributeError):
    config.points = 4
  with pytest.raises(TypeError):
    config.components = "many"


def test_nouns_of_a_config_do_not_share_a_field():
  config = config_lib.base()
  config.network = dit.config()
  assert config.data is None and config.policy is None and config.method is None


def test_a_field_that_has_come_since_is_at_its_default():
  plain = config_lib.to_plain(digits.get_config())
  del plain["network"]["unroll"], plain["zero"]
  again = config_lib.from_plain(plain)
  assert again.network.unroll == 1 and again.zero is False


@pytest.mark.parametrize("change, words", [
    (lambda p: p["network"].update(colour=3), "network.colour is no field of piflow_jax.models.dit:make"),
    (lambda p: p["network"].update(make="@nowhere.at.all:make"),
     "network.make: nowhere.at.all:make is not to be found"),
    (lambda p: p["network"].update(make="@subprocess:run"), "network.make: subprocess:run belongs to no function"),
    (lambda p: p["network"].update(make="piflow_jax"), "network.make: 'piflow_jax' names no function"),
    (lambda p: p.update(colour=3), "colour is no field"),
    (lambda p: p["optimizer"].update(colour=3), "optimizer.colour is no field"),
])
def test_json_that_is_no_config_is_refused(change, words):
  plain = config_lib.to_plain(digits.get_config())
  change(plain)
  with pytest.raises(ValueError, match=words):
    config_lib.from_plain(plain)


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, True, "3", None, float("nan")])
def test_whole_numbers_are_whole_and_in_range(value):
  with pytest.raises(ValueError, match="n: .* must be a whole number from 1 to"):
    config_lib.whole("n", value)
  config_lib.whole("n", 5)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1e30, 10**400, float("nan"), float("inf"), "x", None, True])
def test_numbers_are_finite_and_in_range(value):
  with pytest.raises(ValueError, match="r: .* must be a number at least 0 and below 1"):
    config_lib.number("r", value, least=0, below=1)
  config_lib.number("r", 0, least=0, below=1)
