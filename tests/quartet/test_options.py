"""What torch.compile's mode and options become."""

import pytest
import torch

from quartet.options import KEYS, OptionError, Options
from quartet.policy import Policy
from quartet.recipes import PolicyError
from quartet.runtime.compat import inductor_config, list_mode_options

PASSES, KERNELS = ("rotate", "quantize", "share"), ("triton.scaled_mm", "cpu.linear")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("QUARTET_DUMP", raising=False)
    monkeypatch.delenv("QUARTET_POLICY", raising=False)


def parse(mode=None, **options):
    return Options.parse(mode, options, passes=PASSES, kernels=KERNELS)


def test_nothing_given():
    assert Options.parse() == Options.parse(None, {}) == Options()
    assert Options() == Options(Policy.coerce("auto"), None, False, (), (), None, None, None, {})


def test_everything_given(tmp_path):
    policy = Policy().on("lm_head", None)
    options = parse(policy=policy, dump=tmp_path, strict=True, disable_passes=["share", "rotate", "share"],
                    disable_kernels="cpu.linear", recompute="gemm", max_autotune=True)
    assert options == Options(policy, str(tmp_path), True, ("rotate", "share"), ("cpu.linear",), "gemm", None, None,
                              {"max_autotune": True})
    assert hash(options) == hash(parse(policy=policy, dump=str(tmp_path), strict=True, recompute="gemm",
                                       disable_passes=("rotate", "share"), disable_kernels=("cpu.linear",)))


@pytest.mark.parametrize("policy", ["bf16", {"default": "bf16"}, Policy("bf16")])
def test_policy_is_coerced(policy):
    assert parse(policy=policy).policy == Policy("bf16")


def test_a_wrong_policy_is_a_policy_error():
    with pytest.raises(PolicyError, match="did you mean 'quartet'"):
        parse(policy="quartte")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_becomes_inductor_configuration(mode):
    options = parse(mode)
    assert options.mode == mode and options.inductor == list_mode_options(mode)


def test_options_win_over_mode():
    assert parse("max-autotune", max_autotune=False).inductor["max_autotune"] is False
    assert list_mode_options("max-autotune")["max_autotune"] is True, "the table of modes is not ours to change"


def test_unknown_mode():
    with pytest.raises(OptionError, match="unknown mode 'max-autotun'; did you mean 'max-autotune'.*possible: default"):
        parse("max-autotun")


def test_dashes_are_underscores():
    options = Options.parse(None, {"max-autotune": True, "triton.cudagraphs": True, "disable-passes": "share"},
                            passes=PASSES)
    assert options.inductor == {"max_autotune": True, "triton.cudagraphs": True}
    assert options.disable_passes == ("share",)
    with pytest.raises(OptionError, match="'max_autotune' is given twice"):
        Options.parse(None, {"max-autotune": True, "max_autotune": True})


@pytest.mark.parametrize("key, nearest", [("polcy", "policy"), ("max_autotun", "max_autotune"), ("dumps", "dump"),
                                          ("cudagraphs", "triton.cudagraphs"), ("disable_pass", "disable_passes")])
def test_an_unknown_key_names_the_nearest_of_both(key, nearest):
    with pytest.raises(OptionError, match=f"unknown option '{key}'; did you mean '{nearest}'.*possible: policy, dump"):
        parse(**{key: True})


def test_our_keys_do_not_hide_inductors():
    assert not set(KEYS) & set(inductor_config.get_config_copy())


@pytest.mark.parametrize("key, value, message", [
    ("strict", 1, "'strict' is True or False, not int 1"),
    ("dump", True, "'dump' is the path of a folder, not bool True"),
    ("dump", "", "'dump' is the path"),
    ("recompute", "gem", "'recompute' is 'gem'; did you mean 'gemm'.*possible: none, gemm"),
    ("recompute", 3, "possible: none, gemm"),
    ("accumulation", "promote", "'accumulation' is 'promote'; did you mean 'promoted'.*possible: fast, promoted"),
    ("accumulation", None, "possible: fast, promoted"),
    ("disable_passes", 3, "'disable_passes' is a name or a list of names, not int 3"),
    ("disable_passes", [3], "a list of names"),
    ("disable_passes", ["rotat"],
     "'disable_passes': unknown pass 'rotat'; did you mean 'rotate'.*possible: rotate, quantize"),
    ("eval", "exact", "'eval' is 'exact'; possible: 'as trained', or None to evaluate in the model's own dtype"),
    ("disable_kernels", ["cpu.liner"], "'disable_kernels': unknown kernel 'cpu.liner'; did you mean 'cpu.linear'"),
    ("max_autotune", "yes", "'max_autotune' of Inductor is of type bool, not str 'yes'"),
    ("compile_threads", "four", r"'compile_threads' of Inductor is of type .*int.*, not str 'four'"),
    ("memory_pool", "all", "'memory_pool' of Inductor is of type .*intermediates.*, not str 'all'"),
])
def test_wrong_values_are_named(key, value, message):
    with pytest.raises(OptionError, match=message):
        parse(**{key: value})


def test_names_without_a_list_of_them_are_refused():
    with pytest.raises(OptionError, match="unknown pass 'share'; possible: none"):
        Options.parse(None, {"disable_passes": "share"})


@pytest.mark.parametrize("options, message", [("strict", "not str 'strict'"), ({3: True}, "by a string, not int 3")])
def test_options_of_a_wrong_kind(options, message):
    with pytest.raises(OptionError, match=message):
        Options.parse(None, options)


def test_a_users_own_pass_goes_through():
    def mine(graph):
        return None

    assert parse(joint_custom_pre_pass=mine).inductor == {"joint_custom_pre_pass": mine}
    assert parse(joint_custom_pre_pass=None).inductor == {"joint_custom_pre_pass": None}


def test_every_default_of_inductor_is_accepted():
    """The type check may not refuse what Inductor itself holds."""
    from quartet.options import _inductor_value

    refused = []
    for key, value in inductor_config.get_config_copy().items():
        try:
            _inductor_value(key, value)
        except OptionError as error:
            refused.append(str(error))
    assert refused == []


def test_environment_gives_defaults(monkeypatch, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(Policy("bf16").on("*.q", "quartet").to_toml())
    monkeypatch.setenv("QUARTET_DUMP", "graphs")
    monkeypatch.setenv("QUARTET_POLICY", str(path))
    assert parse().dump == "graphs" and parse().policy == Policy("bf16").on("*.q", "quartet")
    assert parse(dump="here").dump == "here" and parse(policy="bf16").policy == Policy("bf16")


def test_empty_environment_is_none(monkeypatch):
    monkeypatch.setenv("QUARTET_DUMP", "")
    monkeypatch.setenv("QUARTET_POLICY", "")
    assert parse() == Options()


def test_a_mistake_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("QUARTET_POLICY", "quartte")
    with pytest.raises(PolicyError, match="variable QUARTET_POLICY: unknown policy 'quartte'; did you mean"):
        parse()


def test_a_home_in_a_path_is_found_and_none_is_made_up(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QUARTET_DUMP", "~/graphs")
    assert parse().dump == str(tmp_path / "graphs") and parse(dump="~/here").dump == str(tmp_path / "here")
    (tmp_path / "policy.toml").write_text('default = "bf16"')
    assert parse(policy="~/policy.toml").policy == Policy("bf16")
    with pytest.raises(OptionError, match="option 'dump': ~unknown is nobody's home folder here; write"):
        parse(dump="~unknown/graphs")
    monkeypatch.setenv("QUARTET_DUMP", "~unknown/graphs")
    with pytest.raises(OptionError, match="environment variable QUARTET_DUMP: ~unknown is nobody's home"):
        parse()
    with pytest.raises(PolicyError, match="cannot read policy file '~unknown/p.toml': ~unknown is nobody's home"):
        parse(policy="~unknown/p.toml")


def test_what_torch_compile_passes():
    seen = []

    def backend(gm, inputs, **kwargs):
        seen.append(Options.parse(**kwargs))
        return gm

    torch.compile(lambda x: x + 1, backend=backend, mode="max-autotune")(torch.ones(2))
    torch.compile(lambda x: x + 2, backend=backend, options={"policy": "bf16"})(torch.ones(2))
    assert [(o.mode, o.policy.default) for o in seen] == [("max-autotune", "quartet"), (None, "bf16")]
